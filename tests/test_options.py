"""What a caller can choose: his own parts, how constants are kept, how facts are found, which masks count."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks.zoo.check import masked_reference, relative_error
from benchmarks.zoo.specimen import call
from maskprop import ModelSpeedup
from maskprop.errors import MaskpropError
from maskprop.rewrite.custom import LeafMasks
from tests.small import MODELS, TOLERANCE, dense, error, inputs, masked, masks, sped_up


def channels(mask: Tensor) -> int:
    """Units along axis 1 that a full-size mask keeps."""
    return int(mask.amax([d for d in range(mask.ndim) if d != 1]).sum())


def kept(tensor: Tensor, mask: Tensor) -> Tensor:
    """The part of a weight that its mask keeps, an outer product of kept indices."""
    for axis in range(tensor.ndim):
        others = [d for d in range(mask.ndim) if d != axis]
        tensor = tensor.index_select(axis, (mask.amax(others) if others else mask).nonzero().flatten())
    return tensor.detach()


def narrow_norm(module: nn.Module, leaf: LeafMasks) -> nn.Module:
    """A batch norm of the channels that stay."""
    mask = leaf[2]["weight"]
    new = nn.BatchNorm2d(int(mask.sum())).eval()
    new.load_state_dict({key: kept(value, mask) if value.ndim else value for key, value in module.state_dict().items()})
    return new


# --- the user's own parts, with NNI's signatures ----------------------------------------------------------


def test_replace_function() -> None:
    """NNI's: ``(module, (input_masks, output_mask, weight_masks)) -> module``."""
    seen: list[Tensor] = []

    def replace(module: nn.Module, leaf: LeafMasks) -> nn.Module:
        (given,), output, weights = leaf
        assert isinstance(module, nn.Conv2d)
        assert weights.keys() == dict(module.named_parameters()).keys()
        assert weights["weight"].shape == module.weight.shape
        assert given.shape[1] == module.in_channels
        assert output.shape[1] == module.out_channels
        for mask in (given, output, *weights.values()):
            assert mask.dtype == torch.float32
            assert set(mask.unique().tolist()) <= {0.0, 1.0}
        weight = kept(module.weight, weights["weight"])
        assert weight.shape == (channels(output), channels(given), *module.kernel_size)
        new = nn.Conv2d(*weight.shape[1::-1], module.kernel_size, module.stride, module.padding, bias=False)
        new.load_state_dict({"weight": weight})
        seen.append(output)
        return new

    model = dense("cnn")
    chosen = full_zeros(model)
    expected = masked_reference(model, chosen)
    ModelSpeedup(model, inputs("cnn"), chosen, customized_replace_func={nn.Conv2d: replace}).speedup_model()
    assert len(seen) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert error(model, expected, inputs("cnn", 3, seed=1)) <= TOLERANCE


def full_zeros(model: nn.Module) -> dict[str, Tensor]:
    """The first half of the channels of every layer with all that belongs to them: no constants are left."""
    found = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("fc"):
            mask = torch.ones(parameter.shape[0])
            mask[: len(mask) // 2] = 0
            found[name] = mask.reshape(-1, *[1] * (parameter.ndim - 1))
    return found


def test_replace_function_for_batch_norm_sees_its_output() -> None:
    widths: list[int] = []

    def replace(module: nn.Module, leaf: LeafMasks) -> nn.Module:
        (given,), output, weights = leaf
        assert channels(given) == channels(output) == weights["bias"].sum()
        widths.append(channels(output))
        return narrow_norm(module, leaf)

    model = dense("cnn")
    chosen = full_zeros(model)
    expected = masked_reference(model, chosen)
    functions = {"BatchNorm2d": replace}  # by the class's name, as in NNI
    ModelSpeedup(model, inputs("cnn"), chosen, customized_replace_func=functions).speedup_model()
    assert widths == [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert error(model, expected, inputs("cnn", 3, seed=2)) <= TOLERANCE


class Folded(nn.Module):
    """A residual block's modules, sliced by the masks of its leaves."""

    def __init__(self, block: nn.Module, speedup: ModelSpeedup, path: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        for name, module in block.named_children():
            masks = speedup.masks_of(f"{path}.{name}")
            if isinstance(module, nn.Conv2d):
                new: nn.Module = nn.Conv2d(channels(masks[0][0]), channels(masks[1]), 3, padding=1, bias=False)
                new.load_state_dict({"weight": kept(module.weight, masks[2]["weight"])})
            else:
                new = narrow_norm(module, masks)
            self.parts.append(new.eval())

    def forward(self, x: Tensor) -> Tensor:
        conv1, bn1, conv2, bn2 = self.parts
        return torch.relu(bn2(conv2(torch.relu(bn1(conv1(x))))) + x)


class FoldBlock:
    """A replacer for one block."""

    def replace_modules(self, speedup: ModelSpeedup) -> None:
        assert not speedup.plan.empty
        assert speedup.model.stem[0].out_channels == 8  # nothing is rewritten yet
        block = speedup.model.get_submodule("layer1.0")
        speedup.replace_module("layer1.0", Folded(block, speedup, "layer1.0"))


def test_replacer_sees_a_hyper_module_first() -> None:
    """A block is taken over whole; its leaves are not touched any more, and the rest follows the plan."""
    seen: list[nn.Module] = []

    def replace(module: nn.Module, leaf: LeafMasks) -> nn.Module:
        seen.append(module)
        return narrow_norm(module, leaf)

    model = dense("cnn")
    chosen, block = full_zeros(model), set(model.layer1[0].modules())
    expected = masked_reference(model, chosen)
    options: dict[str, Any] = {
        "customized_replacers": [FoldBlock()],
        "customized_replace_func": {nn.BatchNorm2d: replace},
    }
    speedup = ModelSpeedup(model, inputs("cnn"), chosen, **options)
    speedup.speedup_model()
    assert isinstance(model.layer1[0], Folded)
    assert seen
    assert not block & set(seen)
    assert "layer1.0" in speedup.report.how
    assert error(model, expected, inputs("cnn", 3, seed=3)) <= TOLERANCE


# --- masks from elsewhere ---------------------------------------------------------------------------------


def test_own_pruning_masks() -> None:
    model = dense("cnn")
    for path in ("layer1.0.conv1", "layer2.0.conv1"):
        prune.ln_structured(model.get_submodule(path), "weight", amount=0.5, n=1, dim=0)
    keys = set(dense("cnn").state_dict())
    with torch.no_grad():
        value = inputs("cnn", 3, seed=4)
        expected = model(value)
    speedup = ModelSpeedup(model, inputs("cnn"))
    speedup.speedup_model()
    assert set(model.state_dict()) == keys
    assert model.layer1[0].conv1.out_channels < 8
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert relative_error(model(value), expected) <= TOLERANCE


def keep(size: int, pruned: list[int]) -> Tensor:
    mask = torch.ones(size)
    mask[pruned] = 0
    return mask


class Masked(nn.Module):
    """Multiplies what a module gives, or what it gets, by a mask: what an activation mask means."""

    def __init__(self, module: nn.Module, mask: Tensor, inside: bool) -> None:
        super().__init__()
        self.module, self.mask, self.inside = module, mask, inside

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x * self.mask) if self.inside else self.module(x) * self.mask


@pytest.mark.parametrize("target", ["_output_0", "_input_input"])
def test_activation_masks(target: str) -> None:
    """A masked activation is zero after the module, or before it; the units that made it leave."""
    model, expected = dense("cnn"), dense("cnn")
    path = "layer1.0.bn1" if target == "_output_0" else "layer1.0.conv2"
    mask = keep(8, [1, 4, 6]).reshape(1, 8, 1, 1)
    name = path.rpartition(".")[2]
    setattr(expected.layer1[0], name, Masked(model.get_submodule(path), mask, target != "_output_0"))
    expected = copy.deepcopy(expected)
    ModelSpeedup(model, inputs("cnn"), {path: {target: mask}}).speedup_model()
    assert model.layer1[0].conv1.weight.shape == (5, 8, 3, 3)
    assert model.layer1[0].conv2.weight.shape == (8, 5, 3, 3)
    assert error(model, expected, inputs("cnn", 3, seed=5)) <= TOLERANCE


def test_activation_mask_that_cannot_leave_keeps_its_zeros() -> None:
    """The activation stays full-size, so the module must still give zeros, or the engine must refuse."""
    model, expected = dense("vit"), dense("vit")
    mask = keep(24, [0, 5])
    expected.blocks[0].norm2 = Masked(expected.blocks[0].norm2, mask, inside=False)
    try:
        ModelSpeedup(model, inputs("vit"), {"blocks.0.norm2": {"_output_0": mask}}).speedup_model()
    except MaskpropError:
        expected = dense("vit")
    assert error(model, expected, inputs("vit", 3, seed=6)) <= TOLERANCE


# --- constants --------------------------------------------------------------------------------------------


def padded() -> tuple[nn.Module, dict[str, Tensor]]:
    """A batch norm leaves constants before a padded convolution: only a carrier keeps them exact."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1), nn.Flatten(2), nn.Linear(36, 4)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter) - 0.3)
    return model, {"0.weight": keep(8, [1, 2, 3]).reshape(8, 1, 1, 1), "0.bias": keep(8, [1, 2, 3])}


@pytest.mark.parametrize(("constants", "width", "exact"), [("exact", 6, True), ("fold", 5, False), ("drop", 5, False)])
def test_constants(constants: str, width: int, exact: bool) -> None:
    model, chosen = padded()
    expected = masked_reference(model, chosen)
    ModelSpeedup(model, torch.randn(2, 3, 8, 8), chosen, constants=constants).speedup_model()
    assert model[0].out_channels == width
    difference = error(model, expected, torch.randn(3, 3, 8, 8))
    assert (difference <= TOLERANCE) == exact


def test_folded_constants_are_exact_away_from_the_border() -> None:
    """What ``"fold"`` gets wrong is the border; what ``"drop"`` gets wrong is everything."""
    x = torch.randn(3, 3, 8, 8)
    inner = {}
    for constants in ("fold", "drop"):
        model, chosen = padded()
        expected = masked_reference(model, chosen)
        ModelSpeedup(model, x, chosen, constants=constants).speedup_model()
        with torch.no_grad():
            a, b = (one[:3](x)[:, :, 1:-1, 1:-1] for one in (model, expected))
        inner[constants] = relative_error(a, b)
    assert inner["fold"] <= TOLERANCE < inner["drop"]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_map_that_is_uniform_on_a_small_input_only(size: int) -> None:
    """Averages that count padding vary over space; on one or two pixels that does not show."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1)
    ).eval()
    with torch.no_grad():
        model[0].bias.uniform_(0.5, 1)
    chosen = {"0.weight": keep(8, [0, 4, 6]).reshape(8, 1, 1, 1)}
    expected = masked_reference(model, chosen)
    ModelSpeedup(model, torch.randn(2, 3, size, size), chosen).speedup_model()
    for other in (size, 7):
        assert error(model, expected, torch.randn(3, 3, other, other)) <= TOLERANCE


@pytest.mark.parametrize("bias", [True, False])
def test_padding_with_a_number_takes_a_carrier_and_a_bias(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConstantPad2d(1, 0.3), nn.Conv2d(8, 4, 3, bias=bias), nn.Flatten(2)
    ).eval()
    with torch.no_grad():
        model[0].bias.uniform_(0.5, 1)
    chosen = {"0.weight": keep(8, [0, 4, 6]).reshape(8, 1, 1, 1)}
    expected = masked_reference(model, chosen)
    ModelSpeedup(model, torch.randn(2, 3, 4, 4), chosen).speedup_model()
    assert model[0].out_channels == int(chosen["0.weight"].sum()) + 1  # the carrier
    for size in (4, 7):
        assert error(model, expected, torch.randn(3, 3, size, size)) <= TOLERANCE


# --- the rest ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_channel_multiple(name: str, multiple: int) -> None:
    speedup = sped_up(name, channel_multiple=multiple)
    assert not speedup.plan.empty
    for parameter, keeps in speedup.plan.keep.items():
        for one in keeps:
            dense_width = speedup.plan.shapes[parameter][one.axis]
            assert one.count % multiple == 0 or one.count == dense_width, parameter
    assert error(speedup.model, masked(name), inputs(name, 3, seed=7)) <= TOLERANCE


def test_a_multiple_keeps_more() -> None:
    widths = [sped_up("cnn", channel_multiple=m).model.stem[0].out_channels for m in (1, 2, 8)]
    assert widths == [5, 6, 8]


@pytest.mark.parametrize("mode", ["auto", "rules", "gradient"])
@pytest.mark.parametrize("name", ["cnn", "vit", "bert", "llama"])
def test_inference_modes(name: str, mode: str) -> None:
    """Every mode is exact; probes alone may keep more."""
    speedup = sped_up(name, inference=mode)
    assert error(speedup.model, masked(name), inputs(name, 3, seed=8)) <= TOLERANCE
    auto = sum(p.numel() for p in sped_up(name).model.parameters())
    left = sum(p.numel() for p in speedup.model.parameters())
    assert left == auto if mode == "rules" else left >= auto


@pytest.mark.parametrize("name", MODELS)
def test_without_verification(name: str) -> None:
    """Only the check is left out."""
    speedup = sped_up(name, verify=False)
    assert speedup.report.check is None
    assert "verify" not in speedup.report.seconds
    assert "switched off" in str(speedup.report)
    assert error(speedup.model, masked(name), inputs(name, 3, seed=9)) <= TOLERANCE


def test_stages_by_hand_do_the_same() -> None:
    model = dense("bert")
    speedup = ModelSpeedup(model, inputs("bert"), masks("bert"))
    speedup.initialize_speedup()
    for node in speedup.graph.nodes:
        speedup.update_direct_sparsity(node)
    for node in reversed(speedup.graph.nodes):
        speedup.update_indirect_sparsity(node)
    speedup.infer_modules_masks()
    speedup.replace_compressed_modules()
    twin = sped_up("bert").model
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_report(name: str) -> None:
    speedup = sped_up(name)
    data = json.loads(json.dumps(speedup.report.to_dict()))
    assert data == json.loads(speedup.report.to_json())
    assert data["parameters"]["before"] == sum(p.numel() for p in dense(name).parameters())
    assert data["parameters"]["after"] == sum(p.numel() for p in speedup.model.parameters())
    assert data["flops"]["after"] < data["flops"]["before"]
    assert data["check"]["passed"]
    assert data["sweeps"] >= 1
    assert set(data["seconds"]) == {"trace", "infer", "align", "rewrite", "verify"}
    assert bool(data["generated"]) == (name == "generated")


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sped_up("generated")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert not caplog.records


def test_the_input_forms_mean_the_same() -> None:
    value = inputs("bert")
    assert isinstance(value, dict)
    ids, mask = value["ids"], value["mask"]
    shapes = []
    for form in (value, (ids, mask), [ids, mask], (ids, {"mask": mask}), (value,)):
        model = dense("bert")
        ModelSpeedup(model, form, masks("bert")).speedup_model()
        shapes.append([tuple(p.shape) for p in model.parameters()])
        with torch.no_grad():
            assert relative_error(call(model, form), call(masked("bert"), form)) <= TOLERANCE
    assert all(other == shapes[0] for other in shapes)


def test_one_tensor_given_twice_stays_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc2(torch.relu(self.fc1(query))), query - 2 * key

    model, x = Two(), torch.randn(2, 6)
    rows = torch.ones(8)
    rows[:3] = 0
    ModelSpeedup(model, (x, x), {"fc2.weight": rows.expand(3, 8)}).speedup_model()
    assert model.fc1.out_features == 5


def test_a_meta_model_that_reads_a_number_of_its_own_making() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[0], device=x.device)
            return self.fc2(torch.relu(self.fc1(x))) if bool((positions.diff() == 1).all()) else x

    with torch.device("meta"):
        model = Reads()
    rows = torch.arange(8) >= 3
    ModelSpeedup(model, torch.randn(2, 6), {"fc1.weight": rows[:, None], "fc1.bias": rows}).speedup_model()
    assert (model.fc1.out_features, model.fc1.weight.device.type) == (5, "meta")
