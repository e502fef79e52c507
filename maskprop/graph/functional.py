"""In-place and view ops made functional while they are recorded.

A tensor that shares memory with another is a *view* of it. The recorder keeps, for each live tensor, the graph
node that holds its present value; after an in-place write the value travels up to what the tensor views (through
the inverse of the view, a scatter) and is read down again by the other views of it. The graph itself then holds
pure ops only, and ``x[:, :k] = y`` reads as ``slice_scatter``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from maskprop.errors import UnsupportedOpError
from maskprop.graph.graph import shape_of, where

aten = torch.ops.aten
Emit = Callable[[Any, Any, Any, Any], fx.Node]  # of a target, arguments, keyword arguments and what it makes


@dataclass(eq=False)
class Value:
    """The present value of a live tensor, and how it is read from the tensor it views."""

    node: fx.Node
    parent: Value | None = None
    view: fx.Node | None = None
    index: int | None = None
    version: int = 0
    seen: int = 0

    def current(self, emit: Emit) -> fx.Node:
        """The node that holds the value now, re-reading it if what it views was written to."""
        if self.parent is not None and self.view is not None:
            source = self.parent.current(emit)
            if self.seen != self.parent.version:
                self.seen = self.parent.version
                self.version += 1
                meta = self.view.meta["tensor"]
                node = emit(self.view.target, (source, *self.view.args[1:]), self.view.kwargs, meta)
                self.node = (
                    node if self.index is None else emit(operator.getitem, (node, self.index), {}, meta[self.index])
                )
        return self.node

    def write(self, node: fx.Node, emit: Emit) -> None:
        """Make ``node`` the value, and scatter it into everything this tensor is a view of."""
        self.node = node
        self.version += 1
        if self.parent is not None and self.view is not None:
            base = self.parent.current(emit)
            self.parent.write(_scatter(base, node, self.view, self.index, emit), emit)
            self.seen = self.parent.version


@functools.cache
def functional_overload(op: OpOverload) -> OpOverload:
    """The pure overload of an in-place or ``out=`` op.

    Raises:
        UnsupportedOpError: there is none.
    """
    namespace, name = op._schema.name.split("::")
    pure = name.rstrip("_") or name
    wanted = [a.name for a in op._schema.arguments if not a.is_out]
    for packet in (getattr(getattr(torch.ops, namespace), n, None) for n in (pure, f"{pure}_functional")):
        for overload in [op._overloadname, *packet.overloads()] if packet is not None else []:
            found = getattr(packet, overload, None)
            if (
                isinstance(found, OpOverload)
                and not found._schema.is_mutable
                and [a.name for a in found._schema.arguments] == wanted
            ):
                return found
    raise UnsupportedOpError(
        f"{op} writes to its argument and has no functional form. Replace it in the model's forward by an "
        "op that returns its result."
    )


def _scatter(base: fx.Node, node: fx.Node, view: fx.Node, index: int | None, emit: Emit) -> fx.Node:
    """The value of ``base`` after ``node`` was written through ``view`` of it."""
    op, args = view.target, list(view.args[1:])
    kwargs = dict(view.kwargs)
    shape, meta = shape_of(base), base.meta["tensor"]

    def arg(position: int, name: str, default: Any) -> Any:
        return args[position] if len(args) > position else kwargs.get(name, default)

    if op is aten.slice.Tensor:
        return emit(aten.slice_scatter.default, (base, node, *args), kwargs, meta)
    if op is aten.select.int:
        return emit(aten.select_scatter.default, (base, node, *args), kwargs, meta)
    if op is aten.unbind.int:
        return emit(aten.select_scatter.default, (base, node, arg(0, "dim", 0), index), {}, meta)
    if op in (aten.split.Tensor, aten.split_with_sizes.default):
        assert index is not None
        dim, size = arg(1, "dim", 0), arg(0, "split_size", None)
        start = index * size if isinstance(size, int) else sum(size[:index])
        return emit(aten.slice_scatter.default, (base, node, dim, start, start + shape_of(node)[dim]), {}, meta)
    if op is aten.diagonal.default:
        return emit(aten.diagonal_scatter.default, (base, node, *args), kwargs, meta)
    if op in (
        aten.view.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    ):
        return emit(aten.view.default, (node, list(shape)), {}, meta)
    if op in (aten.transpose.int, aten.t.default):
        return emit(op, (node, *args), kwargs, meta)
    if op is aten.permute.default:
        order = [d % len(shape) for d in arg(0, "dims", [])]
        return emit(op, (node, [order.index(d) for d in range(len(order))]), {}, meta)
    if op in (aten.detach.default, aten.alias.default):
        return node
    raise UnsupportedOpError(
        f"module {where(view)} writes in place through {op}, which maskprop cannot undo. Write to a copy "
        "(`.clone()`) in the model's forward."
    )
