"""Why a unit left or stayed, with the path through the dependency graph that decided it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, fx

from maskprop.align.align import Alignment
from maskprop.errors import OptionError
from maskprop.graph.graph import is_op, shape_of
from maskprop.infer.coupling import Pin
from maskprop.infer.facts import Fact
from maskprop.infer.sweep import Inference
from maskprop.reasons import Explanation, Kept, Reason
from maskprop.unitfacts import UnitFacts, pins_by_node

if TYPE_CHECKING:
    import networkx as nx


@dataclass
class Explainer:
    """Answers questions about a solved alignment.

    Attributes:
        inference: after its sweeps.
        alignment: the one that was carried out.
        masks: by tensor name, broadcastable.
    """

    inference: Inference
    alignment: Alignment
    masks: Mapping[str, Tensor]
    _cache: dict[tuple[str, int, int], Reason] = field(default_factory=dict)

    # -- questions ------------------------------------------------------------------------------

    def explain(self, name: str, axis: int = 0) -> Explanation:
        """Reasons for every unit of an axis.

        Args:
            name: of a parameter, or of a module (its weight is then meant).
            axis: of the parameter; 0 holds the outputs of most layers.

        Raises:
            OptionError: the model has no such parameter in use, or the parameter no such axis.
        """
        parameter = self._parameter(name)
        node = self.alignment.states[parameter]
        count = len(shape_of(node))
        if not -count <= axis < count:
            raise OptionError(
                f"explain: '{parameter}' has {count} axes, so axis {axis} does not exist. Choose one of 0..{count - 1}."
            )
        axis %= count
        return Explanation(parameter, axis, tuple(self._reason(node, axis, i) for i in range(shape_of(node)[axis])))

    def kept(self) -> list[Kept]:
        """Every unit that a mask prunes whole and that stayed, units of one parameter and reason together."""
        found: list[Kept] = []
        for name, mask in self.masks.items():
            node = self.alignment.states.get(name)
            if node is None or not self._is_primary(name):
                continue
            for axis, size in enumerate(shape_of(node)):
                pruned = _whole(mask, len(shape_of(node)), axis, size)
                groups: dict[Reason, list[int]] = {}
                for unit in pruned:
                    reason = self._reason(node, axis, unit, only_kept=True)
                    if not reason.left:
                        groups.setdefault(reason, []).append(unit)
                found += [Kept(name, axis, tuple(units), reason) for reason, units in groups.items()]
        return found

    def _parameter(self, name: str) -> str:
        states, aliases = self.alignment.states, self.inference.graph.aliases
        for candidate in (name, f"{name}.weight" if name else "weight"):
            resolved = aliases.get(candidate, candidate)
            if resolved in states:
                return resolved
        inside = [s for s in states if s.startswith(f"{name}.")]
        if inside:
            raise OptionError(
                f"explain: '{name}' has no weight of its own. Name one of its parameters, such as '{inside[0]}'."
            )
        known = ", ".join(f"'{s}'" for s in list(states)[:4])
        raise OptionError(
            f"explain: no parameter or module '{name}' takes part in the forward pass. It has {known}, and so on."
        )

    def _is_primary(self, name: str) -> bool:
        """A bias is pruned along with its weight and is not counted apart."""
        node = self.alignment.states[name]
        path = name.rpartition(".")[0]
        return len(shape_of(node)) > 1 or f"{path}.weight".lstrip(".") in (
            name,
            *(() if path else ("weight",)),
        )

    # -- one unit -------------------------------------------------------------------------------

    def _reason(self, node: fx.Node, axis: int, unit: int, only_kept: bool = False) -> Reason:
        if node in self.inference.left:
            return _GONE if only_kept else Reason(True, "what its layer puts out is the same for every input")
        labels = self.alignment.coupling.labels_of(node)[axis]
        if labels is None:
            return Reason(False, "this axis never shrinks")
        groups = np.unique(self.alignment.solution.groups_of(labels).take(unit, axis))
        removed = self.alignment.solution.removed[groups]
        if removed.all():
            return _GONE if only_kept else self._left(int(groups[0]))
        return self._stayed(node, int(groups[~removed][0]))

    def _stayed(self, node: fx.Node, group: int) -> Reason:
        chain, restored = self._cause(group)
        if restored:
            return Reason(False, restored)
        key = (node.name, self._units.signature(group), self._units.signature(chain[-1]))
        if key not in self._cache:
            self._cache[key] = self._why_pinned(node, chain)
        return self._cache[key]

    def _why_pinned(self, node: fx.Node, chain: list[int]) -> Reason:
        carriers = {n for g in chain for n in self._units.carriers(g)}
        route, pin = self._nearest(node, self._units.pins[chain[-1]], carriers)
        sink = self._nodes[pin.node]
        writers = tuple(dict.fromkeys(self._writers(chain[-1], sink)))
        own = str(node.target).rpartition(".")[0]
        text = self._sentence(pin, sink, writers, own, self._meeting(route, chain[-1]))
        return Reason(False, text, _place(sink), writers, self._places(route))

    @staticmethod
    def _sentence(pin: Pin, sink: fx.Node, writers: tuple[str, ...], own: str, join: fx.Node | None) -> str:
        if pin.live:
            end = f"'{_place(sink)}' reads it"
        elif is_op(sink) and str(sink.target) in pin.reason:
            end = pin.reason
        elif sink.op == "output":
            end = f"it {pin.reason}"
        else:
            end = f"it {pin.reason} ({_op_name(sink)} in '{_place(sink)}')"
        others = [w for w in writers if w != own]
        if own in writers or not others:
            return end
        names = " and ".join(f"'{w}'" for w in others[:3])
        if join is None:
            return f"it holds what {names} put there, and {end}"
        return f"it meets {names} at {_op_name(join)} in '{_place(join)}', where it is live, and {end}"

    def _meeting(self, route: list[fx.Node], group: int) -> fx.Node | None:
        """The first op on a route where something live joins the unit."""
        on_route = set(route)
        return next(
            (
                n
                for n in route[:-1]
                if is_op(n) and any(s not in on_route and self._units.live(s, group) for s in n.all_input_nodes)
            ),
            None,
        )

    def _cause(self, group: int) -> tuple[list[int], str]:
        """The chain of groups from one to a pinned one, or to one that was restored, and why it was."""
        s = self.alignment.solution
        queue, seen = deque([[group]]), {group}
        while queue:
            chain = queue.popleft()
            last = chain[-1]
            if last in self._units.pins:
                return chain, ""
            if last in s.restored:
                return chain, s.restored[last]
            for follower in self._holders(last):
                if follower not in seen:
                    seen.add(follower)
                    queue.append([*chain, follower])
        return [group], "nothing that is understood allows it to leave"

    def _holders(self, group: int) -> Iterator[int]:
        """Groups that keep this one: a row's outer and inner unit, and their rows that may not leave."""
        s = self.alignment.solution
        t = s.triples
        if not len(t):
            return
        for _, outer, inner in t[t[:, 0] == group]:
            yield from (int(outer), int(inner))
        for row, _, _ in t[(t[:, 1] == group) | (t[:, 2] == group)]:
            if not s.may[row]:
                yield int(row)

    def _left(self, group: int) -> Reason:
        key = ("", self._units.signature(group), 0)
        if key not in self._cache:
            readers: dict[str, list[str]] = {}
            for text, name in self._landing(group):
                if name not in readers.setdefault(text, []):
                    readers[text].append(name)
            parts = [text.format(" and ".join(f"'{n}'" for n in names)) for text, names in readers.items()]
            self._cache[key] = Reason(True, "; ".join(parts) or "its whole outer unit (a head, a group) leaves")
        return self._cache[key]

    def _landing(self, group: int) -> Iterator[tuple[str, str]]:
        """What becomes of the unit at every op that reads it."""
        carriers = self._units.carriers(group)
        for value in carriers:
            if not self._units.values[value].total:  # else it is made from parameters alone
                for reader in value.users:
                    if is_op(reader) and not self._units.carries(reader, group):
                        yield self._landing_at(value, reader, group), _place(reader)

    def _landing_at(self, value: fx.Node, reader: fx.Node, group: int) -> str:
        if not self._units.nonzero(value, group):
            return "it is zero for every input at {}"
        if not self._units.live(value, group):
            place = next((k.place for k in self.alignment.coupling.contractions if k.op.node is reader), None)
            if place == "bias":
                return "it is a constant, now part of the bias behind {}"
            if place == "carrier":
                return "it is a constant, which the constant unit that stays carries for {}"
            return "it is a constant that is not needed at {}"
        return "the weights of {} that read it are zero"

    # -- the graph ------------------------------------------------------------------------------

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.inference.graph.fx.nodes}

    @cached_property
    def _order(self) -> dict[fx.Node, int]:
        return {n: i for i, n in enumerate(self.inference.graph.fx.nodes)}

    @cached_property
    def _dependencies(self) -> nx.DiGraph:
        return self.inference.graph.dependencies()

    @cached_property
    def _units(self) -> UnitFacts:
        return UnitFacts(self.inference, self.alignment)

    def _nearest(self, source: fx.Node, pins: list[Pin], carriers: Iterable[fx.Node]) -> tuple[list[fx.Node], Pin]:
        """The pin nearest to a parameter, and the way there through values that carry the unit."""
        sinks = dict(pins_by_node(pins))
        nodes = {n.name for n in carriers} | {source.name, *sinks}
        nodes |= {u.name for n in carriers for u in n.users if sum(s in carriers for s in u.all_input_nodes) > 1}
        view = self._dependencies.subgraph(nodes).to_undirected(as_view=True)
        import networkx as nx  # here, since it takes a while to import

        routes = nx.single_source_shortest_path(view, source.name)
        reached = [name for name in sinks if name in routes]
        if not reached:
            return [], pins[0]
        best = min(reached, key=lambda name: len(routes[name]))
        return [self._nodes[name] for name in routes[best]], sinks[best]

    def _places(self, route: Iterable[fx.Node]) -> tuple[str, ...]:
        """The modules along a route, each once in a row, with the op where values meet."""
        found: list[str] = []
        for node in route:
            if is_op(node) or node.op == "output":
                place = _place(node)
                if is_op(node) and sum(self._depends_on_input(s) for s in node.all_input_nodes) > 1:
                    place = f"{place} ({_op_name(node)})"
                if not found or found[-1] != place:
                    found.append(place)
        return tuple(found)

    def _depends_on_input(self, node: fx.Node) -> bool:
        fact = self.inference.facts.known.get(node)
        return not (isinstance(fact, Fact) and fact.total)

    def _writers(self, group: int, sink: fx.Node) -> Iterator[str]:
        """Modules that write what varies into the unit, walking back from where it is read."""
        stack, seen = [n for n in sink.all_input_nodes if self._units.live(n, group)], set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            before = [n for n in node.all_input_nodes if self._units.live(n, group)]
            if not before:
                yield _place(node)
            stack += before


_GONE = Reason(True, "")


def _whole(mask: Tensor, ndim: int, axis: int, size: int) -> list[int]:
    """Units along an axis of which the mask prunes every element."""
    pruned = ~mask.bool().cpu().reshape((1,) * (ndim - mask.ndim) + tuple(mask.shape))
    for other in range(ndim):
        if other != axis:
            pruned = pruned.all(other, keepdim=True)
    flat = pruned.reshape(-1).expand(size) if pruned.numel() == 1 else pruned.reshape(-1)
    return [int(i) for i in flat.nonzero()[:, 0]]


def _place(node: fx.Node) -> str:
    """The module that an op belongs to, for people."""
    return (
        "output"
        if node.op == "output"
        else str(node.meta.get("path", "")) or str(getattr(node.meta.get("module"), "__name__", "model"))
    )


def _op_name(node: fx.Node) -> str:
    """``add`` for ``aten.add.Tensor``."""
    return str(node.target).split(".")[1] if is_op(node) else str(node.target)
