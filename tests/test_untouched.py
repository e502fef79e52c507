"""Whatever fails, the model is what it was: to the bit, to the object."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from maskprop import ModelSpeedup
from maskprop.errors import (
    DummyInputError,
    MaskDeviceError,
    MaskError,
    MaskFileError,
    MaskpropError,
    MaskShapeError,
    MaskValueError,
    NoMasksError,
    NonFiniteError,
    OptionError,
    ReplaceError,
    RewriteError,
    StageError,
    TraceError,
    UnknownMaskError,
    UnsupportedOpError,
    VerifyError,
)
from maskprop.graph.graph import Graph
from maskprop.graph.trace import Inputs, trace
from tests.small import dense, inputs, masks

Options = dict[str, Any]


def values(table: dict[str, Any]) -> dict[str, Any]:
    """A module's table with tensors by object and bytes, and everything else by object and value."""
    return {key: fingerprint(value) for key, value in table.items()}


def fingerprint(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = value.detach().numpy().tobytes()
        grad = fingerprint(value.grad) if value.is_leaf else None
        return id(value), value.shape, value.stride(), value.requires_grad, data, grad
    if isinstance(value, dict):
        return id(value), values(value)
    if isinstance(value, (list, tuple)):
        return type(value), [fingerprint(v) for v in value]
    return value if isinstance(value, (int, float, str, set, type(None))) else id(value)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that could change about a model: classes, attributes, hooks, modes, tensors, gradients."""
    return {path: (id(m), type(m), values(vars(m))) for path, m in model.named_modules()}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for path in before:
        assert after[path] == before[path], path


@pytest.fixture
def model() -> nn.Module:
    """Some modules in train mode, gradients on some parameters."""
    found = dense("cnn")
    for i, module in enumerate(found.modules()):
        module.training = i % 2 == 0
    for parameter in list(found.parameters())[::2]:
        parameter.grad = torch.rand_like(parameter)
    return found


def refused(model: nn.Module, error: type[BaseException], match: str | None, **options: Any) -> BaseException:
    """Run a speedup that must fail, and look at the model afterwards."""
    arguments = {"dummy_input": inputs("cnn"), "masks_file": masks("cnn"), **options}
    before, rng = state_of(model), torch.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        ModelSpeedup(model, **arguments).speedup_model()
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), rng)
    return caught.value


# --- masks and inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"module.stem.0.weight": torch.ones(8, 1, 1, 1)}, UnknownMaskError, "Strip the prefix 'module.'"),
        (
            {"stem.0.weight": torch.ones(8, 3, 3)},
            MaskShapeError,
            r"\(8, 3, 3\); the parameter has shape \(8, 3, 3, 3\)",
        ),
        ({"stem.0.weight": torch.full((8, 1, 1, 1), 0.5)}, MaskValueError, "neither"),
        ({"stem.0.weight": torch.full((8, 1, 1, 1), torch.nan)}, MaskValueError, "nan"),
        ({"stem.0.weight": torch.ones(8, 1, 1, 1, device="meta")}, MaskDeviceError, "meta device"),
        ({"stem.0._output_3": torch.ones(1)}, UnknownMaskError, "no such output"),
        ({"stem.0._output_0": torch.ones(1, 7, 1, 1)}, MaskShapeError, r"\(2, 8, 16, 16\)"),
        ("no_such_file.pt", MaskFileError, "no such file"),
        (None, NoMasksError, "no masks were given"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_masks_that_do_not_fit(model: nn.Module, bad: Any, error: type[Exception], match: str) -> None:
    assert issubclass(error, MaskError)
    refused(model, error, match, masks_file=bad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        model.get_parameter("layer1.0.conv1.weight")[0, 0, 0, 0] = value
    refused(model, NonFiniteError, "'layer1.0.conv1.weight' holds nan or infinity")


def test_statistics_that_are_not_finite(model: nn.Module) -> None:
    model.get_buffer("stem.1.running_var")[0] = torch.nan
    refused(model, NonFiniteError, "nan")


@pytest.mark.parametrize(
    ("dummy", "match"),
    [
        (torch.randn(2, 5, 16, 16), "to have 3 channels, but got 5"),
        ((torch.randn(2, 3, 16, 16), 1), "positional argument"),
        ({"image": torch.randn(2, 3, 16, 16)}, "unexpected keyword argument 'image'"),
        (torch.randn(2, 3, 16, 16).double(), "float64"),
        ("image", "dummy_input is a str"),
    ],
)
def test_inputs_that_do_not_fit(model: nn.Module, dummy: Any, match: str) -> None:
    refused(model, DummyInputError, match, dummy_input=dummy)


@pytest.mark.parametrize(
    "option",
    [{"constants": "none"}, {"inference": "magic"}, {"channel_multiple": 0}, {"confidence": 1.5}],
    ids=lambda option: next(iter(option)),
)
def test_options_that_do_not_exist(model: nn.Module, option: Options) -> None:
    refused(model, OptionError, f"{next(iter(option))} is", **option)


# --- the user's parts -------------------------------------------------------------------------------------


class Boom(Exception):
    """The failure of a user's part."""


class Failing:
    """A replacer that has already replaced something when it fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def replace_modules(self, speedup: ModelSpeedup) -> None:
        speedup.replace_module("layer1", nn.Identity())
        raise self.error


def failing(module: nn.Module, leaf: Any) -> nn.Module:
    raise Boom("no")


def test_a_replacer_that_raises(model: nn.Module) -> None:
    error = refused(model, ReplaceError, "Failing failed with Boom: no", customized_replacers=[Failing(Boom("no"))])
    assert isinstance(error.__cause__, Boom)


def test_an_interrupt(model: nn.Module) -> None:
    refused(model, KeyboardInterrupt, None, customized_replacers=[Failing(KeyboardInterrupt())])


def test_a_replace_function_that_raises(model: nn.Module) -> None:
    functions = {nn.BatchNorm2d: failing}
    refused(model, ReplaceError, "BatchNorm2d failed on 'stem.1' with Boom", customized_replace_func=functions)


def test_a_replace_function_that_returns_no_module(model: nn.Module) -> None:
    functions = {nn.Conv2d: lambda module, leaf: module.weight}
    match = "returned Parameter for 'stem.0'; expected a torch.nn.Module"
    refused(model, ReplaceError, match, customized_replace_func=functions)


def test_a_replace_function_that_returns_other_shapes(model: nn.Module) -> None:
    functions = {nn.BatchNorm2d: lambda module, leaf: nn.BatchNorm2d(3).eval()}
    refused(model, ReplaceError, "stem.1", customized_replace_func=functions)


def test_a_replace_function_that_computes_something_else(model: nn.Module) -> None:
    def fresh(module: nn.Module, leaf: Any) -> nn.Module:
        return nn.BatchNorm2d(int(leaf[2]["weight"].sum())).eval()

    error = refused(model, VerifyError, "differs by", customized_replace_func={nn.BatchNorm2d: fresh})
    assert "first at aten.native_batch_norm.default in 'stem.1'" in str(error)


def test_a_tracer_that_raises(model: nn.Module) -> None:
    def tracer(model: nn.Module, inputs: Inputs) -> Graph:
        raise Boom("no")

    error = refused(model, TraceError, "Boom: no", tracer=tracer)
    assert isinstance(error.__cause__, Boom)


def test_a_tracer_that_returns_a_broken_graph(model: nn.Module) -> None:
    def tracer(model: nn.Module, inputs: Inputs) -> Graph:
        graph = trace(model, inputs)
        del graph.state["stem.0.weight"]
        return graph

    refused(model, TraceError, "'stem.0.weight', which is not among the graph's tensors", tracer=tracer)


def test_a_tracer_that_does_not_exist(model: nn.Module) -> None:
    refused(model, TraceError, "tracer is 'magic'", tracer="magic")


# --- models that cannot be sped up ------------------------------------------------------------------------


class Raising(nn.Module):
    """Writes to itself, then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.calls: Any = 0
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.fc(x)
        self.seen += 1
        self.extra = nn.Parameter(torch.ones(1))
        raise Boom("no")


def test_a_forward_that_fails_after_writing() -> None:
    model = Raising()
    x = torch.randn(2, 4)
    refused(model, DummyInputError, "Boom: no", dummy_input=x, masks_file={"fc.weight": torch.ones(4, 1)})


class Counting(nn.Module):
    """Writes to its buffers, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean += x.mean(0)
        return self.out(self.fc(x))


@pytest.mark.parametrize("tracer", ["fake", "concrete", "auto"])
def test_a_success_leaves_buffers_that_forward_writes_to(tracer: str) -> None:
    model = Counting()
    model(torch.randn(3, 4))
    before = {name: value.clone() for name, value in model.named_buffers()}
    row = torch.tensor([1.0, 0, 1, 1])[:, None]
    ModelSpeedup(model, torch.randn(2, 4), {"fc.weight": row}, tracer=tracer).speedup_model()
    assert model.fc.weight.shape == (3, 4)
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


def test_an_op_without_a_rule_where_rules_are_asked_for() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.cross(self.fc(x), x)

    row = torch.tensor([1.0, 0, 1])[:, None]
    options = {"dummy_input": torch.randn(2, 3), "masks_file": {"fc.weight": row}, "inference": "rules"}
    refused(Cross(), UnsupportedOpError, "linalg_cross", **options)


# --- stages by hand ---------------------------------------------------------------------------------------


def stages() -> Iterator[Callable[[ModelSpeedup], Any]]:
    yield lambda s: s.infer_modules_masks()
    yield lambda s: s.replace_compressed_modules()
    yield lambda s: s.facts
    yield lambda s: s.plan
    yield lambda s: s.explain("stem.0")
    yield lambda s: s.replace_module("stem.0", nn.Identity())


@pytest.mark.parametrize("call", list(stages()))
def test_stages_out_of_order(model: nn.Module, call: Callable[[ModelSpeedup], Any]) -> None:
    speedup, before = ModelSpeedup(model, inputs("cnn"), masks("cnn")), state_of(model)
    with pytest.raises(StageError, match=r"Call |called outside"):
        call(speedup)
    assert_untouched(model, before)


def test_tracing_and_inferring_change_nothing(model: nn.Module) -> None:
    before = state_of(model)
    speedup = ModelSpeedup(model, inputs("cnn"), masks("cnn"))
    speedup.initialize_speedup()
    speedup.infer_modules_masks()
    assert_untouched(model, before)


def test_own_pruning_masks_come_back(model: nn.Module) -> None:
    """Made permanent for the speedup, they are back with their hooks when it fails."""
    for path in ("layer1.0.conv1", "layer2.0.conv1"):
        prune.ln_structured(model.get_submodule(path), "weight", amount=0.5, n=1, dim=0)
    functions = {nn.Conv2d: failing}
    refused(model, ReplaceError, "Boom", masks_file=None, customized_replace_func=functions)
    assert prune.is_pruned(model.layer1[0].conv1)


def test_a_failed_attempt_does_not_spoil_the_next(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    refused(model, ReplaceError, None, customized_replace_func={nn.Conv2d: failing})
    for one in (model, twin):
        ModelSpeedup(one, inputs("cnn"), masks("cnn")).speedup_model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_every_refusal_is_of_the_family() -> None:
    for error in (DummyInputError, NonFiniteError, ReplaceError, RewriteError, TraceError, VerifyError):
        assert issubclass(error, MaskpropError)
