"""Small nasty models: equal to the masked model, as small as by hand, and models like any other."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torture import (  # noqa: F401
    CASES,
    Case,
    Subject,
    attention,
    calls,
    channels,
    constants,
    frames,
    functions,
    hidden,
    layers,
    norms,
    numbers,
    positions,
    precision,
    python,
    recurrent,
    sharing,
)

import maskprop
from benchmarks.zoo.check import relative_error
from benchmarks.zoo.specimen import call
from maskprop import ModelSpeedup
from maskprop.graph.structure import tensors_in


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def first_rows(model: nn.Module, case: Case) -> list[tuple[str, Tensor]]:
    """Of what was pruned, the parameters that have rows to lose."""
    return [(key, p) for key, p in model.named_parameters() if key in case.pruned and p.dim() and len(p) > 1]


def assert_loads(model: nn.Module, case: Case, directory: Path, x: Any) -> None:
    """Saved, and loaded into the dense architecture, it is the same to the bit."""
    maskprop.save(model, directory)
    loaded = maskprop.load(directory, case.model).eval()
    saved, read = tensors(model), tensors(loaded)
    assert saved.keys() == read.keys()
    assert all(torch.equal(t.detach().nan_to_num(), read[key].detach().nan_to_num()) for key, t in saved.items())
    with torch.no_grad():
        outputs, expected = (dict(tensors_in(call(m, x))) for m in (loaded, model))
    assert outputs.keys() == expected.keys()
    assert all(torch.equal(t, expected[key]) for key, t in outputs.items())


@pytest.mark.filterwarnings("error:.*does not match num_features")
@pytest.mark.parametrize("name", CASES)
def test_torture(name: str, tmp_path: Path) -> None:
    subject = Subject(name)
    case, model, masked, generator = subject.case, subject.model, subject.masked, subject.generator
    before, names, kind = shapes(model), set(model.state_dict()), type(model)

    speedup = ModelSpeedup(model, subject.inputs(), subject.masks, tracer=case.tracer)
    speedup.speedup_model()

    with torch.no_grad():
        for batch in case.batches:
            x = case.inputs(batch, generator)
            assert relative_error(call(model, x), call(masked, x)) <= case.tol
        x = case.inputs(case.batches[0], generator)
        copies = [copy.deepcopy(model)]
        if "-" not in name:  # a function in a closure does not pickle
            copies.append(pickle.loads(pickle.dumps(model)))
        for one in copies:
            assert relative_error(call(one, x), call(masked, x)) <= case.tol
        assert_loads(model, case, tmp_path, x)
    assert {key: shape for key, shape in shapes(model).items() if before.get(key) != shape} == case.left
    assert isinstance(model, kind)
    assert set(model.state_dict()) - speedup.plan.new_bias.keys() == names

    zeros = {key: (p != 0).float() for key, p in model.named_parameters()}
    again = ModelSpeedup(model, x, zeros, tracer=case.tracer)
    again.speedup_model()
    assert again.plan.empty

    first = {key: torch.arange(len(p)).reshape(-1, *[1] * (p.dim() - 1)) > 0 for key, p in first_rows(model, case)}
    ModelSpeedup(model, x, first, tracer=case.tracer).speedup_model()
    assert_loads(model, case, tmp_path, x)
