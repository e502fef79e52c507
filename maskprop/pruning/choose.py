"""Which units go: scores and rules to parts of groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from maskprop.errors import OptionError, RatioError, SelectorError
from maskprop.pruning.config import Rule
from maskprop.pruning.groups import Group


@dataclass(frozen=True)
class Limits:
    """Bounds that hold for every group.

    Attributes:
        channel_multiple: of an axis that shrinks, a multiple of so many elements stays (fewer leave if need
        be).
        min_units: so many units stay at least.
    """

    channel_multiple: int = 1
    min_units: int = 1

    def __post_init__(self) -> None:
        for name in ("channel_multiple", "min_units"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is {value!r}; give a whole number of at least 1.")

    def at_most(self, group: Group, count: int) -> int:
        """The largest number of units up to ``count`` that may leave."""
        count = min(count, group.size - self.min_units)
        rows = len(group.slots) * len(group.producers[0].indices(int(group.slots[0, 0])))
        step = self.channel_multiple // math.gcd(self.channel_multiple, rows)
        if step > 1 and count > 0:
            kept = -(-(group.size - count) // step) * step
            count = group.size - kept
        return max(count, 0)


def choose(
    plan: Mapping[str, tuple[Group, Rule]], scores: Mapping[str, Tensor], limits: Limits, scale: float = 1.0
) -> dict[str, Tensor]:
    """Pick the lowest units.

    Args:
        plan: groups and their rules by group name.
        scores: ``(parts,)`` by group name.
        limits: see :class:`Limits`.
        scale: of all ratios (a schedule that is half way).

    Returns:
        Bool ``(parts,)`` by group name, True for what goes.

    Raises:
        RatioError: a threshold would empty a group.
        SelectorError: tied groups have different sizes.
    """
    bundles = {
        name: group.bundle(s)
        for (name, s), (group, _) in ((item, plan[item[0]]) for item in _tied(plan, scores).items())
    }
    counts: dict[str, int] = {}
    pools: dict[str, list[str]] = defaultdict(list)
    for name, (group, rule) in plan.items():
        units = bundles[name][0]
        if rule.threshold is not None:
            counts[name] = int((units < rule.threshold).sum())
            if counts[name] >= group.size:
                raise RatioError(
                    f"sparse_threshold {rule.threshold:g} would prune all {group.size} units of group "
                    f"'{name}' (highest score {float(units.max()):.3g}). Lower it."
                )
        elif rule.pool is not None:
            pools[_pool_key(group, rule)].append(name)
        else:
            assert rule.ratio is not None
            counts[name] = min(
                max(_share(group, rule.ratio * scale), math.ceil(rule.least * scale * group.size - 1e-9)),
                _share(group, rule.most),
            )
    for names in pools.values():
        counts |= _compete(names, plan, bundles, limits, scale)
    chosen = {}
    for name, (group, _) in plan.items():
        units, parts = bundles[name]
        gone = torch.zeros(group.parts, dtype=torch.bool)
        gone[parts[units.argsort(stable=True)[: limits.at_most(group, counts[name])]].reshape(-1)] = True
        chosen[name] = gone
    return chosen


def _compete(
    names: list[str],
    plan: Mapping[str, tuple[Group, Rule]],
    bundles: Mapping[str, tuple[Tensor, Tensor]],
    limits: Limits,
    scale: float,
) -> dict[str, int]:
    """Units pruned a group where the groups share one budget, each within its bounds."""
    budget, counts, rows = 0.0, {}, []
    for name in names:
        group, rule = plan[name]
        budget += (rule.ratio or 0.0) * scale * group.size
        counts[name] = least = math.ceil(rule.least * scale * group.size - 1e-9)
        most = min(_share(group, rule.most), group.size - limits.min_units)
        ordered = bundles[name][0].sort(stable=True).values
        rows += [(float(s), name) for s in ordered[least:most]]
    rows.sort(key=lambda row: row[0])
    for _, name in rows[: max(0, int(budget + 1e-9) - sum(counts.values()))]:
        counts[name] += 1
    return counts


def _tied(plan: Mapping[str, tuple[Group, Rule]], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Groups with one ``dependency_group_id`` get the mean of their scores."""
    ties: dict[str, list[str]] = defaultdict(list)
    for name, (_, rule) in plan.items():
        if rule.tie is not None:
            ties[rule.tie].append(name)
    found = dict(scores)
    for tie, names in ties.items():
        if len({len(scores[n]) for n in names}) > 1:
            sizes = ", ".join(f"'{n}' has {plan[n][0].size}" for n in names)
            raise SelectorError(
                f"dependency_group_id {tie!r} ties groups of different sizes: {sizes}. Tie equal ones only."
            )
        mean = torch.stack([scores[n] for n in names]).mean(0)
        found |= dict.fromkeys(names, mean)
    return found


def _pool_key(group: Group, rule: Rule) -> str:
    if rule.pool == "isomorphic":
        kinds = [(m.module.__name__, m.name.rpartition(".")[2], m.axis, m.consumes) for m in group.members]
        return f"{group.granularity} {kinds}"
    return f"pool {rule.pool}"


def _share(group: Group, ratio: float) -> int:
    return int(ratio * group.size + 1e-9)
