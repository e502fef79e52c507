"""Masks from and to torch.nn.utils.prune and NNI's files, and 2:4 masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from maskprop import ModelSpeedup, load_masks
from maskprop.errors import MaskFileError, MaskingError, SelectorError
from maskprop.pruning import (
    L1NormPruner,
    SemiStructuredReplacer,
    from_torch_prune,
    save_nni_masks,
    semi_structured_masks,
    to_torch_prune,
)
from maskprop.pruning.interop import is_semi_structured

X = torch.randn(4, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))


def test_to_and_from_torch_prune() -> None:
    model = network()
    masks = L1NormPruner(model, 0.5, dummy_input=X).prune().masks
    to_torch_prune(model, masks)
    assert prune.is_pruned(model)
    found = from_torch_prune(model)
    for path, own in masks.items():
        for key, mask in own.items():
            assert torch.equal(found[path][key], mask.expand_as(found[path][key]))
    expected = model(X).detach()
    ModelSpeedup(model, X).speedup_model()
    assert model[0].weight.shape == (6, 8)
    assert (model(X) - expected).norm() <= 1e-6 * expected.norm()


def test_nni_mask_files(tmp_path: Path) -> None:
    model = network()
    masks = L1NormPruner(model, 0.5, dummy_input=X).prune().masks
    save_nni_masks(tmp_path / "masks.pth", model, masks)
    written = torch.load(tmp_path / "masks.pth", weights_only=True)
    assert written["0"]["weight"].shape == (12, 8)
    assert written["0"]["weight"].dtype == torch.float32
    assert load_masks(model, tmp_path / "masks.pth").parameters.keys() == load_masks(model, masks).parameters.keys()
    save_nni_masks(tmp_path / "masks.safetensors", model, masks)
    read = load_masks(model, tmp_path / "masks.safetensors").parameters
    assert read.keys() == load_masks(model, masks).parameters.keys()
    ModelSpeedup(model, X, str(tmp_path / "masks.pth")).speedup_model()
    assert model[2].weight.shape == (3, 6)
    with pytest.raises(MaskFileError, match=r"the suffix is '\.npz'; known are"):
        save_nni_masks(tmp_path / "masks.npz", model, {})
    with pytest.raises(MaskFileError, match="cannot be written"):
        save_nni_masks(tmp_path / "nowhere" / "masks.pth", model, {})


def test_two_of_four() -> None:
    model = network()
    masks = semi_structured_masks(model, ignore=["2"])
    assert set(masks) == {"0"}  # "4" has 6 inputs
    keep = masks["0"]["weight"].reshape(-1, 4)
    assert bool((keep.sum(1) == 2).all())
    blocks = model[0].weight.detach().abs().reshape(-1, 4)
    assert bool((blocks.masked_fill(~keep, torch.inf).amin(1) >= blocks.masked_fill(keep, 0).amax(1)).all())
    masked = model[0].weight.detach() * masks["0"]["weight"]
    assert is_semi_structured(masked)
    assert not is_semi_structured(model[0].weight)
    with pytest.raises(SelectorError, match="2:4 masks need a Linear whose inputs are a multiple of four"):
        semi_structured_masks(nn.Linear(6, 4))


def test_replacer_needs_kernels() -> None:
    model = network()
    masks = semi_structured_masks(model)
    speedup = ModelSpeedup(model, X, masks)
    expected = speedup.speedup_model()(X).detach()
    with pytest.raises(MaskingError, match=r"need a CUDA GPU of compute capability 8.0 or more; this one is on cpu"):
        SemiStructuredReplacer().replace_modules(speedup)
    assert torch.equal(model(X), expected)
