"""The nastiest of the small models once more: under every option, with masks of every form, and afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_torture import shapes, tensors
from torch import nn
from torch.nn.utils import prune
from torture import ALL, Index, Shapes, Subject

from benchmarks.zoo.check import relative_error
from benchmarks.zoo.check import tensors as outputs_of
from benchmarks.zoo.specimen import call
from maskprop import ModelSpeedup

HARD = (
    *("CrossAttn", "FusedQKV", "GQAEnable", "UnequalSplit", "ShuffleBothModule", "SwiGLUFused", "CarrierTwo"),
    *("SliceWrite", "BiLstm", "TiedNamed", "GroupsPlain", "TwiceSame", "BatchTimesHeads"),
)


def sped_up(subject: Subject, masks: Any = None, **options: Any) -> ModelSpeedup:
    """Done, and equal to the masked model at every batch size."""
    masks = subject.masks if masks is None else masks
    speedup = ModelSpeedup(subject.model, subject.inputs(), masks, tracer=subject.case.tracer, **options)
    speedup.speedup_model()
    return speedup


@torch.no_grad()
def error(subject: Subject) -> float:
    """The largest over all batch sizes."""
    inputs = [subject.inputs(batch) for batch in subject.case.batches]
    return max(relative_error(call(subject.model, x), call(subject.masked, x)) for x in inputs)


# --- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [4, 8])
@pytest.mark.parametrize("name", HARD)
def test_widths_are_multiples_and_everything_is_exact(name: str, multiple: int) -> None:
    subject = Subject(name)
    speedup = sped_up(subject, channel_multiple=multiple)
    assert error(subject) <= subject.case.tol
    for key, keeps in speedup.plan.keep.items():
        for keep in keeps:
            assert keep.over or keep.count % multiple == 0, f"{key}: {keep.count} along axis {keep.axis}"


COLUMNS = [0, 1, 4]
# What reads the constants that the pruned units of a case leave behind, and what is left where they need no carrier.
READERS: dict[str, tuple[dict[str, Index], Shapes]] = {
    "CarrierTwo": (
        {"b.weight": (ALL, COLUMNS), "c.weight": (ALL, COLUMNS)},
        {"a.weight": (5, 3, 1, 1), "a.bias": (5,), "b.weight": (4, 5, 3, 3), "c.weight": (4, 5, 3, 3)},
    ),
    "CarrierInterp": (
        {"b.weight": (ALL, COLUMNS)},
        {"a.weight": (5, 3, 1, 1), "a.bias": (5,), "b.weight": (4, 5, 3, 3)},
    ),
    "NewBias": (
        {"b.weight": (ALL, COLUMNS)},
        {"a.weight": (5, 3, 1, 1), "a.bias": (5,), "b.weight": (4, 5, 3, 3)},
    ),
    "TwoConsumers": (
        {"b.weight": (ALL, COLUMNS), "c.weight": (ALL, COLUMNS)},
        {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5), "c.weight": (4, 5)},
    ),
    "Reflect": (
        {"b.weight": (ALL, COLUMNS)},
        {"a.weight": (5, 3, 1, 1), "a.bias": (5,), "b.weight": (4, 5, 3, 3)},
    ),
}
PADDED = ("CarrierTwo", "CarrierInterp")


def changed(subject: Subject, before: Shapes) -> Shapes:
    return {key: shape for key, shape in shapes(subject.model).items() if before.get(key) != shape}


@pytest.mark.parametrize("name", READERS)
def test_dropped_constants_are_all_that_differs(name: str) -> None:
    """The result is the masked model whose readers are blind to the units that left."""
    readers, left = READERS[name]
    subject = Subject(name, more=readers)
    before = shapes(subject.model)
    speedup = sped_up(subject, constants="drop")
    assert changed(subject, before) == left
    assert not speedup.plan.new_bias
    assert not speedup.plan.add
    assert error(subject) <= subject.case.tol
    dense = Subject(name)
    with torch.no_grad():
        x = dense.inputs(3)
        assert relative_error(call(subject.model, x), call(dense.masked, x)) > 1e-2, "the constants were something"


@pytest.mark.parametrize("name", READERS)
def test_folded_constants_need_no_carrier_and_are_exact_without_padding(name: str) -> None:
    subject = Subject(name)
    before = shapes(subject.model)
    speedup = sped_up(subject, constants="fold")
    made = {key: tuple(value.shape) for key, value in speedup.plan.new_bias.items()}
    assert changed(subject, before) == READERS[name][1] | made
    assert (error(subject) > subject.case.tol) == (name in PADDED)
    if name in PADDED:  # the border is all that is wrong
        dropped = Subject(name)
        sped_up(dropped, constants="drop")
        assert error(subject) < error(dropped)


# --- masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["NNI's file", "safetensors", "prune"])
@pytest.mark.parametrize("name", ["FusedQKV", "UnequalSplit", "SliceWrite", "GroupsPlain", "BiLstm"])
def test_masks_of_every_form_do_the_same(name: str, form: str, tmp_path: Path) -> None:
    expected = Subject(name)
    sped_up(expected)
    subject = Subject(name)
    masks: Any = {}
    if form == "NNI's file":  # a dict a module, floats of the parameter's shape, None where nothing is masked
        for key, mask in subject.masks.items():
            path, _, parameter = key.rpartition(".")
            own = subject.model.get_submodule(path).named_parameters(recurse=False)
            masks.setdefault(path, {key: None for key, _ in own})[parameter] = mask.float()
        torch.save(masks, tmp_path / "mask.pth")
        masks = str(tmp_path / "mask.pth")
    elif form == "safetensors":
        save_file({key: mask.to(torch.uint8) for key, mask in subject.masks.items()}, tmp_path / "mask.safetensors")
        masks = tmp_path / "mask.safetensors"
    else:
        for key, mask in subject.masks.items():
            path, _, parameter = key.rpartition(".")
            prune.custom_from_mask(subject.model.get_submodule(path), parameter, mask)
    speedup = ModelSpeedup(subject.model, subject.inputs(), None if form == "prune" else masks)
    speedup.speedup_model()
    assert error(subject) <= subject.case.tol
    ours, theirs = tensors(subject.model), tensors(expected.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[key]) for key, t in ours.items())


# --- afterwards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARD)
def test_it_trains(name: str) -> None:
    """In train mode: the parameters that had a gradient have one of their new shape, and a step helps."""
    subject = Subject(name)
    sped_up(subject)
    x = subject.inputs(3)

    def loss(model: nn.Module) -> torch.Tensor:
        return sum(((y - 1) ** 2).mean() for y in outputs_of(call(model, x)))  # type: ignore[return-value]

    def with_gradients(model: nn.Module) -> set[str]:
        return {key for key, p in model.named_parameters() if p.grad is not None and p.grad.shape == p.shape}

    model = subject.model.train()
    first = loss(model)
    first.backward()
    loss(subject.masked.train()).backward()
    assert with_gradients(model) == with_gradients(subject.masked)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert loss(model) < first


@pytest.mark.parametrize("name", ["FusedQKV", "UnequalSplit", "SwiGLUFused", "SliceWrite", "ShuffleBothModule"])
def test_it_compiles_whole_and_exports(name: str) -> None:
    subject = Subject(name)
    sped_up(subject)
    model: nn.Module = subject.model
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3):
            x = subject.inputs(batch)
            assert relative_error(call(compiled, x), call(subject.masked, x)) <= subject.case.tol
        program = torch.export.export(model, (x,)).module()
        assert relative_error(call(program, x), call(subject.masked, x)) <= subject.case.tol
    torch._dynamo.reset()
