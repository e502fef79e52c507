"""What removed units leave behind, in float64 from the full-size masked weights.

* bias: ``y = W x + b`` with ``x_k = v`` for every input becomes ``W' x' + (b + W[:, k] v)``;
* carrier: one constant unit ``c`` stays and stands for all, ``W[:, c] += W[:, k] v_k / v_c``; exact at padded
  borders too, since all of them are the same map up to a factor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from maskprop.align.plan import Add, Plan
from maskprop.align.solve import Solution, count_kept
from maskprop.graph.graph import shape_of
from maskprop.infer.coupling import Contraction, Coupling
from maskprop.infer.facts import Fact
from maskprop.infer.op import Op
from maskprop.infer.places import bias_place, calls_alike, weight_place
from maskprop.infer.standin import StandIn


def fold_constants(plan: Plan, c: Coupling, s: Solution) -> None:
    """Add to the plan what the removed units' constants leave in their consumers."""
    for contraction in c.contractions:
        gone = torch.from_numpy(s.leaves(contraction.labels)) & contraction.nonzero
        if bool(gone.any()):
            if contraction.place != "bias":
                contraction = _fold_carrier(plan, contraction, gone, c, s)
            if contraction.place != "carrier":
                _fold_bias(plan, contraction, gone, c, s)


def hold_constants(plan: Plan, left: Iterable[StandIn | None], c: Coupling, s: Solution) -> set[str]:
    """Add to the plan what layers that left as a whole put out.

    Returns:
        The biases that hold it. What stays of a constant may be zero, and then none does.
    """
    held: set[str] = set()
    for stand_in in left:
        constant = None if stand_in is None else stand_in.held
        if stand_in is None or constant is None or constant.name in held:
            continue
        own = c.labels_of(stand_in.result)[stand_in.axis]
        rows = torch.arange(len(constant.value)) if own is None else s.kept(own)
        value = constant.value[rows]
        if not bool(value.any()):
            continue
        held.add(constant.name)
        if constant.bias is None:
            plan.new_bias[constant.name] = value
        else:
            bias = c.facts[constant.bias].value().expand(len(constant.value))
            plan.add.append(Add(constant.name, value - bias[rows]))
    return held


def _is_convolution(op: Op) -> bool:
    return op.target._schema.name == "aten::convolution"


def constants_read(c: Coupling) -> dict[fx.Node, Tensor]:
    """Which elements of values count as constants that may land in what reads them."""
    found: dict[fx.Node, Tensor] = {}
    for k in c.contractions:
        units = k.nonzero & (k.constant.reshape(len(k.constant), -1) != 0).any(1)
        if not bool(units.any()):
            continue
        for op in map(Op, calls_alike(k.op.node)):
            source, axis = (op.inputs[0], 1) if _is_convolution(op) else (op.inputs[-2], -1)
            fact: Fact = c.facts[source]
            read = units.reshape([-1 if d == axis % fact.known.ndim else 1 for d in range(fact.known.ndim)])
            read = read & fact.known & ~fact.zero
            found[source] = found[source] | read if source in found else read
    return found


def weight_of(k: Contraction) -> tuple[str, bool] | None:
    """The parameter that a contraction multiplies by, and whether its axes are turned, if only such calls read it."""
    node = k.op.inputs[1] if _is_convolution(k.op) else k.op.inputs[-1]
    return weight_place(node, len(calls_alike(k.op.node)))


def _weights(op: Op, c: Coupling) -> Tensor:
    """(G, O, I, *kernel) float64 masked weights of a contraction."""
    if _is_convolution(op):
        fact: Fact = c.facts[op.inputs[1]]
        weight = fact.value().expand(op.shapes[1])
        cut = weight.reshape(op.arg("groups"), -1, *weight.shape[1:])
        return cut.transpose(1, 2) if op.arg("transposed") else cut
    fact = c.facts[op.inputs[-1]]
    return fact.value().expand(op.shapes[-1]).transpose(0, 1).unsqueeze(0)


def _fold_bias(plan: Plan, k: Contraction, gone: Tensor, c: Coupling, s: Solution) -> None:
    place = bias_place(k.op.node)
    assert place is not None
    if place.kind == "cancel":
        return
    weight = _weights(k.op, c)
    weight = weight.flatten(3).sum(-1) if weight.ndim > 3 else weight
    constant = torch.where(gone, k.constant if k.constant.ndim == 1 else k.constant[:, 0], 0.0)
    delta = torch.einsum("goi,gi->go", weight, constant.reshape(k.groups, -1)).reshape(-1)
    if place.kind == "new_bias":
        rows = _kept_outputs(k.op, c, s)
        plan.new_bias[place.target] = delta[rows]
        return
    keeps = plan.keep.get(place.target, [])
    if keeps:
        delta = delta.index_select(0, keeps[0].index)
    plan.add.append(Add(place.target, -delta if place.kind == "running_mean" else delta))


def _fold_carrier(plan: Plan, k: Contraction, gone: Tensor, c: Coupling, s: Solution) -> Contraction:
    """Fold into the carrier's weights; the contraction with what is left for a bias."""
    found = weight_of(k)
    assert found is not None
    name, turned = found
    leaves = torch.from_numpy(s.leaves(k.labels))
    maps, means = k.maps, k.constant.reshape(len(leaves), -1).mean(1)
    size = maps.square().sum(1)
    transposed = bool(k.op.arg("transposed")) if _is_convolution(k.op) else not turned
    weight = _weights(k.op, c)
    per_group = len(leaves) // k.groups
    for group in range(k.groups):
        part = slice(group * per_group, (group + 1) * per_group)
        if not bool(gone[part].any()) or bool(leaves[part].all()):
            continue
        there = k.nonzero[part] & ~leaves[part]
        carrier = int(torch.where(there, size[part], torch.tensor(-1.0, dtype=torch.float64)).argmax())
        base = maps[part][carrier]
        factor = torch.where(gone[part], maps[part] @ base / base.square().sum().clamp_min(1e-300), 0.0)
        means[part] -= factor * means[part][carrier]
        delta = torch.tensordot(weight[group], factor, dims=([1], [0]))  # (O, *kernel)
        _add_column(plan, name, delta, carrier, group, k.groups, leaves[part], transposed)
    return replace(k, constant=means)


def _add_column(
    plan: Plan,
    name: str,
    delta: Tensor,
    carrier: int,
    group: int,
    groups: int,
    leaves: Tensor,
    transposed: bool,
) -> None:
    """Add ``delta`` (one input unit's weights to a group's outputs) to the sliced weight."""
    at = int((~leaves[:carrier]).sum())
    keeps = {keep.axis: keep for keep in plan.keep.get(name, [])}
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    if groups == 1:
        if out_axis in keeps:
            delta = delta.index_select(0, keeps[out_axis].index)
        plan.add.append(Add(name, delta, in_axis, at))
        return
    shape = plan.compact_shape(name) if name in plan.shapes else None
    assert shape is not None
    full = torch.zeros(shape, dtype=torch.float64)
    if transposed:
        first = keeps[0].index if 0 in keeps else torch.arange(shape[0])
        position = int((first == group * len(leaves) + carrier).nonzero()[0, 0])
        columns = keeps[1].index if 1 in keeps else None
        full[position] = (
            delta if columns is None else delta.index_select(0, columns if columns.ndim == 1 else columns[position])
        )
    else:
        outputs = len(delta)
        rows = keeps[0].index if 0 in keeps else torch.arange(shape[0])
        mine = ((rows >= group * outputs) & (rows < (group + 1) * outputs)).nonzero()[:, 0]
        full[mine, at] = delta.index_select(0, rows[mine] - group * outputs)
    plan.add.append(Add(name, full))


def _kept_outputs(op: Op, c: Coupling, s: Solution) -> Tensor:
    """Indices of the outputs of a contraction that stay."""
    axis = 1 if _is_convolution(op) else len(op.shape) - 1
    labels = c.labels[op.node][axis]
    count = op.shape[axis]
    if labels is None:
        return torch.arange(count)
    return s.kept(labels)


def rescale_means(plan: Plan, c: Coupling, s: Solution) -> dict[fx.Node, tuple[int, float]]:
    """Make up for the number of units that left a mean.

    Returns:
        Numbers that ops add to such a mean: by op, the position among its arguments and the new number.
    """
    numbers: dict[fx.Node, tuple[int, float]] = {}
    for rescale in c.rescales:
        kept = s.kept_units(rescale.labels)
        own = kept[rescale.axis]
        assert own is not None
        place, factor = rescale.place, own.shape[rescale.axis] / count_kept(kept, rescale.axis)
        if factor == 1:
            continue
        for node, position in place.numbers:
            numbers[node] = position, number_at(node, position) * factor
        name = str(place.weight.target)
        weight: Tensor = c.facts[place.weight].value().expand(shape_of(place.weight))
        weight = plan.slice(name, weight) if name in plan.keep else weight
        plan.add.append(Add(name, (place.offset + weight) * (factor**place.power - 1)))
    return numbers


def recount(c: Coupling, s: Solution) -> dict[fx.Node, tuple[int, float]]:
    """Numbers of units that no size shows, where some leave: by op, the position of the argument and the number."""
    counts = ((k, int(np.count_nonzero(~s.leaves(k.labels)))) for k in c.counts)
    return {k.node: (k.position, left) for k, left in counts if left != len(k.labels)}


def number_at(node: fx.Node, position: int) -> float:
    """A number among an op's arguments; ``None`` stands for the epsilon of the type that it computes in."""
    value = node.args[position] if position < len(node.args) else None
    if value is None:
        dtype = node.all_input_nodes[0].meta["tensor"].dtype
        return float(torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps)
    return float(str(value))
