"""Masks that stay on while a model trains, by ``torch.nn.utils.parametrize``.

A masked parameter is computed as ``original * mask`` whenever it is read. The optimiser sees the original,
whose
gradient is zero where the mask is; the mask is a buffer, so ``state_dict`` holds both. Such a model is
stored through
``state_dict``, not pickled: :func:`plain_state_dict` and :func:`masked_state_dict` convert from and to plain
checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskprop.errors import MaskingError
from maskprop.masks import MasksLike, load_masks
from maskprop.rewrite.edits import owner_of
from maskprop.wrappers import find_wrapper

_KEY = re.compile(r"(.*?)parametrizations\.(\w+)\.(original|\d+\.mask)$")


class Mask(nn.Module):
    """The parametrisation: multiplies by a mask.

    Args:
        mask: bool, broadcasts to the parameter.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, original: Tensor) -> Tensor:
        """``original * mask``, in the original's dtype."""
        return original * self.mask.to(original.dtype)


def apply_masks(model: nn.Module, masks: MasksLike) -> None:
    """Keep masks on a model's parameters while it trains; masks that are on already are replaced.

    The tensors stay where they are: an optimiser that holds a parameter still does.

    Args:
        model: changed in place.
        masks: see :func:`maskprop.load_masks`.

    Raises:
        MaskingError: the model is wrapped for several processes or compiled, or a parameter is computed
        already.
        MaskError: the masks do not fit.
    """
    refuse_wrappers(model)
    before = applied_masks(model)
    found = _load(model, masks)
    for name in found:
        module, key = owner_of(model, name)
        if name not in before and (parametrize.is_parametrized(module, key) or key not in module._parameters):
            raise MaskingError(
                f"'{name}' is computed already (by a parametrization or a hook), so a mask cannot be put "
                "on it. Make it plain first."
            )
    named: set[Mask] = set()
    for name, mask in found.items():
        module, key = owner_of(model, name)
        if name in before:
            _set_mask(module, key, mask)
        else:
            holder = Mask(mask.clone())
            for owner, own in _holders(model, module._parameters[key]):
                parametrize.register_parametrization(owner, own, holder)
        named.add(_mask_of(module, key))
    for name in before:
        module, key = owner_of(model, name)
        if _mask_of(module, key) not in named:
            _set_mask(module, key, torch.ones_like(before[name]))


def applied_masks(model: nn.Module) -> dict[str, Tensor]:
    """Masks that are on the model, by parameter name."""
    return {
        f"{path}.{key}".lstrip("."): _mask_of(module, key).mask
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for key in _parametrizations(module)
        if _has_mask(module, key)
    }


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their plain names, whether masks are applied to them or not."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        masked = isinstance(module, parametrize.ParametrizationList) and any(isinstance(m, Mask) for m in module)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owner, _, name = path.rpartition(".") if masked else (path, "", key)
                owner = owner.removesuffix("parametrizations").rstrip(".") if masked else owner
                found[f"{owner}.{name}".lstrip(".")] = parameter
    return found


def remove_masks(model: nn.Module, *, bake: bool = True) -> dict[str, dict[str, Tensor]]:
    """Take the masks off; the parameters are plain again, the same objects as before.

    Args:
        model: changed in place.
        bake: leave zeros where the masks are; else the values that the masks hid come back.

    Returns:
        The masks, ``{module: {parameter: mask}}``.

    Raises:
        MaskingError: the model is wrapped or compiled.
    """
    refuse_wrappers(model)
    found: dict[str, dict[str, Tensor]] = {}
    for name, mask in applied_masks(model).items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        original = _parametrizations(module)[key].original
        if bake:
            with torch.no_grad():
                original.mul_(mask.to(original.dtype))
        make_plain(module, key)
        found.setdefault(path, {})[key] = mask
    return found


def plain_state_dict(state: Mapping[str, Tensor], *, bake: bool = True) -> dict[str, Tensor]:
    """A masked model's ``state_dict`` under plain names, for a model without masks.

    Args:
        state: of a model with masks applied.
        bake: multiply by the masks.
    """
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _KEY.match(key)
        if match is None:
            plain[key] = value
        elif match[3] == "original":
            mask = state.get(key.replace(".original", ".0.mask"))
            plain[match[1] + match[2]] = value * mask.to(value.dtype) if bake and mask is not None else value
    return plain


def masked_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A plain checkpoint under the names of a model with masks applied, with the model's masks.

    Args:
        state: of a model without masks.
        model: the masked model that is to load it.
    """
    masks = applied_masks(model)
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in masks:
            found[name] = value
            continue
        path, _, key = name.rpartition(".")
        prefix = f"{path}.parametrizations.{key}.".lstrip(".")
        found |= {f"{prefix}original": value, f"{prefix}0.mask": masks[name]}
    return found


def make_plain(module: nn.Module, key: str) -> None:
    """Take a parametrisation off; what is stored stays.

    ``parametrize`` deletes the property from the module's class, which ``deepcopy`` shares with copies (of a moving
    average, say): they would lose it, too. So the class is made the module's own first.
    """
    shared = type(module)
    own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)
    parametrize.remove_parametrizations(module, key, leave_parametrized=False)


def refuse_masks(model: nn.Module) -> None:
    """Raise if masks are on a model.

    Raises:
        MaskingError: they are.
    """
    for name in applied_masks(model):
        raise MaskingError(
            f"'{name}' has a mask on, so that the model's parameters are not where they were. Take the masks off with "
            "unwrap_model() or remove_masks(model) first; to prune more while they are on, use a schedule."
        )


def _holders(model: nn.Module, parameter: nn.Parameter | None) -> list[tuple[nn.Module, str]]:
    """All places of a parameter: tied weights have several."""
    return [(m, key) for m in model.modules() for key, own in m._parameters.items() if own is parameter]


def _load(model: nn.Module, masks: MasksLike) -> dict[str, Tensor]:
    """Checked masks by parameter name; those that are on already are seen through."""
    if not applied_masks(model):
        return load_masks(model, masks).parameters
    return load_masks(_plain(model), masks).parameters


def _plain(model: nn.Module) -> nn.Module:
    """A skeleton of a masked model with plain parameter names, for checking masks against."""
    skeleton = nn.Module()

    def at(path: str) -> nn.Module:
        module = skeleton
        for part in path.split(".") if path else []:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module

    for path, _ in model.named_modules(remove_duplicate=False):
        if "parametrizations" not in path.split("."):
            at(path)
    for name, parameter in named_weights(model).items():
        path, _, key = name.rpartition(".")
        at(path).register_parameter(key, parameter)
    return skeleton


def _parametrizations(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrised tensors of a module, by name."""
    found = module.parametrizations
    assert isinstance(found, nn.ModuleDict)
    return {key: value for key, value in found.items() if isinstance(value, parametrize.ParametrizationList)}


def _has_mask(module: nn.Module, key: str) -> bool:
    return any(isinstance(p, Mask) for p in _parametrizations(module)[key])


def _mask_of(module: nn.Module, key: str) -> Mask:
    return next(p for p in _parametrizations(module)[key] if isinstance(p, Mask))


def _set_mask(module: nn.Module, key: str, mask: Tensor) -> None:
    """In place where the shape allows, so that compiled code need not be compiled again."""
    holder = _mask_of(module, key)
    if holder.mask.shape == mask.shape:
        holder.mask.copy_(mask)
    elif torch.broadcast_shapes(holder.mask.shape, mask.shape) == holder.mask.shape:
        holder.mask.copy_(mask.expand(holder.mask.shape))
    else:
        holder.mask = mask.clone()


def refuse_wrappers(model: nn.Module) -> None:
    """Raise for what is wrapped for several processes or compiled.

    Raises:
        MaskingError: it is.
    """
    wrapper = find_wrapper(model)
    if wrapper is not None:
        raise MaskingError(
            f"{wrapper[0]}. Masks are put on and taken off the plain model: do it before wrapping, or gradients go "
            "out of sync between processes; change masks by a schedule made on the plain model."
        )
