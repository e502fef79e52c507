"""Floating-point operations of a recorded graph, before and after a plan, without running anything."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from maskprop.graph.graph import Graph, is_op

Shape = Callable[[fx.Node, "int | None"], "tuple[int, ...] | None"]


def count_flops(graph: Graph, shape: Shape, without: Container[fx.Node] = ()) -> dict[str, int]:
    """Operations by module path, a multiply-add counting as two.

    The formulas are those of `torch.utils.flop_counter`, which counts matrix products and convolutions. The
    graph was recorded with fused kernels switched off, so attention and recurrent layers are counted too.

    Args:
        graph: the recorded forward pass.
        shape: the shape of a node's value (of its i-th result), for example the one that it has in the
            compact model.
        without: ops that are not made any more.
    """
    found: dict[str, int] = {}
    for node in graph.fx.nodes:
        if not is_op(node) or node in without:
            continue
        formula = flop_registry.get(node.target.overloadpacket)
        if formula is None:
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _size(shape(n, None)))
        meta = node.meta["tensor"]
        out = (
            tuple(_size(shape(node, i)) for i in range(len(meta)))
            if isinstance(meta, tuple)
            else _size(shape(node, None))
        )
        path = str(node.meta["path"])
        found[path] = found.get(path, 0) + int(formula(*args, **kwargs, out_val=out))
    return found


def dense_shape(node: fx.Node, index: int | None = None) -> tuple[int, ...] | None:
    """The recorded shape of a value."""
    meta = node.meta["tensor"]
    if index is not None:
        meta = meta[index]
    return None if meta is None or isinstance(meta, tuple) else meta.shape


def _size(shape: tuple[int, ...] | None) -> Any:
    return None if shape is None else torch.Size(shape)
