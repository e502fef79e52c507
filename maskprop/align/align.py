"""From facts to a plan: labels, solution, kept indices, constants."""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from maskprop.align.constants import fold_constants, hold_constants, recount, rescale_means, weight_of
from maskprop.align.couple import couple
from maskprop.align.plan import Keep, Plan
from maskprop.align.solve import Bools, Ints, Solution, carriers, count_kept, multiples, never_empty, regularity
from maskprop.graph.graph import shape_of
from maskprop.infer.coupling import Coupling, Cut, Labels, Pin, owned_axes
from maskprop.infer.sweep import Inference


@dataclass
class Alignment:
    """The plan and what it was made from.

    Attributes:
        numbers: numbers among the ops' arguments that change: by op, the position and the new number.
        held: the biases that hold what layers that left as a whole put out.
    """

    coupling: Coupling
    solution: Solution
    plan: Plan
    states: dict[str, fx.Node]
    numbers: dict[fx.Node, tuple[int, float]] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)

    def expected_shape(self, node: fx.Node, index: int | None = None) -> tuple[int, ...]:
        """The shape that a recorded value has in the compact model."""
        meta = node.meta["tensor"]
        labels = self.coupling.labels.get(node)
        if index is not None:
            meta, labels = meta[index], None if labels is None else labels[index]
        if labels is None:
            return tuple(meta.shape)
        leaves = [None if a is None else self._leaves[a.numpy()] for a in labels]
        if not any(units is not None and units.any() for units in leaves):  # as of most values
            return tuple(meta.shape)
        kept = [None if units is None else ~units for units in leaves]
        return tuple(n if kept[i] is None else count_kept(kept, i) for i, n in enumerate(meta.shape))

    @functools.cached_property
    def _leaves(self) -> Bools:
        """Whether each label leaves."""
        found: Bools = self.solution.removed[self.solution.group]
        return found

    def expected_bound(self, node: fx.Node, axis: int, bound: int) -> int:
        """Where a bound of a slice along an axis of a recorded value is in the compact model."""
        kept = self.solution.kept_units(self.coupling.labels_of(node))
        mask = kept[axis] if kept else None
        if mask is None:
            return bound
        kept[axis] = mask[(slice(None),) * axis + (slice(bound),)]
        return count_kept(kept, axis) if bound else 0

    def kept_part(self, node: fx.Node, value: Tensor) -> Tensor | None:
        """What stays of a recorded value; ``None`` where the choice along an axis varies along another."""
        for axis, mask in enumerate(self.solution.kept_units(self.coupling.labels.get(node))):
            if mask is not None and not mask.all():
                if mask.size != mask.shape[axis]:
                    return None
                value = value.index_select(axis, torch.from_numpy(np.flatnonzero(mask)))
        return value

    def cuts_at(self, node: fx.Node) -> list[tuple[int, int, int, tuple[int, ...]]]:
        """Operands of an op that are cut on entry: the input, its axis, and which of how many units repeatedly stay."""
        found = []
        for name, position, axis in sorted(self.coupling.cuts):
            if name == node.name:
                _, met = self.coupling.cuttable[name, position, axis]
                leaves = np.moveaxis(self.solution.leaves(met), axis, -1)
                stays = ~leaves.reshape(-1, leaves.shape[-1])[0]
                if not stays.all():
                    count = _period(stays)
                    found.append((position, axis, count, tuple(np.flatnonzero(stays[:count]).tolist())))
        return found


def align(
    inference: Inference,
    constants: str = "exact",
    channel_multiple: int = 1,
    extra_pins: tuple[Pin, ...] = (),
    even: frozenset[str] = frozenset(),
    cuts: frozenset[Cut] | None = None,
) -> Alignment:
    """Solve for what leaves and lay out what stays.

    Args:
        inference: after its sweeps.
        constants: ``"exact"``, ``"fold"`` (constants in biases only, borders approximate) or ``"drop"``.
        channel_multiple: keep a multiple of this many units along every shrunk axis.
        extra_pins: labels that stay for reasons found later (labels are numbered the same in every walk with the same
            cuts).
        even: names of nodes whose equal parts must stay equal, as found later.
        cuts: operands to cut as they enter an op; by default those by which more leaves.
    """

    def solved(cuts: frozenset[Cut]) -> tuple[Coupling, Solution]:
        return _solved(inference, constants, channel_multiple, extra_pins, even, cuts)

    if cuts is None:
        plain = solved(frozenset())
        cut, everything = plain, frozenset[Cut]()
        while not everything >= cut[0].cuttable.keys():  # behind an operand that is cut, others can be
            everything |= cut[0].cuttable.keys()
            cut = solved(everything)
        worth = _worth(plain, cut)
        c, s = solved(worth) if worth else plain
    else:
        c, s = solved(cuts)
    states = _states(inference)
    plan = _plan({name: node for name, node in states.items() if node not in inference.left}, c, s)
    fold_constants(plan, c, s)
    held = hold_constants(plan, inference.left.values(), c, s)
    return Alignment(c, s, plan, states, rescale_means(plan, c, s) | recount(c, s), held)


def align_alike(inference: Inference, alignment: Alignment, left: Collection[fx.Node]) -> Alignment | None:
    """Let leave in one pass of a model just what left in another one, and what leaves with it.

    Args:
        inference: of the one pass, after its sweeps.
        alignment: what left in the other one.
        left: nodes of layers that left there as a whole.

    Returns:
        What leaves, with the plan of both passes; ``None`` if units stay that share a group with units that left.
    """
    c = couple(inference, alignment.coupling.constants)
    s, states, given = Solution(c, ()), _states(inference), []
    for name, node in states.items():
        known = alignment.states.get(name)
        if known is None or known in left:
            continue
        for own, array in zip(c.labels_of(node), alignment.coupling.labels_of(known), strict=True):
            if own is not None:
                given.append((own, np.zeros(1, bool) if array is None else alignment.solution.leaves(array)))
    if not s.follow(given):
        return None
    more = _plan({name: node for name, node in states.items() if name not in alignment.states}, c, s)
    # no units were chosen to carry constants here
    c.contractions = [k for k in c.contractions if k.place == "bias" and (weight_of(k) or ("",))[0] in more.keep]
    fold_constants(more, c, s)
    return Alignment(c, s, alignment.plan | more, states, rescale_means(Plan(), c, s) | recount(c, s))


def _plan(states: Mapping[str, fx.Node], c: Coupling, s: Solution) -> Plan:
    """What stays of the model's own tensors."""
    plan = Plan()
    found: dict[Hashable, list[Keep]] = {}
    for name, node in states.items():
        labels = c.labels_of(node)
        key = _key(labels)
        if key not in found:
            found[key] = _keeps(labels, s)
        if found[key]:
            plan.shapes[name] = shape_of(node)
            plan.keep[name] = found[key]
    return plan


def _worth(plain: tuple[Coupling, Solution], cut: tuple[Coupling, Solution]) -> frozenset[Cut]:
    """Of all operands that could be cut on entry, those where more leaves if they are."""

    def count(walk: tuple[Coupling, Solution], key: Cut) -> int:
        found = walk[0].cuttable.get(key)
        return 0 if found is None else int(walk[1].leaves(found[1]).sum())

    return frozenset(key for key in cut[0].cuttable if count(cut, key) > count(plain, key))


def _distinct(tensors: Iterable[Labels]) -> dict[Hashable, Labels]:
    """Labels of tensors, each kind once: the vectors of a norm share theirs with the rows before it."""
    return {_key(labels): labels for labels in tensors}


def _key(labels: Labels) -> Hashable:
    return tuple(None if a is None else (a.data_ptr(), a.shape, a.stride()) for a in labels)


def _states(inference: Inference) -> dict[str, fx.Node]:
    """The model's own tensors."""
    return {
        str(n.target): n
        for n in inference.graph.fx.nodes
        if n.op == "get_attr" and not {"lifted", "inserted"} & n.meta.keys()
    }


def _solved(
    inference: Inference,
    constants: str,
    channel_multiple: int,
    extra_pins: tuple[Pin, ...],
    even: frozenset[str],
    cuts: frozenset[Cut],
) -> tuple[Coupling, Solution]:
    """Labels and relations, and what leaves by them."""
    c = couple(inference, constants, even, cuts)
    c.pins += extra_pins
    states = _states(inference)
    axes = owned_axes(_distinct(map(c.labels_of, states.values())).values())
    owned = [a for one in axes if (a := one.labels[one.axis]) is not None]
    s = Solution(c, owned)
    flat = [a for a in owned if a.numel() == max(a.shape)]
    restore = {
        "it carries the constants of the units that left": carriers(c),
        "every head, group or part keeps equally many units": regularity(c.regulars),
        "an axis keeps at least one unit": never_empty([*axes, *c.nonempty]),
        "its kernel asks for a multiple of so many units": multiples(c.multiples),
    }
    if channel_multiple > 1:
        restore[f"channel_multiple={channel_multiple} asks for a multiple of that many units"] = multiples(
            [(labels, channel_multiple) for labels in flat]
        )
    s.solve(restore)
    return c, s


def _period(mask: Bools) -> int:
    """After how many units a choice repeats: heads stand in one axis with the batch."""
    sizes = (n for n in range(1, len(mask)) if len(mask) % n == 0)
    return next((n for n in sizes if (mask.reshape(-1, n) == mask[:n]).all()), len(mask))


def _keeps(labels: Labels, s: Solution) -> list[Keep]:
    """Kept indices of every axis of a tensor that shrinks."""
    found: list[Keep] = []
    kept = s.kept_units(labels)
    for axis, mask in enumerate(kept):
        if mask is None or mask.all():
            continue
        over = tuple(d for d in range(mask.ndim) if d != axis and mask.shape[d] > 1)
        if not over:
            found.append(Keep(axis, torch.from_numpy(np.flatnonzero(mask.reshape(-1)))))
            continue
        rows: Ints = np.moveaxis(mask, axis, -1).astype(np.int64)
        for d in over:  # rows of removed positions are dropped, as the tensor's are
            other = kept[d]
            if other is not None:
                place = d if d < axis else d - 1
                rows = rows.compress(
                    other.reshape(-1) if other.size == max(other.shape) else np.ones(rows.shape[place], bool),
                    axis=place,
                )
        count = int(rows.sum(-1).max())
        order = np.argsort(1 - rows, axis=-1, kind="stable")[..., :count]
        shape = [n for i, n in enumerate(order.shape[:-1]) if n > 1 or (i if i < axis else i + 1) in over]
        found.append(Keep(axis, torch.from_numpy(np.ascontiguousarray(order)).reshape(*shape, count), over))
    return found


def kept_of(alignment: Alignment, name: str) -> list[Tensor | None]:
    """Kept indices an axis of a tensor, ``None`` where all stay."""
    axes: list[Tensor | None] = [None] * len(shape_of(alignment.states[name]))
    for keep in alignment.plan.keep.get(name, []):
        axes[keep.axis] = keep.index
    return axes
