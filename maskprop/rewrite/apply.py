"""Apply a plan to a model's tensors: mask, slice, add constants, new biases, leaf attributes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskprop.align.plan import AttributeChange, Plan
from maskprop.errors import PlanError
from maskprop.modules import modules_by_path
from maskprop.rewrite.authored import Patch, places_of_setting
from maskprop.rewrite.edits import Edits, owner_of
from maskprop.rewrite.leaves import following, update_leaves
from maskprop.rewrite.patched import patched_class

# Under these names modules hold the configuration that they share with their model.
CONFIGS = ("config", "cfg", "args", "params")


def apply_plan(edits: Edits, plan: Plan, masks: Mapping[str, Tensor]) -> None:
    """Make the model's tensors compact and its leaf modules agree with them.

    Args:
        edits: the model and its undo log.
        plan: what stays.
        masks: applied to what stays, by tensor name.

    Raises:
        PlanError: the plan names a tensor that the model does not have, or of another shape.
    """
    modules = modules_by_path(edits.model, aliases=True)
    follows = following(modules, plan)
    apply_tensors(edits, modules, plan, masks)
    update_leaves(edits, modules, plan, follows)
    for change in plan.attributes:
        change_attribute(edits, change)


def change_attribute(edits: Edits, change: AttributeChange) -> None:
    """Set an attribute of a module.

    A config is shared with other modules, and stays so: where the forward reads the setting, it gets the new number
    instead. Where that cannot be found in the author's code, the module gets a copy of the config.
    """
    module = edits.model.get_submodule(change.module)
    holder, _, name = change.attribute.rpartition(".")
    if holder not in CONFIGS:
        edits.set_attribute(module, change.attribute, change.new)
        return
    places = [] if hasattr(type(module), "generated_source") else places_of_setting(type(module), change.attribute)
    if places:
        new = tuple(change.new) if isinstance(change.new, list) else change.new  # patches are compared by hash
        patches = tuple(Patch(place, "setting", change.attribute, new) for place in places)
        edits.set_class(module, patched_class(type(module), patches))
        return
    config = copy.copy(getattr(module, holder))
    setattr(config, name, change.new)
    edits.set_attribute(module, holder, config)


def apply_tensors(edits: Edits, modules: Mapping[str, nn.Module], plan: Plan, masks: Mapping[str, Tensor]) -> None:
    """Slice, mask and add; see :func:`apply_plan`. ``modules``: the model's, by all of their paths."""
    for name in dict.fromkeys([*plan.keep, *masks, *(a.name for a in plan.add)]):
        path, _, key = name.rpartition(".")
        try:
            tensor = getattr(modules[path], key)
        except (KeyError, AttributeError) as error:
            raise PlanError(
                f"the plan changes '{name}', which the model does not have. Build the architecture that the "
                "plan was made from."
            ) from error
        edits.set_data(tensor, compact_tensor(plan, name, tensor, masks))
    for name, value in plan.new_bias.items():
        module, key = owner_of(edits.model, name)
        like = next(p for p in module.parameters(recurse=False))
        bias = nn.Parameter(value.to(like), requires_grad=like.requires_grad)
        edits.set_parameter(module, key, bias)


def compact_tensor(plan: Plan, name: str, tensor: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """What becomes of one tensor of the model: sliced, masked, with its constants; detached.

    Raises:
        PlanError: the tensor has another shape than the plan was made for.
    """
    with torch.no_grad():
        data = tensor.detach()
        sliced = plan.slice(name, data) if name in plan.keep else data
        if name in masks:
            mask = _sliced_mask(plan, name, masks[name].to(data.device), data).bool()
            if mask.is_meta or not bool(mask.all()):
                sliced = torch.where(mask, sliced, torch.zeros((), dtype=sliced.dtype, device=sliced.device))
        for add in plan.add:
            if add.name == name:
                sliced = _added(sliced, add.value, add.axis, add.at)
    return sliced


def _sliced_mask(plan: Plan, name: str, mask: Tensor, tensor: Tensor) -> Tensor:
    """The part of a mask that belongs to what stays; axes along which it does not vary need no slicing."""
    if name not in plan.keep:
        return mask
    mask = mask.reshape((1,) * (tensor.ndim - mask.ndim) + mask.shape)
    keeps = plan.keep[name]
    if any(k.over for k in keeps):
        return plan.slice(name, mask.expand(tensor.shape))
    for keep in keeps:
        if mask.shape[keep.axis] > 1:
            mask = mask.index_select(keep.axis, keep.index.to(mask.device))
    return mask


def _added(tensor: Tensor, value: Tensor, axis: int | None, at: int) -> Tensor:
    """``tensor + value`` (at one slice), rounded once."""
    if axis is None:
        return (tensor.double() + value.to(tensor.device)).to(tensor.dtype)
    tensor = tensor.clone()
    part = tensor.select(axis, at)
    part.copy_((part.double() + value.to(tensor.device)).to(tensor.dtype))
    return tensor
