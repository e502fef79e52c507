"""Masks from and to other tools: ``torch.nn.utils.prune``, NNI's files, 2:4 semi-structured sparsity."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from maskprop.errors import MaskFileError, MaskingError, SelectorError
from maskprop.masks import MasksLike, load_masks
from maskprop.pruning.removal import NestedMasks
from maskprop.rewrite.edits import owner_of


def to_torch_prune(model: nn.Module, masks: MasksLike) -> nn.Module:
    """Put masks on a model as ``torch.nn.utils.prune`` does: ``weight_orig``, ``weight_mask`` and a hook.

    Args:
        model: changed in place.
        masks: see :func:`maskprop.load_masks`.

    Returns:
        The model.
    """
    for name, mask in load_masks(model, masks).parameters.items():
        module, key = owner_of(model, name)
        parameter = module._parameters[key]
        assert parameter is not None
        prune.custom_from_mask(module, key, mask.expand(parameter.shape).to(parameter))
    return model


def from_torch_prune(model: nn.Module) -> NestedMasks:
    """The masks that ``torch.nn.utils.prune`` left in a model, which is not touched.

    Raises:
        NoMasksError: there are none.
    """
    return nested(load_masks(model).parameters)


def nested(flat: Mapping[str, Tensor]) -> NestedMasks:
    """``{"module.parameter": mask}`` as ``{module: {parameter: mask}}``."""
    found: NestedMasks = {}
    for name, mask in flat.items():
        path, _, key = name.rpartition(".")
        found.setdefault(path, {})[key] = mask
    return found


def save_nni_masks(path: str | os.PathLike[str], model: nn.Module, masks: MasksLike) -> None:
    """Write masks as NNI does: ``torch.save`` of ``{module: {parameter: mask}}``, full-size 0/1 floats.

    A path that ends in ``.safetensors`` gets ``{"module.parameter": mask}`` in that form.

    Raises:
        MaskFileError: the file cannot be written, or its suffix is none that :func:`maskprop.load_masks` reads.
    """
    file = Path(path)
    if file.suffix not in (".pt", ".pth", ".safetensors"):
        raise MaskFileError(
            f"masks file '{file}': the suffix is '{file.suffix}'; known are .pt, .pth and .safetensors. Choose one."
        )
    parameters = dict(model.named_parameters())
    full = {
        n: m.expand(parameters[n].shape).float().cpu().contiguous()
        for n, m in load_masks(model, masks).parameters.items()
    }
    try:
        if file.suffix == ".safetensors":
            save_file(full, file)
        else:
            torch.save(nested(full), file)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise MaskFileError(f"masks file '{file}': it cannot be written ({error}). Choose another place.") from error


def semi_structured_masks(model: nn.Module, *, ignore: Iterable[str] = ()) -> NestedMasks:
    """2:4 masks: of every four neighbours in a Linear's row the two largest stay.

    Source: Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, arXiv:2104.08378.

    Args:
        model: left as it is.
        ignore: globs over module paths.

    Returns:
        Masks of every Linear whose rows can be cut in fours.

    Raises:
        SelectorError: no Linear is left.
    """
    patterns, found = list(ignore), {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module.in_features % 4 or any(fnmatchcase(path, p) for p in patterns):
            continue
        blocks = module.weight.detach().abs().reshape(-1, 4)
        keep = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, blocks.topk(2, dim=1).indices, True)
        found[path] = {"weight": keep.reshape(module.weight.shape)}
    if not found:
        raise SelectorError(
            "2:4 masks need a Linear whose inputs are a multiple of four; the model has none that is not ignored."
        )
    return found


class SemiStructuredReplacer:
    """Stores 2:4 weights compressed, on a GPU that multiplies them so.

    The last step: ``SemiStructuredReplacer().replace_modules(speedup)`` after ``speedup.speedup_model()``.
    The converted weights do not train.
    """

    def replace_modules(self, speedup: object) -> None:
        """Convert every Linear of ``speedup.model`` whose weight is 2:4 sparse.

        Raises:
            MaskingError: the GPU, or the build of torch, has no semi-structured kernels. Nothing is changed.
        """
        model: nn.Module = speedup.model  # type: ignore[attr-defined]
        linears = [m for m in model.modules() if isinstance(m, nn.Linear) and is_semi_structured(m.weight)]
        for module in linears:
            _require_kernels(module.weight)
        for module in linears:
            sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
            module.weight = nn.Parameter(sparse, requires_grad=False)


def is_semi_structured(weight: Tensor) -> bool:
    """Whether at most two of every four neighbours are not zero."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.detach().reshape(-1, 4) != 0).sum(1) <= 2).all())


def _require_kernels(weight: Tensor) -> None:
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise MaskingError(
            "2:4 sparse weights need a CUDA GPU of compute capability 8.0 or more; this one is on "
            f"{weight.device}. "
            "Leave the replacer out: the masked weights are right anywhere."
        )
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.int8):
        raise MaskingError(
            f"2:4 sparse weights are float16, bfloat16 or int8; this one is {weight.dtype}. Convert the model first."
        )
