"""Groups without a trace: every module's own rows, as NNI prunes when it is given no dummy input."""

from __future__ import annotations

import torch
from torch import nn

from maskprop.pruning.groups import Group, Groups, Member

_ROWS_FIRST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._NormBase)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def local_groups(model: nn.Module) -> Groups:
    """One group a Linear, convolution and batch norm: its outputs, with their biases.

    What is coupled is not known here, nor which module makes the model's outputs: exclude that one by name.

    Args:
        model: left as it is.
    """
    found = []
    for path, module in model.named_modules():
        transposed = isinstance(module, _TRANSPOSED)
        weight = module._parameters.get("weight")
        if weight is None or not (transposed or isinstance(module, _ROWS_FIRST)):
            continue
        axis = 1 if transposed and module.groups == 1 else 0
        if transposed and axis == 0:
            continue  # rows of a grouped transposed convolution are inputs
        count = weight.shape[axis]
        members = [_member(path, "weight", axis, weight.ndim, count, type(module))]
        if module._parameters.get("bias") is not None:
            members.append(_member(path, "bias", 0, 1, count, type(module)))
        if count > 1:
            found.append(Group(path, "channel", tuple(members), torch.arange(count)[None], model))
    return Groups(model, found, None)


def _member(path: str, key: str, axis: int, ndim: int, count: int, kind: type) -> Member:
    units = torch.arange(count).reshape([count if d == axis else 1 for d in range(ndim)])
    return Member(f"{path}.{key}".lstrip("."), axis, units, False, kind)
