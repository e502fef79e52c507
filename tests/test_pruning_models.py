"""Known architectures at ratio 0.5: what is masked leaves, and the forecast is what is measured."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo.handmade import HANDMADE
from maskprop import ModelSpeedup
from maskprop._torchvision import import_torchvision
from maskprop.pruning import L1NormPruner, measure, prunable_groups

IMAGE = torch.zeros(1, 3, 64, 64)
TOKENS = {"input_ids": torch.arange(24).reshape(2, 12)}


def vision(name: str, **options: Any) -> nn.Module:
    import_torchvision()
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)(**options)
    return model


def vit() -> nn.Module:
    import_torchvision()
    import timm

    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3)
    return model


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=128, vocab_size=100))


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet18": (lambda: vision("resnet18"), IMAGE),
    "resnet50": (lambda: vision("resnet50"), IMAGE),
    "mobilenet_v2": (lambda: vision("mobilenet_v2"), IMAGE),
    "densenet121": (lambda: vision("densenet121"), IMAGE),
    "resnext50": (lambda: vision("resnext50_32x4d"), IMAGE),
    "vit": (vit, IMAGE),
    "bert": (bert, TOKENS),
    "llama": (llama, TOKENS),
}


@pytest.mark.parametrize("name", MODELS)
def test_forecast_is_what_is_measured(name: str) -> None:
    make, dummy = MODELS[name]
    model = make().eval()
    pruner = L1NormPruner(model, 0.5, dummy_input=dummy)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert pruner.groups.structure is not None
    assert pruner.groups.structure.dense == measure(model, pruner.groups.inputs)
    ModelSpeedup(model, dummy, masks, tracer=pruner.groups.tracer).speedup_model()
    assert pruner.removal is not None
    assert pruner.removal.forecast == measure(model, pruner.groups.inputs)
    assert all(kept == -(-pruner.groups[g].size // 2) for g, kept in pruner.removal.kept.items())


@pytest.mark.parametrize("name", HANDMADE)
def test_forecast_of_handmade_models(name: str) -> None:
    """At odd ratios, with head dims where there are any: what is masked leaves, no more and no less."""
    specimen = HANDMADE[name]
    torch.manual_seed(0)
    model, dummy = specimen.build().eval(), specimen.inputs()
    groups = prunable_groups(model, dummy)
    kinds = {g.granularity for g in groups if g.default} | ({"head dim"} & {g.granularity for g in groups})
    ratio = (0.3, 0.45, 0.7)[zlib.crc32(name.encode()) % 3]
    removal = L1NormPruner(model, ratio, groups=groups, granularity=sorted(kinds)).prune()
    ModelSpeedup(model, dummy, removal.masks, tracer=groups.tracer, verify=False).speedup_model()
    assert removal.forecast == measure(model, groups.inputs)


class Tables(nn.Module):
    """Two things that are constant for every input: a bias made of a table of positions, and a class token's query."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.linspace(-1, 1, 5)[:, None].repeat(1, 2))
        self.hidden, self.bias = nn.Linear(2, 32), nn.Linear(32, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.bias(torch.relu(self.hidden(self.positions)))
        q, k, v = (
            f(y).view(len(x), -1, 4, 4).transpose(1, 2)
            for f, y in ((self.q, self.token.expand(len(x), -1, -1)), (self.k, x), (self.v, x))
        )
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [True, False])
def test_forecast_where_more_falls_silent_than_was_masked(bias: bool) -> None:
    torch.manual_seed(0)
    model = Tables()
    model.q = nn.Linear(16, 16, bias)
    with torch.no_grad():
        model.hidden.bias[:20] -= 10  # silent at every position of the table, whether masked or not
        model.hidden.weight[:20] *= 4
    dummy = torch.randn(2, 5, 16)
    groups = prunable_groups(model, dummy)
    removal = L1NormPruner(model, 0.5, groups=groups).prune()
    assert (removal.kept["hidden"], removal.kept["q:head"]) == (16, 2)
    ModelSpeedup(model, dummy, removal.masks, tracer=groups.tracer).speedup_model()
    assert model.hidden.out_features < 16
    assert removal.forecast == measure(model, groups.inputs)


def test_heads_and_dims_of_llama_leave_together() -> None:
    model = llama().eval()
    kinds = ["channel", "query group", "head", "head dim"]
    pruner = L1NormPruner(model, 0.5, dummy_input=TOKENS, granularity=kinds)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    ModelSpeedup(model, TOKENS, masks, tracer=pruner.groups.tracer).speedup_model()
    assert pruner.removal is not None
    assert pruner.removal.forecast == measure(model, pruner.groups.inputs)


def test_forecast_agrees_with_the_flop_counter() -> None:
    """The formulas are torch's; here its counter runs on the model itself."""
    from torch.utils.flop_counter import FlopCounterMode

    model = vision("mobilenet_v2").eval()
    with FlopCounterMode(display=False) as counter:
        model(IMAGE)
    assert measure(model, ((IMAGE,), {})).flops == counter.get_total_flops()
