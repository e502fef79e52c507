"""A recorded call as the rules see it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from maskprop.graph.graph import TensorMeta, shape_of


@functools.cache
def signature(target: OpOverload) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of an overload's arguments in order, and the defaults of those that have one."""
    arguments = target._schema.arguments
    return tuple(a.name for a in arguments), {a.name: a.default_value for a in arguments if a.has_default_value()}


class Op:
    """One node of the graph: its tensor inputs by position, its other arguments by name.

    Attributes:
        node: the fx node.
        target: the ATen overload.
        inputs: the nodes of the tensor arguments in order, those in lists flattened, repeats kept.
        shapes: their shapes.
        memo: for what a rule works out more than once.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        assert isinstance(node.target, OpOverload)
        self.target: OpOverload = node.target
        self.inputs: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), self.inputs.append)
        self.shapes = [shape_of(n) for n in self.inputs]
        self.memo: dict[str, Any] = {}

    @property
    def path(self) -> str:
        """Path of the module that made the call."""
        return str(self.node.meta["path"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result (of an op with one result)."""
        return shape_of(self.node)

    @property
    def results(self) -> tuple[TensorMeta | None, ...]:
        """Metadata of every result."""
        meta = self.node.meta["tensor"]
        return meta if isinstance(meta, tuple) else (meta,)

    @property
    def several(self) -> bool:
        """Whether the op returns a tuple or list."""
        return isinstance(self.node.meta["tensor"], tuple)

    @cached_property
    def _named(self) -> dict[str, Any]:
        names, defaults = signature(self.target)
        return {**defaults, **dict(zip(names, self.node.args, strict=False)), **self.node.kwargs}

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name; a node where a tensor was given."""
        return self._named.get(name, default)

    @cached_property
    def _positions(self) -> dict[str, int]:
        before, found = 0, {}
        for argument in signature(self.target)[0]:
            value = self._named.get(argument)
            if isinstance(value, fx.Node):
                found[argument] = before
                before += 1
            elif isinstance(value, (list, tuple)):
                before += sum(isinstance(v, fx.Node) for v in value)
        return found

    def position(self, name: str) -> int | None:
        """Where a tensor argument stands in ``inputs``; ``None`` if it was not given."""
        return self._positions.get(name)

    def run(self, *tensors: Tensor) -> Any:
        """Call the op again with other tensors in place of its inputs.

        Facts hold zeros of whatever dtype where nothing is known, but ops tell whole, complex and other numbers apart.
        """
        values = iter(self._as_recorded(tensors))
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), lambda _: next(values))
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return self.target(*args, **kwargs)

    def _as_recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for tensor, node in zip(tensors, self.inputs, strict=True):
            dtype = node.meta["tensor"].dtype
            if tensor.is_floating_point() and not dtype.is_floating_point:
                tensor = tensor.to(torch.complex128 if dtype.is_complex else dtype)
            found.append(tensor)
        return found

    def __repr__(self) -> str:
        return f"{self.target} in '{self.path}'"
