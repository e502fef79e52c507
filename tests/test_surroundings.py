"""Models as they are met: wrapped, compiled, hooked, reparametrised, checkpointed, with adapters and custom ops."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from maskprop import ModelSpeedup
from maskprop._torchvision import import_torchvision
from maskprop.errors import VerifyError, WrappedModelError
from maskprop.rewrite.repair import Repair
from tests.models import randomise

KEEP = torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 0])
MASKS = {"0.weight": KEEP.reshape(8, 1, 1, 1), "0.bias": KEEP, "1.weight": KEEP, "1.bias": KEEP}


def network(generator: torch.Generator) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(216, 2)
    )
    randomise(model, generator)
    return model.eval()


def masked(model: nn.Module, masks: dict[str, Tensor], x: Tensor) -> Tensor:
    """The output with the masks applied; the model, which may not be copied, is as it was afterwards."""
    held = {name: model.get_parameter(name).detach().clone() for name in masks}
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
        output = model(x)
        for name, value in held.items():
            model.get_parameter(name).copy_(value)
    return output if isinstance(output, Tensor) else output.logits


def assert_close(a: Tensor, b: Tensor) -> None:
    assert float((a.detach() - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (nn.DataParallel, r"the model is wrapped in DataParallel.*`\.module`"),
        (lambda m: torch.compile(m, backend="eager"), r"the model is wrapped in OptimizedModule.*`\._orig_mod`"),
        (lambda m: nn.Sequential(nn.Identity(), nn.DataParallel(m)), "'1' is wrapped in DataParallel"),
    ],
)
def test_wrapped_models_are_refused(
    wrap: Callable[[nn.Module], nn.Module], told: str, generator: torch.Generator
) -> None:
    inner = network(generator)
    with pytest.raises(WrappedModelError, match=told):
        ModelSpeedup(wrap(inner), torch.randn(2, 3, 8, 8), MASKS)
    ModelSpeedup(inner, torch.randn(2, 3, 8, 8), MASKS).speedup_model()
    assert inner[0].out_channels == 5


def test_compiled_earlier(generator: torch.Generator) -> None:
    """What was compiled before, in place or beside, follows the model that it holds."""
    model = network(generator)
    beside = torch.compile(model, backend="eager")
    model.compile(backend="eager")
    x = torch.randn(2, 3, 8, 8, generator=generator)
    expected = masked(model, MASKS, x)
    beside(x)
    ModelSpeedup(model, x, MASKS).speedup_model()
    assert model[0].out_channels == 5
    assert_close(model(x), expected)
    assert_close(beside(x), expected)


def test_hooks_stay_and_count(generator: torch.Generator) -> None:
    """Hooks that change what passes are part of the function; hooks that look see the compact model."""
    model = network(generator)
    seen: list[int] = []
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    y = torch.randn(3, 3, 8, 8, generator=generator)
    expected = masked(model, MASKS, y)
    ModelSpeedup(model, torch.randn(2, 3, 8, 8, generator=generator), MASKS).speedup_model()
    assert_close(model(y), expected)
    assert seen[-1] == 5


def weight_norm_by_hook(module: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module)


@pytest.mark.parametrize(
    "normalise",
    [parametrizations.weight_norm, weight_norm_by_hook, parametrizations.spectral_norm, nn.utils.spectral_norm],
)
def test_normalised_weights(normalise: Callable[[nn.Module], object], generator: torch.Generator) -> None:
    """A weight that is normalised over what a unit feeds keeps that unit; the outputs are the masked model's."""
    model = network(generator)
    normalise(model[3])
    model.eval()(torch.randn(2, 3, 8, 8))
    y = torch.randn(3, 3, 8, 8, generator=generator)
    expected = masked(model, MASKS, y)
    speedup = ModelSpeedup(model, torch.randn(2, 3, 8, 8, generator=generator), MASKS)
    speedup.speedup_model()
    assert_close(model(y), expected)
    assert {kept.units for kept in speedup.report.kept} == {(1, 3, 7)}


def test_rows_of_a_normalised_weight_leave(generator: torch.Generator) -> None:
    """Weight norm has a scale a row: with it, the row goes."""
    model = network(generator)
    parametrizations.weight_norm(model[0])
    masks = {n: m for n, m in MASKS.items() if n != "0.weight"}
    masks["0.parametrizations.weight.original0"] = KEEP.reshape(8, 1, 1, 1)
    y = torch.randn(3, 3, 8, 8, generator=generator)
    expected = masked(model, masks, y)
    ModelSpeedup(model, torch.randn(2, 3, 8, 8, generator=generator), masks).speedup_model()
    assert model[0].weight.shape == (5, 3, 3, 3)
    assert_close(model(y), expected)


@torch.library.custom_op("maskprop_tests::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    return x * 3.0


@scaled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Checkpointed(nn.Module):
    def __init__(self, inside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inside = inside
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + checkpoint(lambda z: self.b(self.inside(self.a(z))), x, use_reentrant=False)
        return self.c(x)


@pytest.mark.parametrize("inside", [F.gelu, scaled], ids=["checkpoint", "with a custom op"])
def test_checkpoints(inside: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
    model = randomise(Checkpointed(inside), generator).eval()
    keep = torch.tensor([0.0, 1] * 6)
    masks = {"a.weight": keep[:, None], "a.bias": keep}
    y = torch.randn(3, 6, generator=generator)
    expected = masked(model, masks, y)
    ModelSpeedup(model, torch.randn(2, 6, generator=generator), masks).speedup_model()
    assert model.a.out_features == 6
    assert_close(model(y), expected)
    if inside is F.gelu:
        model.train()(y).sum().backward()
        assert model.a.weight.grad is not None
        assert model.a.weight.grad.shape == (6, 6)


def test_adapters(generator: torch.Generator) -> None:
    """LoRA adapters of peft shrink with the layers that they adapt, train on, and merge."""
    import_torchvision()
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["gate_proj", "down_proj", "q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    keep = torch.ones(48, 1)
    keep[:12] = 0
    root = "base_model.model.model.layers.0.mlp"
    masks = {f"{root}.gate_proj.base_layer.weight": keep, f"{root}.up_proj.weight": keep}
    ids = torch.randint(0, 50, (2, 7), generator=generator)
    fresh = torch.randint(0, 50, (3, 9), generator=generator)
    expected = masked(model.eval(), masks, fresh)
    ModelSpeedup(model, {"input_ids": ids}, masks).speedup_model()
    mlp = model.get_submodule(root)
    assert mlp.up_proj.out_features == mlp.gate_proj.base_layer.out_features == 36
    assert mlp.gate_proj.lora_B.default.out_features == mlp.down_proj.lora_A.default.in_features == 36
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert mlp.gate_proj.lora_B.default.weight.grad.shape == (36, 4)
    assert mlp.up_proj.weight.grad is None  # frozen still
    with torch.no_grad():
        assert_close(model.eval()(fresh).logits, expected)
        merged = model.merge_and_unload()
        assert_close(merged(fresh).logits, expected)
    assert merged.model.layers[0].mlp.gate_proj.out_features == 36


class Noisy(nn.Module):
    """Draws random numbers in evaluation too, from every generator there is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.aux = nn.Linear(8, 3)  # so that it is also traced in training mode

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + 0 * (random.random() + np.random.rand())
        x = self.a(x + torch.randn_like(x)).relu() * scale
        return self.b(x) + self.aux(x) if self.training else self.b(x)


def test_models_that_draw_random_numbers(generator: torch.Generator) -> None:
    """They are compared on equal draws, and the caller's generators do not notice."""
    model = Noisy().eval()
    randomise(model, generator)
    keep = (torch.arange(8) % 2).float()
    x, masks = torch.randn(2, 4, generator=generator), {"a.weight": keep[:, None], "a.bias": keep}
    torch.manual_seed(3)
    expected = masked(model, masks, x)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    speedup = ModelSpeedup(model, x, masks)
    speedup.speedup_model()
    assert (model.a.out_features, model.aux.in_features) == (4, 4)
    assert speedup.report.check is not None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    torch.manual_seed(3)
    assert_close(model(x), expected)


class Drawing(nn.Module):
    """Monte Carlo dropout and sampled latents: of what leaves nothing is drawn any more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mean, self.spread, self.b = (nn.Linear(*s) for s in ((4, 8), (8, 6), (8, 6), (6, 3)))
        self.wrong = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.a(x).relu(), 0.4, training=True)
        mean, deviation = self.mean(x), self.spread(x).tanh().exp()
        return self.b(mean + deviation * torch.randn_like(deviation)) * self.wrong


def test_models_that_draw_less_once_units_left(generator: torch.Generator) -> None:
    model = Drawing().eval()
    randomise(model, generator)
    keep = (torch.arange(8) % 2).float()
    masks = {"a.weight": keep[:, None], "a.bias": keep, "b.weight": (torch.arange(6) > 1).float()[None]}
    speedup = ModelSpeedup(model, torch.randn(2, 4, generator=generator), masks)
    speedup.speedup_model()
    assert (model.a.out_features, model.mean.out_features) == (4, 4)
    assert speedup.report.check is not None
    assert speedup.report.check.passed


def test_a_wrong_model_that_draws_is_found(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that is no matter of luck is one still."""
    model = Drawing().eval()
    randomise(model, generator)
    monkeypatch.setattr(Repair, "_keep_roots", lambda repair, _: repair.edits.set_attribute(model, "wrong", 1.01))
    with pytest.raises(VerifyError):
        ModelSpeedup(model, torch.randn(2, 4), {"a.weight": KEEP[:, None], "a.bias": KEEP}).speedup_model()


class Draws(nn.Module):
    """What is made of a hidden value and random numbers."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.draw = nn.Linear(4, 8), nn.Linear(8, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.draw(self.a(x).relu()))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout1d(x[..., None], 0.4, training=True).squeeze(-1),
        lambda x: x * torch.empty_like(x).normal_(1, 2),
        lambda x: x * torch.zeros_like(x).exponential_(),
        lambda x: x * torch.rand(x.shape, dtype=x.dtype),
        lambda x: x * torch.randn(len(x), x.shape[-1]).abs(),
        lambda x: x * (0.9 + torch.rand(len(x), 1)).floor_(),
        lambda x: x * torch.bernoulli(x.sigmoid()),
        lambda x: x * torch.normal(x, x.abs() + 1),
        lambda x: x * torch.distributions.Normal(x, x.exp(), validate_args=False).rsample(),
        lambda x: x * torch.randint_like(x, 3),
    ],
)
def test_draws_of_every_kind(draw: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
    model = Draws(draw).eval()
    randomise(model, generator)
    masks = {"a.weight": KEEP[:, None], "a.bias": KEEP}
    speedup = ModelSpeedup(model, torch.randn(2, 4, generator=generator), masks)
    speedup.speedup_model()
    assert model.a.out_features == 5
    assert speedup.report.check is not None
    assert speedup.report.check.error <= 1e-6
