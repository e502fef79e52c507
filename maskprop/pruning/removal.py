"""From chosen units to masks under which they really leave, and the forecast of what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskprop.align.solve import Bools, Solution
from maskprop.errors import GroupError
from maskprop.pruning.groups import Group, Groups, Member
from maskprop.pruning.structure import Cost

NestedMasks = dict[str, dict[str, Tensor]]


@dataclass
class Removal:
    """What is pruned.

    Attributes:
        groups: those that it is about.
        parts: bool by group name, True for a part that leaves.
        masks: ``{module: {parameter: mask}}``, bool, of shapes that broadcast to the parameters'.
        forecast: what the compact model costs; ``None`` for groups found without a dummy input.
    """

    groups: Groups
    parts: dict[str, Tensor]
    masks: NestedMasks
    forecast: Cost | None

    @property
    def kept(self) -> dict[str, int]:
        """Units kept a group."""
        return {name: int((~gone).sum()) // len(self.groups[name].slots) for name, gone in self.parts.items()}


def remove(groups: Groups, chosen: Mapping[str, Tensor]) -> Removal:
    """Masks for chosen units.

    Producing rows are masked with their biases and the affines of their norms, so that true zeros result.
    Where
    something in between turns zero into a constant (a sigmoid, a norm without affine), the consumer's
    columns are
    masked too.

    Args:
        groups: where the units are from.
        chosen: bool ``(parts,)`` by group name, True for a part to prune. A part that cannot leave alone,
        since a
            shape would not be regular, stays.
    """
    parts = {name: gone.clone() for name, gone in chosen.items() if bool(gone.any())}
    cost = None
    if groups.structure is not None:
        solution = _solve(groups, parts)
        parts = {name: torch.from_numpy(solution.removed[groups[name].classes]) for name in parts}
        cost = groups.structure.cost(solution)
    masks: NestedMasks = {}
    leaks = _leaks(groups) if groups.structure is not None else set()
    for name, gone in parts.items():
        for member in groups[name].members:
            if (not member.consumes or (member.name, member.axis) in leaks) and bool(gone.any()):
                _add(masks, member, gone)
    return Removal(groups, parts, masks, cost)


def forecast(groups: Groups, chosen: Mapping[str, Tensor]) -> Cost:
    """What is left without these parts, as :func:`remove` forecasts it.

    Raises:
        GroupError: the groups were found without a dummy input.
    """
    if groups.structure is None:
        raise GroupError(
            "these groups were found without a dummy input, so that what they cost elsewhere is unknown. Pass "
            "dummy_input to the pruner."
        )
    return groups.structure.cost(_solve(groups, {name: gone for name, gone in chosen.items() if bool(gone.any())}))


def _solve(groups: Groups, parts: Mapping[str, Tensor]) -> Solution:
    assert groups.structure is not None
    found = [groups[name].classes[gone.numpy()] for name, gone in parts.items()]
    return groups.structure.remove(np.concatenate(found) if found else np.zeros(0, dtype=np.int64))


def _add(masks: NestedMasks, member: Member, gone: Tensor) -> None:
    keep = ~hidden_elements(member, gone)
    key = member.name.rpartition(".")[2]
    own = masks.setdefault(member.path, {})
    own[key] = keep if key not in own else own[key] & keep


def hidden_elements(member: Member, parts: Tensor) -> Tensor:
    """Which places along a member's axis belong to parts that leave; of the shape of ``member.units``."""
    return parts[member.units.clamp_min(0)] & (member.units >= 0)


def _all_but_first(group: Group) -> Tensor:
    gone = torch.ones(group.parts, dtype=torch.bool)
    gone[group.slots[:, 0]] = False
    return gone


def _leaks(groups: Groups) -> set[tuple[str, int]]:
    """Consumers that units reach as constants, though everything that produces them is zero."""
    structure = groups.structure
    assert structure is not None
    if structure.leaks is None:
        masks: NestedMasks = {}
        tested = {g.name: _all_but_first(g) for g in groups}  # with a live unit left, no value is wholly constant
        for group in groups:
            for member in group.members:
                if not member.consumes:
                    _add(masks, member, tested[group.name])
        flat = {f"{path}.{key}".lstrip("."): mask for path, own in masks.items() for key, mask in own.items()}
        flagged = structure.not_zero({structure.graph.aliases.get(k, k): v for k, v in flat.items()})
        labels = {(name, axis): labels for name, axis, labels in structure.owned}
        structure.leaks = {
            (m.name, m.axis)
            for g in groups
            for m in g.members
            if m.consumes
            and bool(
                flagged[structure.base.groups_of(labels[m.name, m.axis])][
                    hidden_elements(m, tested[g.name]).numpy()
                ].any()
            )
        }
    return structure.leaks


def _any(flags: Bools, where: Tensor) -> bool:
    return bool(flags[where.numpy()].any())
