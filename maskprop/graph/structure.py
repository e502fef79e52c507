"""Nested inputs and outputs: find and replace the tensors in them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any, path: str = "", kind: type = Tensor) -> Iterator[tuple[str, Any]]:
    """Yield ``(path, tensor)`` for every tensor in nested tuples, lists, mappings and dataclasses.

    Other objects (a key-value cache, say) are opaque: they carry state, not results. ``kind`` finds something else
    in place of tensors.
    """
    if isinstance(value, kind):
        yield path, value
        return
    for key, child in _children(value):
        yield from tensors_in(child, f"{path}.{key}" if path else str(key), kind)


def map_tensors(value: Any, fn: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Rebuild ``value`` with ``fn`` applied to each tensor that :func:`tensors_in` finds."""
    if isinstance(value, kind):
        return fn(value)
    if type(value) is tuple:
        return tuple([map_tensors(v, fn, kind) for v in value])
    if type(value) is dict:
        return {k: map_tensors(v, fn, kind) for k, v in value.items()}
    if isinstance(value, Mapping):
        rebuilt: Any = copy.copy(value)
        for key, child in value.items():
            rebuilt[key] = map_tensors(child, fn, kind)
        return rebuilt
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        named: Any = type(value)
        return named._make(map_tensors(v, fn, kind) for v in value)  # past checks that a constructor may do
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(v, fn, kind) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: map_tensors(getattr(value, f.name), fn, kind) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changes)
    return value


def map_each_once(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """:func:`map_tensors`, where a tensor that stands in two places stays one."""
    made: dict[int, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = fn(tensor)
        return made[id(tensor)]

    return map_tensors(value, once)


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield f.name, getattr(value, f.name, None)
