"""What a recorded call is told besides its tensors: numbers to compute with, and settings such as a stride."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

# Types of arguments that may hold a number to compute with.
_NUMBERS = ("Tensor", "number", "float", "Optional[number]", "Optional[float]")
# Types of arguments that are whole numbers: settings, unless they say how large something is.
_WHOLE = ("int", "List[int]", "Optional[int]", "Optional[List[int]]")
# Arguments of type int that the plan has numbers for.
_COUNTS = {(torch.ops.aten.native_group_norm.default, "group")}
_SIZES = {
    "size", "shape", "output_size", "normalized_shape", "groups", "group", "N", "C", "HxW", "split_size", "split_sizes",
    "chunks", "sections", "num_classes", "repeats", "pad", "n", "m", "steps", "start", "end", "index",
}  # fmt: skip

# Sizes that the shape of the result shows.
_SHOWN = {
    "size",
    "shape",
    "output_size",
    "normalized_shape",
    "N",
    "C",
    "HxW",
    "split_size",
    "split_sizes",
    "end",
    "groups",
}

Argument = tuple[int, str, Any]


@functools.cache
def number_arguments(op: OpOverload) -> list[Argument]:
    """Arguments that hold a number to compute with: position, name and default."""
    return _arguments(op, lambda kind, name: kind in _NUMBERS or (op, name) in _COUNTS)


@functools.cache
def _setting_arguments(op: OpOverload) -> list[Argument]:
    if op.namespace != "aten":  # what others call their sizes is not known
        return []
    return _arguments(op, lambda kind, name: kind in _WHOLE and name not in _SIZES)


@functools.cache
def size_positions(op: OpOverload) -> frozenset[int]:
    """Positions of the arguments that say how large something is, where the shape of the result shows that."""
    return frozenset(i for i, name, _ in _arguments(op, lambda kind, name: kind in _WHOLE and name in _SHOWN))


def _arguments(op: OpOverload, wanted: Callable[[str, str], bool]) -> list[Argument]:
    return [
        (i, a.name, a.default_value if a.has_default_value() else None)
        for i, a in enumerate(op._schema.arguments)
        if wanted(str(a.real_type), a.name)
    ]


def settings_of(node: fx.Node) -> dict[str, Any]:
    """The whole numbers that a call is given and that are no sizes, by name: they are the same in the compact model."""
    return {
        name: node.args[i] if i < len(node.args) else node.kwargs.get(name, default)
        for i, name, default in _setting_arguments(node.target)
    }
