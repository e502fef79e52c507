"""A recorded call as the rules see it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from maskprop.graph.graph import TensorMeta, shape_of


class Op:
    """One node of the graph: its tensor inputs by position, its other arguments by name.

    Attributes:
        node: the fx node.
        target: the ATen overload.
        inputs: the nodes of the tensor arguments in order, those in lists flattened, repeats kept.
        shapes: their shapes.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        assert isinstance(node.target, OpOverload)
        self.target: OpOverload = node.target
        self.inputs: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), self.inputs.append)
        self.shapes = [shape_of(n) for n in self.inputs]

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
        named = dict(self.node.kwargs)
        for argument, value in zip(self.target._schema.arguments, self.node.args, strict=False):
            named[argument.name] = value
        for argument in self.target._schema.arguments:
            if argument.name not in named and argument.has_default_value():
                named[argument.name] = argument.default_value
        return named

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name; a node where a tensor was given."""
        return self._named.get(name, default)

    def position(self, name: str) -> int | None:
        """Where a tensor argument stands in ``inputs``; ``None`` if it was not given."""
        before = 0
        for argument in self.target._schema.arguments:
            value = self._named.get(argument.name)
            if argument.name == name:
                return before if isinstance(value, fx.Node) else None
            found: list[fx.Node] = []
            fx.node.map_arg(value, found.append)
            before += len(found)
        return None

    def run(self, *tensors: Tensor) -> Any:
        """Call the op again with other tensors in place of its inputs."""
        values = iter(tensors)
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), lambda _: next(values))
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return self.target(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{self.target} in '{self.path}'"
