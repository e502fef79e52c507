"""Masks: every form is read, every fault has its own error, and the model is left alone."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations, prune

from maskprop import Masks, load_masks, make_prune_permanent
from maskprop.errors import (
    MaskConflictError,
    MaskDeviceError,
    MaskError,
    MaskFileError,
    MaskShapeError,
    MaskValueError,
    NoMasksError,
    UnknownMaskError,
)


class Net(nn.Module):
    """A convolution, a batch norm, a raw parameter at the root, and a linear layer tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.scale = nn.Parameter(torch.ones(64))
        self.embed = nn.Embedding(10, 64)
        self.head = nn.Linear(64, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn1(self.conv1(x)).mean((2, 3)) * self.scale)


@pytest.fixture
def net() -> Net:
    return Net().eval()


ROWS = (torch.arange(64) % 2).reshape(64, 1, 1, 1)


def snapshot(model: nn.Module) -> list[tuple[str, int, Tensor]]:
    return [(name, id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()]


def assert_untouched(model: nn.Module, before: list[tuple[str, int, Tensor]]) -> None:
    after = snapshot(model)
    assert [x[:2] for x in after] == [x[:2] for x in before]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(after, before, strict=True))


def raises(model: nn.Module, error: type[MaskError], masks: Any, **options: Any) -> str:
    """The message of the error that the masks cause, having checked that the model is as it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        load_masks(model, masks, **options)
    assert_untouched(model, before)
    assert type(caught.value) is error
    return str(caught.value)


# --- what is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["nested", "flat", "mixed"])
def test_dicts(net: Net, form: str, dtype: torch.dtype) -> None:
    mask, scale = ROWS.to(dtype), torch.ones(64, dtype=dtype)
    given: dict[str, dict[str, Any]] = {
        "nested": {"conv1": {"weight": mask, "bias": None}, "": {"scale": scale}},
        "flat": {"conv1.weight": mask, "conv1.bias": None, "scale": scale},
        "mixed": {"conv1": {"weight": mask}, "scale": scale},
    }
    before = snapshot(net)
    masks = load_masks(net, given[form])
    assert_untouched(net, before)
    assert masks.activations == {}
    assert list(masks.parameters) == ["conv1.weight", "scale"]
    assert masks.parameters["conv1.weight"].dtype == torch.bool
    assert masks.parameters["conv1.weight"].shape == (64, 1, 1, 1)  # not expanded
    assert torch.equal(masks.parameters["conv1.weight"], ROWS == 1)


def test_the_masks_are_copies(net: Net) -> None:
    given = torch.ones(64, 1, 1, 1, dtype=torch.bool)
    masks = load_masks(net, {"conv1.weight": given})
    given.zero_()
    assert masks.parameters["conv1.weight"].all()


@pytest.mark.parametrize("shape", [(64, 3, 3, 3), (64, 1, 1, 1), (1, 3, 1, 1), (3, 1, 1), (1,), ()])
def test_shapes_that_broadcast(net: Net, shape: tuple[int, ...]) -> None:
    masks = load_masks(net, {"conv1": {"weight": torch.ones(shape)}})
    assert masks.parameters["conv1.weight"].shape == shape


def test_empty_dict_masks_nothing(net: Net) -> None:
    assert load_masks(net, {}) == Masks()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("kind", [str, Path])
def test_files(net: Net, tmp_path: Path, suffix: str, kind: Any) -> None:
    path = tmp_path / f"masks{suffix}"
    if suffix == ".safetensors":
        save_file({"conv1.weight": ROWS.to(torch.uint8)}, path)
    else:
        torch.save({"conv1": {"weight": ROWS.float()}}, path)
    masks = load_masks(net, kind(path))
    assert torch.equal(masks.parameters["conv1.weight"], ROWS == 1)


def test_activation_masks_are_kept_apart(net: Net) -> None:
    output = torch.ones(1, 64, 1, 1)
    masks = load_masks(net, {"conv1": {"weight": ROWS, "_output_0": output, "_input_x": None}, "_input_x": output})
    assert list(masks.parameters) == ["conv1.weight"]
    assert {module: list(targets) for module, targets in masks.activations.items()} == {
        "conv1": ["_output_0"],
        "": ["_input_x"],
    }
    assert masks.activations["conv1"]["_output_0"].dtype == torch.bool
    assert "value 0.5" in raises(net, MaskValueError, {"conv1": {"_output_0": output / 2}})


def test_tied_parameters_take_either_name(net: Net) -> None:
    mask = torch.arange(10).reshape(10, 1) > 4
    for name in ("embed", "head"):
        assert list(load_masks(net, {name: {"weight": mask}}).parameters) == ["embed.weight"]
    both = {"embed": {"weight": mask}, "head": {"weight": mask.expand(10, 64).float()}}
    assert list(load_masks(net, both).parameters) == ["embed.weight"]


def test_shared_module_takes_either_name() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    masks = load_masks(model, {"2": {"weight": torch.ones(4, 1)}})
    assert list(masks.parameters) == ["0.weight"]


def test_meta_model_takes_masks_from_any_device() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    assert load_masks(model, {"weight": torch.ones(4, 1)}).parameters["weight"].device.type == "cpu"


# --- torch.nn.utils.prune --------------------------------------------------------------------------------


def test_prune_masks(net: Net, generator: torch.Generator) -> None:
    prune.ln_structured(net.conv1, "weight", amount=0.5, n=1, dim=0)
    prune.random_unstructured(net.conv1, "bias", amount=3)
    prune.l1_unstructured(net.conv1, "bias", amount=3)  # a second one: torch stacks them
    x = torch.randn(2, 3, 8, 8, generator=generator)
    expected = net(x)
    before = snapshot(net)
    masks = load_masks(net, None)
    assert_untouched(net, before)
    assert sorted(masks.parameters) == ["conv1.bias", "conv1.weight"]
    assert int((~masks.parameters["conv1.bias"]).sum()) == 6

    original = net.conv1.weight_orig
    values = original.detach().clone()
    make_prune_permanent(net)
    assert torch.equal(original, values)  # whoever shares the old tensor keeps it
    assert not prune.is_pruned(net)
    assert sorted(net.state_dict()) == sorted(Net().state_dict())
    assert isinstance(net.conv1.weight, nn.Parameter)
    assert torch.equal(net.conv1.weight == 0, ~masks.parameters["conv1.weight"])
    assert torch.equal(net(x), expected)


def test_prune_of_a_recurrent_layer(generator: torch.Generator) -> None:
    """An RNN lists its weights in `_flat_weights`, which has to follow."""
    lstm = nn.LSTM(4, 6)
    prune.l1_unstructured(lstm, "weight_hh_l0", amount=0.5)
    x = torch.randn(5, 2, 4, generator=generator)
    expected = lstm(x)[0]
    assert list(load_masks(lstm).parameters) == ["weight_hh_l0"]
    make_prune_permanent(lstm)
    assert torch.equal(lstm(x)[0], expected)
    assert any(weight is lstm.weight_hh_l0 for weight in lstm._flat_weights)
    copy.deepcopy(lstm)(x)


def test_make_prune_permanent_keeps_requires_grad_and_plain_models(net: Net) -> None:
    before = snapshot(net)
    make_prune_permanent(net)
    assert_untouched(net, before)
    net.conv1.weight.requires_grad_(False)
    prune.identity(net.conv1, "weight")
    make_prune_permanent(net)
    assert not net.conv1.weight.requires_grad


# --- what is refused -------------------------------------------------------------------------------------


def test_no_masks(net: Net) -> None:
    assert raises(net, NoMasksError, None) == (
        "no masks were given, and the model has none of torch.nn.utils.prune. Pass a path or a dict; an "
        "empty dict masks nothing. Give {module: {parameter: mask}} or {'module.parameter': mask}."
    )


def test_wrong_shape(net: Net) -> None:
    assert raises(net, MaskShapeError, {"conv1": {"weight": torch.ones(64, 3, 3)}}) == (
        "mask for 'conv1.weight' has shape (64, 3, 3); the parameter has shape (64, 3, 3, 3). "
        "Give one entry an element, or a mask that broadcasts, such as (64, 1, 1, 1)."
    )
    for shape in ((1, 64, 3, 3, 3), (64,), (32, 1, 1, 1), (0,)):
        raises(net, MaskShapeError, {"conv1.weight": torch.ones(shape)})


def test_lazy_parameter() -> None:
    with pytest.raises(MaskShapeError, match="its module is lazy"):
        load_masks(nn.LazyLinear(4), {"weight": torch.ones(4, 1)})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "module.conv1",
            "the masks name 'module.conv1', which the model does not have; it has 'conv1'. "
            "Strip the prefix 'module.' (DistributedDataParallel adds it).",
        ),
        (
            "_orig_mod.conv1",
            "the masks name '_orig_mod.conv1', which the model does not have; it has 'conv1'. "
            "Strip the prefix '_orig_mod.' (torch.compile adds it).",
        ),
        (
            "student.net.conv1",
            "the masks name 'student.net.conv1', which the model does not have; it has 'conv1'. "
            "Strip the prefix 'student.net.'.",
        ),
        (
            "conv11",
            "the masks name 'conv11', which the model does not have; it has 'conv1'. Did you mean 'conv1'?",
        ),
        (
            "zzz",
            "the masks name 'zzz', which the model does not have; it has 'conv1', 'bn1', 'embed', 'head'. "
            "Use the names of model.named_parameters().",
        ),
    ],
)
def test_unknown_module(net: Net, name: str, message: str) -> None:
    assert raises(net, UnknownMaskError, {name: {"weight": ROWS}}) == message
    assert raises(net, UnknownMaskError, {f"{name}.weight": ROWS}) == message


def test_missing_prefix(net: Net) -> None:
    wrapped = nn.ModuleDict({"module": net})
    assert raises(wrapped, UnknownMaskError, {"conv1": {"weight": ROWS}}) == (
        "the masks name 'conv1', which the model does not have; it has 'module.conv1'. Add the prefix 'module.'."
    )


def test_unknown_parameter(net: Net) -> None:
    assert raises(net, UnknownMaskError, {"conv1": {"wieght": ROWS}}) == (
        "the masks name 'conv1.wieght'; 'conv1' (Conv2d) has no parameter 'wieght', it has 'weight', 'bias'. "
        "Did you mean 'weight'?"
    )
    assert "it has 'weight'. Use the names" in raises(net, UnknownMaskError, {"head": {"bias": torch.ones(10)}})
    assert "the root module (Net) has no parameter" in raises(net, UnknownMaskError, {"scales": torch.ones(64)})
    # an unknown name is an error also where it masks nothing, or an activation
    raises(net, UnknownMaskError, {"conv2": {"weight": None}})
    raises(net, UnknownMaskError, {"conv2": {"_output_0": torch.ones(1)}})


def test_module_instead_of_parameter(net: Net) -> None:
    assert raises(net, UnknownMaskError, {"conv1": ROWS}) == (
        "the masks name 'conv1', which is a module; a mask is for one parameter, here 'conv1.weight', "
        "'conv1.bias'. Give {module: {parameter: mask}} or {'module.parameter': mask}."
    )


def test_buffer(net: Net) -> None:
    assert raises(net, UnknownMaskError, {"bn1": {"running_mean": torch.ones(64)}}) == (
        "the masks name 'bn1.running_mean', which is a buffer; only parameters can be masked. Mask the "
        "parameters that produce the same channels: buffers shrink along with them."
    )


def test_computed_weights(net: Net) -> None:
    parametrizations.weight_norm(net.head)
    assert "a parametrization or a hook computes it" in raises(net, UnknownMaskError, {"head.weight": torch.ones(1)})
    prune.identity(net.conv1, "weight")
    assert "make_prune_permanent(model)" in raises(net, UnknownMaskError, {"conv1.weight": ROWS})


def test_values(net: Net) -> None:
    assert raises(net, MaskValueError, {"conv1.weight": ROWS * 0.5}) == (
        "mask for 'conv1.weight' has the value 0.5 at (1, 0, 0, 0); 32 of its 64 values are neither 0 "
        "(pruned) nor 1 (kept). Scores are not masks: threshold them, for example mask = scores > threshold."
    )
    assert raises(net, MaskValueError, {"scale": torch.full((64,), torch.nan)}) == (
        "mask for 'scale' has the value nan at (0,); 64 of its 64 values are neither 0 (pruned) nor 1 "
        "(kept). Compute the mask from finite scores."
    )
    assert "the value -1" in raises(net, MaskValueError, {"scale": torch.full((64,), -1)})
    assert "the value inf" in raises(net, MaskValueError, {"scale": torch.full((64,), torch.inf)})


def test_things_that_are_no_masks(net: Net) -> None:
    raises(net, MaskValueError, {"scale": torch.ones(64).to_sparse()})
    raises(net, MaskValueError, {"scale": torch.ones(64, dtype=torch.complex64)})
    assert "is a list" in raises(net, MaskValueError, {"scale": [1] * 64})
    assert "have the key 0 (int)" in raises(net, MaskValueError, {0: torch.ones(64)})
    assert "are a Tensor, not a path or a dict" in raises(net, MaskValueError, torch.ones(64))


def test_devices(net: Net) -> None:
    assert "holds no values" in raises(net, MaskDeviceError, {"scale": torch.ones(64, device="meta")})
    raises(net, MaskDeviceError, {"scale": torch.ones(64)}, map_location="meta")
    masks = load_masks(net, {"scale": torch.ones(64)}, map_location="cpu")
    assert masks.parameters["scale"].device.type == "cpu"


def test_mask_on_another_device() -> None:
    """A fake tensor claims a device that need not be there: this runs without an accelerator."""
    model = nn.Linear(4, 4)
    fake = FakeTensor(FakeTensorMode(), torch.empty(4, 4, device="meta"), torch.device("cuda:0"))
    model.weight = nn.Parameter(fake)
    with pytest.raises(MaskDeviceError) as caught:
        load_masks(model, {"weight": torch.ones(4, 4)})
    assert str(caught.value) == (
        "mask for 'weight' is on cpu; the parameter is on cuda:0. Pass map_location='cuda:0', or move the mask."
    )


def test_conflicts(net: Net) -> None:
    masks = {"embed": {"weight": torch.ones(10, 1)}, "head": {"weight": torch.zeros(10, 1)}}
    assert raises(net, MaskConflictError, masks) == (
        "'embed.weight' and 'head.weight' are one parameter, and their masks differ. "
        "Give one of them, or the same mask to both."
    )
    raises(net, MaskConflictError, {"scale": torch.ones(64), "": {"scale": torch.zeros(64)}})


class Bomb:
    """Pickles to a call that creates a file, as a hostile file would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_files_that_cannot_be_used(net: Net, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    torch.save({"scale": Bomb(tmp_path / "crater")}, bomb)
    message = raises(net, MaskFileError, bomb)
    assert message.startswith(f"masks file '{bomb}': it is damaged, or it holds more than tensors")
    assert not (tmp_path / "crater").exists()

    assert raises(net, MaskFileError, tmp_path / "none.pt").endswith("there is no such file. Check the path.")
    assert "that is a directory" in raises(net, MaskFileError, tmp_path)

    (tmp_path / "masks.npz").touch()
    assert "the suffix is '.npz'; known are .pt, .pth and .safetensors" in raises(
        net, MaskFileError, tmp_path / "masks.npz"
    )

    torch.save(torch.ones(64), tmp_path / "tensor.pt")
    assert "it holds a Tensor, not a dict" in raises(net, MaskFileError, tmp_path / "tensor.pt")

    torch.save({"scale": torch.ones(64)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for name, part in {
        "empty.pt": b"",
        "cut.pt": content[: len(content) // 2],
        "text.pt": b"not a model",
        "pickle.pt": pickle.dumps([1, 2]),
        "empty.safetensors": b"",
        "cut.safetensors": content[:40],
    }.items():
        (tmp_path / name).write_bytes(part)
        assert raises(net, MaskFileError, tmp_path / name).startswith(f"masks file '{tmp_path / name}':")
