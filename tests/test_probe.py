"""Ops that nobody wrote a rule for: what the probe finds, and what it must not believe."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.check import check_speedup
from benchmarks.zoo.randomise import randomise
from maskprop import ModelSpeedup
from maskprop.errors import UnsupportedOpError
from maskprop.graph.trace import split_inputs, trace
from maskprop.infer.rules.probe import Probe
from maskprop.infer.sweep import Inference

Fn = Callable[..., Any]


# -- the ops: elementwise, per channel, over space, of channels in order, of channels together --------


def clip(x: Tensor) -> Tensor:
    return 1.5 * torch.tanh(x / 1.5)


def scale(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * weight.view(1, -1, 1, 1) + bias.view(-1, 1, 1)


def instance_norm(x: Tensor) -> Tensor:
    return (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-3)


def extremes(x: Tensor) -> list[Tensor]:
    return [x.amin((2, 3)), x.amax((2, 3))]


def steps(x: Tensor) -> Tensor:
    return torch.floor(x)


def rolled(x: Tensor) -> Tensor:
    return x.roll(1, 1).clone()


def swapped(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:2], x[:, :1], x[:, 2:]], 1)


def first_doubled(x: Tensor) -> Tensor:
    return torch.cat([2 * x[:, :1], x[:, 1:]], 1)


def mixed(x: Tensor) -> Tensor:
    return x.softmax(1)


def per_size(x: Tensor) -> Tensor:
    return x / x.shape[1]


def largest(x: Tensor) -> Tensor:
    return x.amax(1, keepdim=True).clone()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.t() + bias


def picky(x: Tensor) -> Tensor:
    if x.shape[1] != 8:
        raise ValueError("eight channels, please")
    return x.exp()


def noisy(x: Tensor) -> Tensor:
    return x + torch.rand(x.shape)


def lookup(table: Tensor, index: Tensor) -> Tensor:
    return table[index]


@cache
def op(fn: Fn) -> Fn:
    """A ``torch.library`` op, unknown to everybody, that computes this function and its gradient."""
    made = torch.library.custom_op(f"maskprop_test::{fn.__name__}", fn, mutates_args=())
    made.register_fake(fn)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():
            given = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
            leaves = [x for x in given if x.requires_grad]
            results = fn(*given)
            pairs = list(zip(results, grads[0], strict=True)) if isinstance(results, list) else [(results, grads[0])]
            pairs = [(r, g) for r, g in pairs if g is not None]
            found = iter(torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs]))
        return tuple(next(found) if x.requires_grad else None for x in given)

    if fn is not steps:
        made.register_autograd(backward, setup_context=setup)
    return lambda *args: made(*args)  # a plain function, which a model that holds it can be copied with


# -- models around them -------------------------------------------------------------------------------


class Between(nn.Module):
    """A convolution, an op, a convolution that reads it, a head."""

    def __init__(self, fn: Fn, channels: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(channels, 6, 3)
        self.head = nn.Linear(6, 4)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(self.fn(self.conv1(x)))).mean((2, 3)))


class Scaled(Between):
    """The op takes parameters of its own."""

    def __init__(self) -> None:
        super().__init__(op(scale))
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(self.fn(self.conv1(x), self.weight, self.bias))).mean((2, 3)))


class Pooled(Between):
    """Two results."""

    def __init__(self) -> None:
        super().__init__(op(extremes))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.fn(self.conv1(x))
        return self.head(high - low)


class Custom(nn.Module):
    """A linear layer of one's own between two of torch's, and a table of one's own behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.last = nn.Linear(3 * 64, 8), nn.Linear(12, 4)
        self.weight, self.bias = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(op(linear)(F.relu(self.conv1(x.flatten(1))), self.weight, self.bias))


class Table(nn.Module):
    """A lookup of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Parameter(torch.randn(9, 8)), nn.Linear(8, 4)

    def forward(self, index: Tensor) -> Tensor:
        return self.last(op(lookup)(self.table, index))


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


ROWS = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1.0])


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Three of eight rows of the first layer."""
    weight = model.get_parameter("conv1.weight")
    return {"conv1.weight": ROWS.reshape(-1, *[1] * (weight.ndim - 1)), "conv1.bias": ROWS}


def check(model: nn.Module, masks: dict[str, Tensor], inputs: Callable[[int], Tensor] = image, **options: Any) -> None:
    """The compact model is the masked one."""
    randomise(model.eval(), inputs(2))
    result = check_speedup(model, inputs(2), masks, [inputs(1), inputs(3)], tolerance=1e-5, **options)
    assert result.outcome == "exact", result.detail


@pytest.mark.parametrize("fn", [clip, instance_norm, steps], ids=lambda fn: fn.__name__)
def test_channels_follow(fn: Fn) -> None:
    model = Between(op(fn))
    check(model, masks_of(model))
    assert model.conv1.weight.shape[0] == model.conv2.weight.shape[1] == 5


def test_channels_follow_with_parameters() -> None:
    model = Scaled()
    check(model, masks_of(model) | {"bias": ROWS})
    assert model.conv1.weight.shape[0] == model.weight.shape[0] == model.bias.shape[0] == 5


def test_a_constant_that_the_op_leaves_is_kept_right() -> None:
    model = Scaled()
    check(model, masks_of(model))  # a pruned channel comes out as the op's bias
    assert model.conv1.weight.shape[0] == 5  # the constants went into the next bias


def test_several_results_follow() -> None:
    model = Pooled()
    check(model, masks_of(model))
    assert model.conv1.weight.shape[0] == model.head.weight.shape[1] == 5


@pytest.mark.parametrize(
    "fn", [rolled, swapped, first_doubled, mixed, per_size, picky, noisy], ids=lambda fn: fn.__name__
)
def test_channels_stay(fn: Fn) -> None:
    model = Between(op(fn)).eval()
    randomise(model, image()) if fn is not noisy else None
    ModelSpeedup(model, image(), masks_of(model), verify=fn is not noisy).speedup_model()
    assert model.conv1.weight.shape[0] == 8


def test_an_extremum_is_no_sum() -> None:
    model = Between(op(largest), channels=1)
    check(model, masks_of(model))
    assert model.conv1.weight.shape[0] == 8


@pytest.mark.parametrize("columns", [False, True])
def test_a_contraction_lets_units_go(columns: bool) -> None:
    model = Custom()
    masks = {"weight": ROWS[None]} if columns else masks_of(model)
    check(model, masks)
    assert model.conv1.weight.shape[0] == model.weight.shape[1] == 5


def test_rows_of_a_contraction_follow() -> None:
    model = Custom()
    rows = torch.tensor([1.0, 0, 1] * 4)
    check(model, {"weight": rows[:, None], "bias": rows})
    assert model.weight.shape[0] == model.bias.shape[0] == model.last.weight.shape[1] == 8


def test_a_lookup_keeps_its_rows() -> None:
    """Nobody can tell which rows the indices name; but nothing reads some of the columns."""
    model = Table()
    rows = torch.ones(9, 1)
    rows[[0, 1, 5]] = 0
    check(model, {"table": rows, "last.weight": ROWS[None]}, lambda n: torch.randint(0, 9, (n, 4)))
    assert model.table.shape == (9, 5)


class Signed(torch.autograd.Function):
    """The forward pass is traced through; the backward pass is the author's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.abs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * grad * ctx.saved_tensors[0].abs()


def test_an_autograd_function_needs_no_probe() -> None:
    model = Between(Signed.apply)
    randomise(model.eval(), image())
    speedup = ModelSpeedup(model, image(), masks_of(model), inference="rules")
    speedup.speedup_model()
    assert model.conv1.weight.shape[0] == 5
    assert speedup.inference.facts.probes == []


def test_without_probes_an_unknown_op_is_refused() -> None:
    model = Between(op(clip)).eval()
    with pytest.raises(UnsupportedOpError, match=r"maskprop_test.clip.default in '' has no rule and inference='rules'"):
        ModelSpeedup(model, image(), masks_of(model), inference="rules").speedup_model()
    assert model.conv1.weight.shape[0] == 8


def inferred(model: nn.Module, masks: dict[str, Tensor], inputs: Any = None, **options: Any) -> Inference:
    graph = trace(model.eval(), split_inputs(image() if inputs is None else inputs))
    inference = Inference(graph, masks, **options)
    inference.run()
    return inference


def test_claims_are_listed() -> None:
    model = Scaled()
    randomise(model.eval(), image())
    speedup = ModelSpeedup(model, image(), masks_of(model) | {"bias": ROWS})
    speedup.speedup_model()
    (claims,) = speedup.inference.facts.probes
    assert claims.op.target is torch.ops.maskprop_test.scale.default
    assert "axis 1 of input 0 with axis 0 of input 1 with axis 0 of input 2 becomes axis 1 of result 0" in str(claims)
    assert str(claims) in str(speedup.report)
    (claims,) = inferred(Between(op(noisy)), {}).facts.probes
    assert claims.failures == {}  # nothing was asked: no mask touches what it reads


def test_a_failure_is_told() -> None:
    model = Between(op(noisy)).eval()
    speedup = ModelSpeedup(model, image(), masks_of(model), verify=False)
    speedup.speedup_model()
    assert "it gives other numbers at each call" in str(speedup.inference.facts.probes[0])


def test_facts_of_a_masked_op() -> None:
    model = Between(op(clip))
    inference = inferred(model, masks_of(model) | {"conv2.weight": ROWS[None, :, None, None].flip(1)})
    (node,) = [n for n in inference.graph.ops if n.target is torch.ops.maskprop_test.clip.default]
    fact = inference.facts.known[node]
    assert torch.equal(fact.known.reshape(-1), ROWS == 0)
    assert torch.equal(fact.zero.reshape(-1), ROWS == 0)
    source = node.args[0]
    assert torch.equal(inference.facts.needed[source].reshape(-1), ROWS.flip(0) == 1)


def test_what_has_no_gradient_keeps_its_inputs_needed() -> None:
    model = Between(op(steps))
    inference = inferred(model, masks_of(model) | {"conv2.weight": ROWS[None, :, None, None].flip(1)})
    (node,) = [n for n in inference.graph.ops if n.target is torch.ops.maskprop_test.steps.default]
    assert inference.facts.needed[node.args[0]].all()


def test_a_probe_leaves_no_trace_in_the_process() -> None:
    model, x = Between(op(mixed)).eval(), image()
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.no_grad():
        inference = inferred(model, masks_of(model), x)
        assert not torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(inference.rule(inference.graph.ops[1]), Probe)
    assert all(p.grad is None for p in model.parameters())


def test_the_seed_decides() -> None:
    model = Between(op(clip))
    runs = [inferred(model, masks_of(model), generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    first, second = ([repr(f) for f in run.facts.known.values()] for run in runs)
    assert first == second
