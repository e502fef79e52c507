"""Nested inputs and outputs: find and replace the tensors in them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield ``(path, tensor)`` for every tensor in nested tuples, lists, mappings and dataclasses.

    Other objects (a key-value cache, say) are opaque: they carry state, not results.
    """
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, child in _children(value):
        yield from tensors_in(child, f"{path}.{key}" if path else str(key))


def map_tensors(value: Any, fn: Callable[[Tensor], Any]) -> Any:
    """Rebuild ``value`` with ``fn`` applied to each tensor that :func:`tensors_in` finds."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        if type(value) is dict:
            return {k: map_tensors(v, fn) for k, v in value.items()}
        rebuilt = copy.copy(value)
        for key, child in value.items():
            rebuilt[key] = map_tensors(child, fn)
        return rebuilt
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, fn) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(v, fn) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            f.name: map_tensors(getattr(value, f.name), fn) for f in dataclasses.fields(value) if f.init
        }
        return dataclasses.replace(value, **changes)
    return value


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
