"""Masks: read them from wherever they are, check them, and give them one form.

A mask is 1 where an element stays and 0 where it is pruned. It has the shape of its parameter or broadcasts
to it. What leaves this module is boolean, detached and named by the first name that the model has for the
parameter; it is *not* expanded, so the masks of whole rows of a large model stay small.
"""

from __future__ import annotations

import difflib
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize, prune

from maskprop.errors import (
    MaskConflictError,
    MaskDeviceError,
    MaskFileError,
    MaskShapeError,
    MaskValueError,
    NoMasksError,
    UnknownMaskError,
)
from maskprop.modules import modules_by_path, named_tensors

MaskDict: TypeAlias = Mapping[str, "Tensor | Mapping[str, Tensor | None] | None"]
MasksLike: TypeAlias = "str | os.PathLike[str] | MaskDict | None"

_ACTIVATION = re.compile(r"_(input|output)_\w+")
_PREFIXES = {"module.": "DistributedDataParallel adds it", "_orig_mod.": "torch.compile adds it"}
_FORMS = "Give {module: {parameter: mask}} or {'module.parameter': mask}."


@dataclass(frozen=True)
class Masks:
    """The masks of a model, checked and in one form.

    Attributes:
        parameters: boolean masks by `"module.parameter"`, each of a shape that broadcasts to the parameter's.
        activations: boolean masks by module path (`""` is the root) and NNI's target name: `_output_0` is the
            module's first output, `_input_x` the argument `x` of its `forward`. Shapes are not checked here:
            only a trace knows the activations.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    activations: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def load_masks(model: nn.Module, masks_file: MasksLike = None, map_location: str | torch.device | None = None) -> Masks:
    """Read, check and normalise masks for a model, which is not touched.

    Args:
        model: the model that the masks belong to.
        masks_file: a path (`.pt` and `.pth` are loaded with `weights_only=True`; `.safetensors`), or a dict
            `{module: {parameter: mask}}` or `{"module.parameter": mask}`; the root module is `""`, and `None`
            for a mask masks nothing. `None` instead of masks takes those that `torch.nn.utils.prune` left in
            the model.
        map_location: the device that the masks are moved to. Without it, masks from a file go to the device
            of their parameters, and masks from a dict must be there already. Parameters on the meta device
            take masks from any device.

    Returns:
        The masks, boolean and detached, under the first name that `model.named_parameters()` has for a
        parameter; those of `torch.nn.utils.prune` under the plain name (`weight`, not `weight_orig`).

    Raises:
        NoMasksError: `masks_file` is `None` and the model has no pruning masks.
        UnknownMaskError: a name is not that of a parameter.
        MaskShapeError: a mask does not broadcast to its parameter.
        MaskValueError: a mask is no dense tensor of zeros and ones.
        MaskDeviceError: a mask is on another device than its parameter.
        MaskConflictError: two names of one parameter have different masks.
        MaskFileError: the file is missing, unreadable, unsafe, or holds something else.
    """
    if masks_file is None:
        return _prune_masks(model)
    from_file = isinstance(masks_file, (str, os.PathLike))
    given = _read(Path(masks_file)) if isinstance(masks_file, (str, os.PathLike)) else masks_file
    names = _Names(model)
    masks = Masks()
    source: dict[str, str] = {}
    for module, target, mask in _entries(given):
        where = _join(module, target)
        if names.is_activation(module, target):
            if mask is not None:
                moved = mask if map_location is None else mask.to(map_location)
                masks.activations.setdefault(module, {})[target] = _as_bool(where, moved)
            continue
        canonical, parameter = names.parameter(module, target)
        if mask is None:
            continue
        boolean = _check(where, mask, parameter, map_location, move=from_file)
        other = masks.parameters.get(canonical)
        if other is not None and not _same(other, boolean, parameter):
            raise MaskConflictError(
                f"'{source[canonical]}' and '{where}' are one parameter, and their masks differ. "
                "Give one of them, or the same mask to both."
            )
        masks.parameters[canonical] = boolean
        source[canonical] = where
    return masks


def make_prune_permanent(model: nn.Module) -> None:
    """Turn every parameter that `torch.nn.utils.prune` masks back into a plain one that holds the zeros.

    It does what `torch.nn.utils.prune.remove` does for one parameter, without writing into the tensor that
    was there: each becomes a new `nn.Parameter`, so that another module or a copy that shares the old one
    keeps its values.

    Args:
        model: changed in place. A model without pruning masks is left as it is.
    """
    for _, module, name, hook_id in _pruned(model):
        pruned, mask = module._parameters[name + "_orig"], module._buffers[name + "_mask"]
        assert pruned is not None
        assert mask is not None
        plain = nn.Parameter(pruned.detach() * mask.to(pruned.dtype), requires_grad=pruned.requires_grad)
        del module._forward_pre_hooks[hook_id]
        del module._parameters[name + "_orig"], module._buffers[name + "_mask"]
        module.__dict__.pop(name, None)  # the product that the hook left there
        setattr(module, name, plain)  # not register_parameter: an RNN follows its weights by setattr


@contextmanager
def prune_masks_removed(model: nn.Module) -> Iterator[None]:
    """Make the model's pruning masks permanent; if what follows fails, put parameters, masks and hooks back."""
    tables: list[tuple[Any, Any]] = [
        (t, t.copy()) for m in model.modules() for t in (m.__dict__, m._parameters, m._buffers, m._forward_pre_hooks)
    ]
    make_prune_permanent(model)
    try:
        yield
    except BaseException:
        for table, before in tables:
            table.clear()
            table.update(before)
        raise


# --- reading ---------------------------------------------------------------------------------------------


def _read(path: Path) -> MaskDict:
    """The content of a file of masks, on the CPU."""
    if not path.is_file():
        missing = "that is a directory" if path.is_dir() else "there is no such file"
        raise MaskFileError(f"masks file '{path}': {missing}. Check the path.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise MaskFileError(
                f"masks file '{path}': not readable as safetensors ({error}). Save the masks again."
            ) from error
    if path.suffix not in (".pt", ".pth"):
        raise MaskFileError(
            f"masks file '{path}': the suffix is '{path.suffix}'; known are .pt, .pth and .safetensors. "
            "Rename the file, or load it yourself and pass a dict."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MaskFileError(
            f"masks file '{path}': it is damaged, or it holds more than tensors and containers, and loading "
            "such a file could run code. Save a dict of tensors with torch.save, or, if you trust the file, "
            "load it with torch.load(..., weights_only=False) and pass the dict."
        ) from error
    except Exception as error:  # what stands in a damaged file may raise anything
        raise MaskFileError(
            f"masks file '{path}': torch.load cannot read it ({type(error).__name__}: {error}). Save the masks again."
        ) from error
    if not isinstance(content, Mapping):
        raise MaskFileError(f"masks file '{path}': it holds a {type(content).__name__}, not a dict. {_FORMS}")
    return content


def _entries(given: MaskDict) -> Iterator[tuple[str, str, Tensor | None]]:
    """Module path, name within the module and mask of every entry of a nested, flat or mixed dict."""
    if not isinstance(given, Mapping):
        raise MaskValueError(f"the masks are a {type(given).__name__}, not a path or a dict. {_FORMS}")
    for key, value in given.items():
        if not isinstance(key, str):
            raise MaskValueError(f"the masks have the key {key!r} ({type(key).__name__}); keys are strings. {_FORMS}")
        if isinstance(value, Mapping):
            for target, mask in value.items():
                yield key, str(target), _as_tensor(_join(key, str(target)), mask)
        else:
            module, _, target = key.rpartition(".")
            yield module, target, _as_tensor(key, value)


def _as_tensor(where: str, mask: object) -> Tensor | None:
    if mask is None or isinstance(mask, Tensor):
        return mask
    raise MaskValueError(
        f"mask for '{where}' is a {type(mask).__name__}; a torch.Tensor is expected. Convert it with torch.as_tensor."
    )


def _prune_masks(model: nn.Module) -> Masks:
    """The masks that `torch.nn.utils.prune` keeps in the model."""
    masks = Masks()
    for path, module, name, _ in _pruned(model):
        where = _join(path, name)
        mask, parameter = module._buffers[name + "_mask"], module._parameters[name + "_orig"]
        assert mask is not None
        assert parameter is not None
        masks.parameters[where] = _check(where, mask, parameter, None, move=False)
    if not masks.parameters:
        raise NoMasksError(
            "no masks were given, and the model has none of torch.nn.utils.prune. Pass a path or a dict; an "
            f"empty dict masks nothing. {_FORMS}"
        )
    return masks


def _pruned(model: nn.Module) -> list[tuple[str, nn.Module, str, int]]:
    """Path, module, parameter name and hook of everything that `torch.nn.utils.prune` masks."""
    return [
        (path, module, hook._tensor_name, hook_id)
        for path, module in model.named_modules()
        for hook_id, hook in module._forward_pre_hooks.items()
        if isinstance(hook, prune.BasePruningMethod)
    ]


# --- checking one mask -----------------------------------------------------------------------------------


def _check(
    where: str, mask: Tensor, parameter: Tensor, map_location: str | torch.device | None, *, move: bool
) -> Tensor:
    """The boolean mask on the parameter's device, or an error."""
    if isinstance(parameter, UninitializedParameter):
        raise MaskShapeError(
            f"mask for '{where}' has shape {tuple(mask.shape)}; the parameter has no shape yet, its "
            "module is lazy. Run the model once first."
        )
    shape = tuple(parameter.shape)
    if not _broadcasts(tuple(mask.shape), shape):
        example = (*shape[:1], *(1 for _ in shape[1:]))
        raise MaskShapeError(
            f"mask for '{where}' has shape {tuple(mask.shape)}; the parameter has shape {shape}. "
            f"Give one entry an element, or a mask that broadcasts, such as {example}."
        )
    if map_location is not None:
        mask = mask.to(map_location)
    boolean = _as_bool(where, mask)
    if parameter.is_meta or boolean.device == parameter.device:
        return boolean
    if move and map_location is None:
        return boolean.to(parameter.device)
    raise MaskDeviceError(
        f"mask for '{where}' is on {boolean.device}; the parameter is on {parameter.device}. "
        f"Pass map_location='{parameter.device}', or move the mask."
    )


def _as_bool(where: str, mask: Tensor) -> Tensor:
    """A new boolean tensor, where the mask is a dense tensor of zeros and ones."""
    if mask.is_meta:
        raise MaskDeviceError(
            f"mask for '{where}' is on the meta device, which holds no values. Give a mask with values."
        )
    if mask.layout != torch.strided or mask.is_quantized or mask.is_complex():
        raise MaskValueError(
            f"mask for '{where}' has layout {mask.layout} and dtype {mask.dtype}; a dense boolean, integer "
            "or floating tensor is expected. Convert it with .to_dense() or .bool()."
        )
    mask = mask.detach()
    if mask.dtype == torch.bool:
        return mask.clone()
    boolean = mask != 0
    if torch.equal(boolean.to(mask.dtype), mask):
        return boolean
    wrong = boolean & (mask != 1)
    index = tuple(wrong.nonzero()[0].tolist())
    value = mask[index].item()
    advice = (
        "Compute the mask from finite scores."
        if value != value
        else "Scores are not masks: threshold them, for example mask = scores > threshold."
    )
    raise MaskValueError(
        f"mask for '{where}' has the value {value:g} at {index}; {int(wrong.sum())} of its {mask.numel()} "
        f"values are neither 0 (pruned) nor 1 (kept). {advice}"
    )


def _broadcasts(mask: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if len(mask) > len(shape):
        return False
    return all(m in (1, s) for m, s in zip(reversed(mask), reversed(shape), strict=False))


def _same(one: Tensor, other: Tensor, parameter: Tensor) -> bool:
    return torch.equal(one.expand(parameter.shape), other.expand(parameter.shape))


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


# --- names -----------------------------------------------------------------------------------------------


class _Names:
    """What can be masked in a model, by name, and what to say about a name that cannot."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = modules_by_path(model, aliases=True)
        tensors = dict(named_tensors(self.modules))
        self.parameters = {name: t for name, t in tensors.items() if isinstance(t, nn.Parameter)}
        self.buffers = tensors.keys() - self.parameters.keys()
        self.first = {id(parameter): name for name, parameter in reversed(self.parameters.items())}

    def is_activation(self, module: str, target: str) -> bool:
        named = _ACTIVATION.fullmatch(target) and _join(module, target) not in self.parameters
        return bool(named) and module in self.modules

    def parameter(self, module: str, target: str) -> tuple[str, nn.Parameter]:
        """First name and parameter for any of its names, or an `UnknownMaskError` with a way out."""
        name = _join(module, target)
        if name in self.parameters:
            parameter = self.parameters[name]
            return self.first[id(parameter)], parameter
        if module not in self.modules:
            raise UnknownMaskError(self._unknown_module(module))
        if name in self.buffers:
            raise UnknownMaskError(
                f"the masks name '{name}', which is a buffer; only parameters can be masked. Mask the "
                "parameters that produce the same channels: buffers shrink along with them."
            )
        if name + "_orig" in self.parameters:
            raise UnknownMaskError(
                f"the masks name '{name}', which torch.nn.utils.prune computes from '{name}_orig'. Call "
                "maskprop.make_prune_permanent(model) first, or pass no masks to use those in the model."
            )
        owner = self.modules[module]
        if parametrize.is_parametrized(owner, target) or isinstance(owner.__dict__.get(target), Tensor):
            raise UnknownMaskError(
                f"the masks name '{name}', which no parameter holds: a parametrization or a hook computes "
                "it. Make it plain first, for example with parametrize.remove_parametrizations."
            )
        if name in self.modules:
            own = [_join(name, key) for key, _ in self.modules[name].named_parameters(recurse=False)]
            raise UnknownMaskError(
                f"the masks name '{name}', which is a module; a mask is for one parameter, here {_quote(own)}. {_FORMS}"
            )
        own = [key for key, _ in owner.named_parameters(recurse=False)]
        raise UnknownMaskError(
            f"the masks name '{name}'; {_quote_module(module, owner)} has no parameter '{target}', "
            f"it has {_quote(own)}. {_advice(target, own)}"
        )

    def _unknown_module(self, name: str) -> str:
        start = f"the masks name '{name}', which the model does not have"
        rest = name
        while "." in rest:
            rest = rest.partition(".")[2]
            if rest in self.modules:
                prefix = name.removesuffix(rest)
                reason = f" ({_PREFIXES[prefix]})" if prefix in _PREFIXES else ""
                return f"{start}; it has '{rest}'. Strip the prefix '{prefix}'{reason}."
        longer = [path for path in self.modules if path.endswith("." + name)]
        if longer:
            return f"{start}; it has {_quote(longer)}. Add the prefix '{longer[0].removesuffix(name)}'."
        known = [path for path in self.modules if path]
        close = difflib.get_close_matches(name, known, n=3)
        return f"{start}; it has {_quote(close or known)}. {_advice(name, known)}"


def _quote_module(path: str, module: nn.Module) -> str:
    kind = type(module).__name__
    return f"'{path}' ({kind})" if path else f"the root module ({kind})"


def _quote(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _advice(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean '{close[0]}'?" if close else "Use the names of model.named_parameters()."
