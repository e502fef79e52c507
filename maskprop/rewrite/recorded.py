"""What recorded calls show: where a value comes from, which calls do the same, what only lays memory out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from maskprop.graph.graph import Graph, TensorMeta
from maskprop.infer.op import Op

aten = torch.ops.aten

# Ops that only lay memory out: whether they appear depends on sizes and strides.
LAYOUT = {
    aten.empty.memory_format,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.contiguous.default,
    aten.dropout.default,
}
RESHAPES = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default, aten._to_copy.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor,
}  # fmt: skip
BOUNDED = (aten.slice.Tensor, aten.select.int)  # what begins somewhere along an axis
SAME = {
    aten._unsafe_view.default: aten.view.default,
    aten.reshape.default: aten.view.default,
    aten.mm.default: aten.addmm.default,
    aten.split_with_sizes.default: aten.split.Tensor,
}


def made_by(node: fx.Node) -> fx.Node:
    """Where a value comes from, before ops that move it only."""
    while (node.target in LAYOUT or node.target in RESHAPES) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def adds_bias(node: fx.Node) -> bool:
    """Whether a sum adds one of the model's vectors to a product of matrices."""
    vectors = [n for n in node.all_input_nodes if n.op == "get_attr" and len(n.meta["tensor"].shape) == 1]
    return bool(vectors) and any(made_by(n).target is aten.mm.default for n in node.all_input_nodes)


def same_target(want: Any, got: Any) -> bool:
    """Whether two ops do the same: which of them is called depends on sizes and strides."""
    return SAME.get(want, want) is SAME.get(got, got)


def is_idle(node: fx.Node, shapes: tuple[Any, ...], source: tuple[int, ...] | None, strict: bool) -> bool:
    """A reshape or expand to the shape that its input has (not ``strict``: up to axes of size 1)."""
    if node.target not in RESHAPES or len(shapes) != 1 or source is None:
        return False
    if strict:
        return bool(shapes[0] == source)
    return [n for n in shapes[0] or () if n != 1] == [n for n in source if n != 1]


def shapes_of(node: fx.Node) -> tuple[tuple[int, ...] | None, ...]:
    """Shapes of all results of a call."""
    return shapes_of_meta(node.meta["tensor"])


def shapes_of_meta(meta: Any) -> tuple[tuple[int, ...] | None, ...]:
    """Shapes by the metadata of one result, or of several, with ``None`` for absent ones."""
    return tuple(None if m is None else m.shape for m in (meta if isinstance(meta, tuple) else (meta,)))


def without_ones(shapes: tuple[tuple[int, ...] | None, ...]) -> list[list[int] | None]:
    """Shapes without their axes of size 1."""
    return [None if shape is None else [n for n in shape if n != 1] for shape in shapes]


def order_of(permute: fx.Node, shape: tuple[int, ...]) -> list[int]:
    """Where the axes that are not of size 1 stood among their like, in the order of the result."""
    axes = [axis for axis, size in enumerate(shape) if size != 1]
    dims = [dim % len(shape) for dim in Op(permute).arg("dims")]
    return [axes.index(dim) for dim in dims if dim in axes]


def start_of(node: fx.Node, shape: tuple[int, ...] | None) -> int | None:
    """Where a part of a value of that shape starts."""
    if shape is None or node.target not in BOUNDED:
        return None
    op = Op(node)
    if node.target is aten.select.int:
        index: int = op.arg("index") % shape[op.arg("dim")]
        return index
    return slice(op.arg("start"), op.arg("end")).indices(shape[op.arg("dim")])[0]


def in_shape(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of what a call reads first, if it is one tensor."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    meta = None if source is None else source.meta["tensor"]
    return meta.shape if isinstance(meta, TensorMeta) else None


def writes_all(node: fx.Node, shapes: Callable[[fx.Node], Any]) -> bool:
    """Whether a slice is written that is all there is: a copy."""
    return node.target is aten.slice_scatter.default and shapes(node) == shapes(node.all_input_nodes[-1])


def idle_slice(want: fx.Node, before: fx.Node | None, made: Sequence[fx.Node]) -> fx.Node | None:
    """Where a slice is wanted, the compact one that takes all there is: that is not compared."""
    if want.target is not aten.slice.Tensor:
        return None
    first = 0 if before is None else made.index(before) + 1
    found = next((op for op in made[first:] if op.meta["path"] == want.meta["path"]), None)
    if found is None or found.target not in (want.target, aten.alias.default) or "implied" in found.meta:
        return None
    return found if shapes_of(found)[0] == in_shape(found) else None


def without_unread(dense: Sequence[fx.Node], compact: Sequence[fx.Node]) -> list[fx.Node]:
    """Of the writes in a recording that was cut short which nothing had read by then, only those of the dense one."""
    found: list[fx.Node] = []
    for op in compact:
        mate = dense[len(found)] if len(found) < len(dense) else None
        written = mate is not None and "implied" in mate.meta and same_target(mate.target, op.target)
        if written or "unread" not in op.meta:
            found.append(op)
    return found


def read_nodes(graph: Graph) -> set[fx.Node]:
    """What an output depends on, of this call or the next; how large the rest is does not matter."""
    found: set[fx.Node] = set()
    count = -1
    while len(found) > count:
        count = len(found)
        for node in reversed(graph.fx.nodes):
            if node.op == "output" or not found.isdisjoint(node.users):
                found.add(node)
            if node in found and node.op == "get_attr" and (last := graph.renewed.get(str(node.target))) is not None:
                found.add(last)
    return found


def other_input(want: fx.Node, got: fx.Node, mates: Mapping[fx.Node, fx.Node]) -> tuple[str, str] | None:
    """What two matching calls read, where that does not match: by its size ``forward`` may choose what it reads."""
    if len(want.all_input_nodes) != len(got.all_input_nodes):
        return None
    for a, b in zip(map(made_by, want.all_input_nodes), map(made_by, got.all_input_nodes), strict=True):
        states = a.op == b.op == "get_attr" and not {"lifted", "inserted"} & (a.meta.keys() | b.meta.keys())
        mate = mates.get(a)
        if (states and a.target != b.target) or (mate not in (None, b) and b in mates.values()):
            return f"a result of {a}", f"one of {b}"
    return None
