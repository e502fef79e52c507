"""From chosen units to masks under which they really leave, and the forecast of what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskprop.align.align import Alignment
from maskprop.align.solve import Solution
from maskprop.errors import GroupError
from maskprop.pruning.groups import Groups, Member
from maskprop.pruning.structure import Cost

NestedMasks = dict[str, dict[str, Tensor]]


@dataclass
class Removal:
    """What is pruned.

    Attributes:
        groups: those that it is about.
        parts: bool by group name, True for a part that leaves.
        masks: ``{module: {parameter: mask}}``, bool, of shapes that broadcast to the parameters'.
        forecast: what the compact model costs, exactly, unless its ``forward`` cannot be made to follow; ``None`` for
            groups found without a dummy input.
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

    Producing rows are masked with their biases and the affines of their norms, so that true zeros result. Where
    something in between turns zero into a constant (a sigmoid, a norm without affine), the consumer's columns are
    masked too.

    Args:
        groups: where the units are from.
        chosen: bool ``(parts,)`` by group name, True for a part to prune. A part that cannot leave alone, since a
            shape would not be regular, stays.
    """
    parts = {name: gone.clone() for name, gone in chosen.items() if bool(gone.any())}
    structure = groups.structure
    if structure is None:
        return Removal(groups, parts, _masks(groups, parts, set()), None)
    solution = _solve(groups, parts)
    parts = {name: torch.from_numpy(solution.removed[groups[name].classes]) for name in parts}
    while True:
        masks = _masks(groups, parts, structure.leaks)
        flat = {f"{path}.{key}".lstrip("."): mask for path, own in masks.items() for key, mask in own.items()}
        cost, left = structure.outcome({structure.graph.aliases.get(k, k): mask for k, mask in flat.items()})
        leaks = _leaks(groups, parts, left)
        if leaks <= structure.leaks:
            return Removal(groups, parts, masks, cost)
        structure.leaks |= leaks


def _masks(groups: Groups, parts: Mapping[str, Tensor], leaks: set[tuple[str, int]]) -> NestedMasks:
    """Zeros where parts are made, and where they are read in spite of that."""
    masks: NestedMasks = {}
    for name, gone in parts.items():
        for member in groups[name].members:
            if (not member.consumes or (member.name, member.axis) in leaks) and bool(gone.any()):
                _add(masks, member, gone)
    return masks


def _leaks(groups: Groups, parts: Mapping[str, Tensor], left: Alignment) -> set[tuple[str, int]]:
    """Axes of consumers that parts reach as constants, though everything that produces them is zero.

    A sigmoid or a batch norm without affine turns a zero row into a constant.
    """
    read = np.zeros(len(left.solution.may), dtype=bool)
    for pin in left.coupling.pins:
        if pin.live:
            read[left.solution.groups_of(pin.labels)] = True
    for contraction in left.coupling.contractions:
        read[left.solution.groups_of(contraction.labels[contraction.nonzero])] = True
    found = set()
    for name, gone in parts.items():
        for m in groups[name].members:
            labels = left.coupling.labels_of(left.states[m.name])[m.axis] if m.consumes else None
            if labels is not None and read[left.solution.groups_of(labels)[hidden_elements(m, gone).numpy()]].any():
                found.add((m.name, m.axis))
    return found


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
