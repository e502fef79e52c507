"""What a speedup gives back is an ordinary model: it trains, copies, pickles, compiles and exports."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo.check import count_parameters, tensors
from benchmarks.zoo.specimen import Inputs, call
from maskprop import ModelSpeedup
from tests.small import MODELS, TOLERANCE, cast, compact, dense, error, inputs, masked, masks, sped_up

ROOT = Path(__file__).parent.parent
GENERATED = "generated"  # the only one of the models whose forward holds a number


def loss(model: nn.Module, value: Inputs) -> Tensor:
    (output,) = tensors(call(model, value))
    return (output - 1.0).square().mean()


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_masked_model_at_any_batch(name: str) -> None:
    speedup = sped_up(name)
    assert count_parameters(speedup.model) < count_parameters(dense(name))
    for batch, stretch in ((1, 0), (3, 0), (5, 4 if name in ("bert", "llama") else 0)):
        value = inputs(name, batch, seed=batch, stretch=stretch)
        assert error(speedup.model, masked(name), value) <= TOLERANCE
        assert len(tensors(call(speedup.model, value))[0]) == batch


# --- nothing is left to remove ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_second_run_removes_nothing(name: str) -> None:
    model = compact(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ones = {parameter: torch.ones_like(tensor) for parameter, tensor in model.named_parameters()}
    again = ModelSpeedup(model, inputs(name), ones)
    again.speedup_model()
    assert again.plan.empty
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_the_zeros_that_stay_remove_nothing_more(name: str) -> None:
    """Zeros scattered among the kept units, once more as masks on the result."""
    model, both = dense(name), masks(name)
    parameters = dict(model.named_parameters())
    gaps = torch.Generator().manual_seed(0)
    for key, mask in both.items():
        both[key] = mask * (torch.rand(parameters[key].shape, generator=gaps) < 0.9)
    first = ModelSpeedup(model, inputs(name), both)
    first.speedup_model()
    assert not first.plan.empty
    expected = copy.deepcopy(model)
    second = ModelSpeedup(model, inputs(name), {key: p != 0 for key, p in model.named_parameters()})
    second.speedup_model()
    assert second.plan.empty
    assert error(model, expected, inputs(name, 3, seed=9)) == 0


# --- it trains --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_trains_with_the_optimiser_from_before(name: str) -> None:
    model = dense(name).train()
    before = list(model.parameters())
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    ModelSpeedup(model, inputs(name), masks(name)).speedup_model()
    held = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    assert all(one is other for one, other in zip(held, before, strict=True))
    assert {id(parameter) for parameter in held} <= {id(parameter) for parameter in model.parameters()}
    assert model.training
    value = inputs(name, 8, seed=1)
    first = loss(model, value)
    first.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.shape == parameter.shape, key
        assert parameter.grad.isfinite().all(), key
    optimiser.step()
    assert loss(model, value) < first


@pytest.mark.parametrize("name", MODELS)
def test_trains_while_outputs_from_before_live(name: str) -> None:
    """They hold autograd nodes that knew the parameters by their old shapes."""
    model = dense(name).train()
    from_before = loss(model, inputs(name))
    ModelSpeedup(model, inputs(name), masks(name)).speedup_model()
    loss(model, inputs(name, 3, seed=1)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.shape == parameter.shape, key
    assert from_before.requires_grad


def test_gradients_are_those_of_the_masked_model() -> None:
    """In eval mode, where the two compute the same function, they agree wherever a unit stays."""
    name = "vit"
    speedup, reference = sped_up(name), masked(name)
    for model in (speedup.model, reference):
        loss(model, inputs(name, 3, seed=2)).backward()
    dense_gradients = {key: parameter.grad for key, parameter in reference.named_parameters()}
    for key, parameter in speedup.model.named_parameters():
        expected = dense_gradients[key]
        assert expected is not None
        assert parameter.grad is not None
        if key in speedup.plan.keep:
            expected = speedup.plan.slice(key, expected)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay_frozen() -> None:
    model = dense("cnn")
    frozen = {key for i, key in enumerate(dict(model.named_parameters())) if i % 2}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key not in frozen)
        parameter.grad = torch.zeros_like(parameter)
    ModelSpeedup(model, inputs("cnn"), masks("cnn")).speedup_model()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (key not in frozen)
        assert parameter.grad is None or parameter.grad.shape == parameter.shape


# --- it copies, pickles, compiles, exports ----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_deep_copies(name: str) -> None:
    model = compact(name)
    twin = copy.deepcopy(model)
    value = inputs(name, 3, seed=3)
    assert error(twin, model, value) == 0
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert error(model, compact(name), value) == 0


def test_pickles_into_another_process(tmp_path: Path) -> None:
    cases = [(compact(name), inputs(name, 3, seed=4)) for name in MODELS]
    expected = [call(model, value).detach() for model, value in cases]
    (tmp_path / "models.pickle").write_bytes(pickle.dumps((cases, expected)))
    torch.save(cases[0][0], tmp_path / "model.pt")
    code = (
        "import pickle, sys, torch\n"
        "from benchmarks.zoo.specimen import call\n"
        "cases, expected = pickle.load(open(sys.argv[1] + '/models.pickle', 'rb'))\n"
        "for (model, value), output in zip(cases, expected, strict=True):\n"
        "    torch.testing.assert_close(call(model, value), output)\n"
        "    model.train(); model(*value.values()) if isinstance(value, dict) else model(value)\n"
        "torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", MODELS)
def test_compiles(name: str) -> None:
    model = compact(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        assert error(compiled, model, inputs(name, batch, seed=batch)) <= TOLERANCE
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_exports(name: str) -> None:
    model, value = compact(name), inputs(name)
    args, kwargs = ((), value) if isinstance(value, dict) else ((value,), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        exported = torch.export.export(model, args, kwargs)
    assert error(exported.module(), model, value) <= TOLERANCE


# --- it is still the author's -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_keeps_classes_names_and_modes(name: str) -> None:
    model = dense(name)
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    before = {path: (module, type(module), module.training) for path, module in model.named_modules()}
    keys = list(model.state_dict())
    speedup = ModelSpeedup(model, inputs(name), masks(name))
    assert speedup.speedup_model() is model
    assert list(model.state_dict()) == keys
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    for path, (module, cls, training) in before.items():
        assert after[path] is module
        assert isinstance(module, cls)
        assert type(module).__name__ == cls.__name__
        assert module.training == training, path
        if path not in speedup.report.repair.generated:
            assert type(module) is cls, path
    assert bool(speedup.report.repair.generated) == (name == GENERATED)


@pytest.mark.parametrize("grad", [True, False])
def test_leaves_the_process_as_it_was(grad: bool) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(grad)
    state, fastpath = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    model = dense("bert")
    ModelSpeedup(model, inputs("bert"), masks("bert")).speedup_model()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() == grad
    assert torch.get_default_dtype() == torch.float64
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert torch.backends.mkldnn.enabled
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_leaves_nothing_behind() -> None:
    """No hooks, no wrappers, no buffers that were not there, and nothing that only maskprop understands."""
    model = compact("cnn")
    names = set(dict(dense("cnn").named_buffers()))
    assert set(dict(model.named_buffers())) == names
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
        assert type(module).__module__.startswith(("torch.nn", "benchmarks."))


# --- dtypes and layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_float64(name: str) -> None:
    model, value = dense(name).double(), cast(inputs(name), dtype=torch.float64)
    ModelSpeedup(model, value, masks(name)).speedup_model()
    fresh = cast(inputs(name, 3, seed=5), dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert error(model, masked(name).double(), fresh) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """As near the float32 result as the masked model of that dtype comes."""
    model, value = dense(name).to(dtype), cast(inputs(name), dtype=dtype)
    exact = masked(name).to(dtype).float()
    ModelSpeedup(model, value, masks(name)).speedup_model()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    fresh = cast(inputs(name, 16, seed=6), dtype=dtype)
    wide = cast(fresh, dtype=torch.float32)
    with torch.no_grad():
        truth = call(exact, wide)
        ours, theirs = (call(one, fresh).float() for one in (model, masked(name).to(dtype)))
    assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()


def test_channels_last() -> None:
    layout = torch.channels_last
    model = dense("cnn").to(memory_format=layout)
    ModelSpeedup(model, cast(inputs("cnn"), memory_format=layout), masks("cnn")).speedup_model()
    for key, parameter in model.named_parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=layout), key
    fresh = cast(inputs("cnn", 3, seed=7), memory_format=layout)
    assert error(model, masked("cnn"), fresh) <= TOLERANCE
    with torch.no_grad():
        assert model.layer1(model.stem(fresh)).is_contiguous(memory_format=layout)
