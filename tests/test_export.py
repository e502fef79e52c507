"""Compact models leave for elsewhere: ONNX, exported programs, compiled, TorchScript, quantised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

from maskprop.commands.export import export
from tests.models import ConvNet, LeNet, Transformer, example, sped_up

BUILD: dict[str, Callable[[], nn.Module]] = {
    "cnn": ConvNet,
    "generated forward": LeNet,
    "vit": Transformer,
    "bert": lambda: Transformer(tokens=20),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


@pytest.fixture(params=BUILD)
def compact(request: pytest.FixtureRequest, generator: torch.Generator) -> nn.Module:
    return sped_up(BUILD[request.param](), generator).model


@pytest.mark.parametrize("form", ["onnx", "program", "torchscript"])
def test_written_and_read_back(compact: nn.Module, form: str, generator: torch.Generator, tmp_path: Path) -> None:
    """The file computes what the compact model does; ONNX and programs for another batch size too."""
    assert export(compact, example(compact, 2, generator), tmp_path / "model", form) < 1e-5


def test_compiles_whole(compact: nn.Module, generator: torch.Generator) -> None:
    compiled = torch.compile(compact, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = example(compact, batch, generator)
        with torch.no_grad():
            assert relative(compiled(x), compact(x)) < 1e-5


def test_compiles_to_machine_code(generator: torch.Generator) -> None:
    model = sped_up(ConvNet(), generator).model
    x = example(model, 2, generator)
    with torch.no_grad():
        assert relative(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", ["cnn", "bert"])
def test_quantises_afterwards(name: str, generator: torch.Generator) -> None:
    """Dynamic int8 of the linear layers is close to the compact model."""
    model = sped_up(BUILD[name](), generator).model
    with pytest.warns(DeprecationWarning, match="torchao"):
        quantised = quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(m).__module__ for m in quantised.modules())
    x = example(model, 3, generator)
    with torch.no_grad():
        assert relative(quantised(x), model(x)) < 0.05
