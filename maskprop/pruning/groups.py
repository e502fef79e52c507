"""Coupled groups as objects: units that leave together, what each is made of, and what it costs.

A *unit* is the smallest set of indices, over all of the model's parameters, that can only leave as a whole. A
:class:`Group` is a row of interchangeable units: the channels of a residual stage, the heads of an attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from maskprop.errors import GroupError
from maskprop.graph.graph import Graph
from maskprop.graph.structure import tensors_in
from maskprop.graph.trace import Inputs, Tracer, trace
from maskprop.pruning.masking import named_weights
from maskprop.rewrite.edits import tensor_of

if TYPE_CHECKING:
    from maskprop.pruning.structure import Cost, Structure

_COLUMNS = (
    "group", "granularity", "default", "units", "parameters a unit", "FLOPs a unit", "producers", "consumers",
)  # fmt: skip
GRANULARITIES = ("channel", "channel group", "head", "head dim", "query group", "expert")


@dataclass(frozen=True)
class Member:
    """One axis of one parameter, cut up among a group's units.

    Attributes:
        name: the parameter.
        axis: the axis that shrinks.
        units: int64, broadcastable over the parameter, of full size along ``axis``: which unit an element
            belongs to, -1 for none.
        consumes: a weight that sums over this axis; it reads the units, the others produce them.
        module: the type of the module that holds the parameter.
    """

    name: str
    axis: int
    units: Tensor = field(repr=False)
    consumes: bool = False
    module: type = nn.Module

    @property
    def path(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]

    def indices(self, unit: int) -> list[int]:
        """Positions of a unit along the axis."""
        found = (self.units == unit).nonzero()[:, self.axis]
        return [int(i) for i in found.unique()]

    def rows(self, tensor: Tensor, count: int) -> Tensor:
        """A parameter-shaped tensor by unit.

        Args:
            tensor: of the parameter's shape.
            count: number of units in the group.

        Returns:
            ``(count, n)``: the elements of each unit, with zeros behind where a unit has fewer than another (a head's
            queries and keys are two rows of a fused projection, its values one).
        """
        varying = [d for d, n in enumerate(self.units.shape) if n > 1]
        rest = [d for d in range(tensor.ndim) if d not in varying]
        flat = self.units.reshape(-1)
        if len(varying) == 1 and torch.equal(flat, torch.arange(count)):  # one by one, in order: nothing moves
            return tensor.movedim(varying[0], 0).reshape(count, -1)
        order = torch.argsort(flat, stable=True)[int((flat < 0).sum()) :]
        unit = flat[order]
        has = torch.bincount(unit, minlength=count)
        place = torch.arange(len(unit)) - (has.cumsum(0) - has)[unit]
        slices = tensor.permute(varying + rest).reshape(len(flat), -1)
        table = slices.new_zeros(count, int(has.max()), slices.shape[1])
        table[unit, place] = slices[order.to(tensor.device)]
        return table.reshape(count, -1)


@dataclass
class Group:
    """Interchangeable units. With several slots, a unit is one *part* from each (a dim of every head, say).

    Attributes:
        name: stable: the path of the first module that produces the units, and the granularity if it is not
            the channel.
        granularity: one of ``GRANULARITIES``.
        members: parameters that the units are made of, in the order of execution.
        slots: int64 ``(slots, size)``: parts by slot. Equally many leave from each slot.
        default: whether pruners take it unless asked otherwise (of heads and their dims, the heads).
    """

    name: str
    granularity: str
    members: tuple[Member, ...]
    slots: Tensor = field(repr=False)
    model: nn.Module = field(repr=False)
    default: bool = True
    structure: Structure | None = field(default=None, repr=False)
    classes: Any = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """How many units there are."""
        return int(self.slots.shape[1])

    @property
    def parts(self) -> int:
        """Units times slots."""
        return self.slots.numel()

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that produce the units."""
        return tuple(dict.fromkeys(m.path for m in self.members if not m.consumes))

    @cached_property
    def consumers(self) -> tuple[str, ...]:
        """Paths of the modules that read the units."""
        return tuple(dict.fromkeys(m.path for m in self.members if m.consumes))

    @property
    def producers(self) -> tuple[Member, ...]:
        """Weights of two axes or more whose rows produce the units; if there is none, whatever there is."""
        rows = tuple(m for m in self.members if not m.consumes and m.units.ndim > 1)
        return rows or tuple(m for m in self.members if not m.consumes) or self.members

    @property
    def gates(self) -> dict[str, list[Member]]:
        """By module, the parameters nearest to the activation whose zeros silence a unit.

        The affines of batch norms if there are any, else the producing weights; each with its bias.
        """
        made = [m for m in self.members if not m.consumes]
        norms = {m.path for m in made if issubclass(m.module, nn.modules.batchnorm._NormBase)}
        paths = norms or {m.path for m in self.producers}
        return {p: [m for m in made if m.path == p] for p in dict.fromkeys(m.path for m in made) if p in paths}

    def tensor(self, member: Member) -> Tensor:
        """The member's parameter as it is now, masked if masks are applied."""
        return tensor_of(self.model, member.name).detach()

    def rows(self, member: Member, tensor: Tensor | None = None) -> Tensor:
        """``(parts, n)``: each part's elements of a member, or of another tensor of its shape."""
        return member.rows(self.tensor(member) if tensor is None else tensor, self.parts)

    def bundle(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of parts to scores of units, the lowest parts of every slot first.

        Args:
            scores: ``(parts,)``.

        Returns:
            Scores ``(size,)`` and the parts of each unit ``(size, slots)``. With one slot the order is that
            of
            the units; with more, the j-th unit is the j-th lowest part of every slot.
        """
        by_slot = scores[self.slots.to(scores.device)]
        if len(self.slots) == 1:
            return by_slot[0], self.slots.T
        order = by_slot.argsort(dim=1, stable=True).cpu()
        return by_slot.sort(dim=1, stable=True).values.mean(0), self.slots.gather(1, order).T

    @cached_property
    def cost(self) -> Cost:
        """Parameters and FLOPs that leave with one unit while all others stay.

        Raises:
            GroupError: the group was found without a dummy input.
        """
        if self.structure is None:
            raise GroupError(
                f"group '{self.name}' was found without a dummy input, so that what its units cost "
                "elsewhere is unknown. "
                "Pass dummy_input to prunable_groups or to the pruner."
            )
        return self.structure.saving(self.classes[self.slots[:, 0].numpy()])

    def to_dict(self, indices: bool = True) -> dict[str, Any]:
        """Plain data; ``indices`` adds, for each member, the positions of every part."""
        data: dict[str, Any] = {
            "name": self.name,
            "granularity": self.granularity,
            "size": self.size,
            "default": self.default,
        }
        if self.structure is not None:
            data |= {"unit_parameters": self.cost.parameters, "unit_flops": self.cost.flops}
        data["members"] = [
            {"parameter": m.name, "axis": m.axis, "role": "consumer" if m.consumes else "producer"}
            | ({"indices": [m.indices(u) for u in range(self.parts)]} if indices else {})
            for m in self.members
        ]
        if len(self.slots) > 1:
            data["slots"] = self.slots.tolist()
        return data

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.size} units ({self.granularity})"]
        lines += [f"  {'reads' if m.consumes else 'makes'} {m.name}, axis {m.axis}" for m in self.members]
        return "\n".join(lines)


class Groups(Sequence[Group]):
    """The prunable groups of a model, in the order of execution; also by name.

    Attributes:
        model: the model.
        structure: the trace and the relations between units; ``None`` if the groups are each module's own
        rows.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        structure: Structure | None,
        inputs: Inputs | None = None,
    ) -> None:
        self.model = model
        self.structure = structure
        self.inputs = inputs
        self._groups = list(groups)
        self._by_name = {g.name: g for g in groups}

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    @overload
    def __getitem__(self, key: int | str) -> Group: ...

    @overload
    def __getitem__(self, key: slice) -> list[Group]: ...

    def __getitem__(self, key: int | str | slice) -> Group | list[Group]:
        if not isinstance(key, str):
            return self._groups[key]
        if key not in self._by_name:
            raise GroupError(
                f"there is no group '{key}'; print the groups to see their names, such as {list(self._by_name)[:3]}."
            )
        return self._by_name[key]

    @property
    def graph(self) -> Graph | None:
        """The trace that the groups were found in."""
        return None if self.structure is None else self.structure.graph

    @property
    def tracer(self) -> Tracer:
        """Hands the trace on: ``ModelSpeedup(model, dummy_input, masks, tracer=groups.tracer)``.

        Inputs of other shapes, with which a speedup checks a generated forward, are traced anew.

        Raises:
            GroupError: the groups were found without a trace.
        """
        structure = self.structure
        if structure is None:
            raise GroupError(
                "these groups were found without a dummy input, so there is no trace to hand on. Use "
                "ModelSpeedup's own tracer."
            )
        known = _shapes(structure.inputs)
        return lambda model, inputs: (
            structure.graph if _shapes(inputs) == known else trace(model, inputs, structure.tracer)
        )

    def check(self) -> None:
        """Whether the model still has the parameters that the groups are made of.

        Raises:
            GroupError: one is gone, or has another size: the model was sped up meanwhile, say.
        """
        weights = named_weights(self.model)
        for group in self:
            for m in group.members:
                size = m.units.shape[m.axis]
                if m.name not in weights or weights[m.name].shape[m.axis] != size:
                    found = f"is {tuple(weights[m.name].shape)} now" if m.name in weights else "is gone"
                    raise GroupError(
                        f"group '{group.name}' takes {size} units of axis {m.axis} of '{m.name}', which {found}: the "
                        "model was changed. Make a new pruner, or find the groups again."
                    )

    def to_dict(self, indices: bool = True) -> dict[str, Any]:
        """Plain data of all groups."""
        return {"groups": [g.to_dict(indices) for g in self]}

    def to_json(self, indices: bool = True) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(indices))

    def table(self) -> Table:
        """One line a group."""
        table = Table()
        for title in _COLUMNS:
            table.add_column(title, justify="right" if "unit" in title else "left", overflow="fold")
        for row in self._rows():
            table.add_row(*row)
        return table

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """What :data:`_COLUMNS` name, a row a group."""
        for g in self:
            cost = (f"{g.cost.parameters:,}", f"{g.cost.flops:,}") if g.structure is not None else ("?", "?")
            default = "yes" if g.default else "no"
            yield g.name, g.granularity, default, str(g.size), *cost, str(len(g.modules)), str(len(g.consumers))

    def _repr_html_(self) -> str:
        from maskprop.view.tables import html_table

        return html_table(f"{type(self.model).__name__}: {len(self)} prunable groups", _COLUMNS, self._rows())

    def __str__(self) -> str:
        console = Console(width=140, file=None, record=True, quiet=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def draw(self, path: str | Path) -> None:
        """Draw the groups: a row a group, a column a module in the order of execution.

        Args:
            path: the picture's file; its suffix decides the format.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from maskprop.pruning.picture import draw_groups

        draw_groups(self, Path(path))


def _shapes(inputs: Inputs) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in tensors_in(inputs)]
