"""The model as a graph of layers, coloured by coupled group and laid out for a page."""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
import numpy as np
from torch import fx

from maskprop.explain import Explainer
from maskprop.graph.graph import is_op


@dataclass
class Box:
    """A node of the drawing.

    Attributes:
        name: unique.
        label: what it shows.
        before, after: units on its coupled axis; ``None`` where there is none.
        group: number of its coupled group, or -1.
        x, y: column and row.
    """

    name: str
    label: str
    before: int | None = None
    after: int | None = None
    group: int = -1
    x: float = 0.0
    y: int = 0


@dataclass
class Network:
    """Boxes by name, edges between them, and how many coupled groups there are."""

    boxes: dict[str, Box] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    groups: int = 0


def network(explainer: Explainer) -> Network:
    """Layers that own parameters, the ops where values meet, inputs and outputs.

    Two boxes have one colour when units on their output axes leave together.
    """
    graph = explainer.inference.graph
    made = Network()
    feeds: dict[fx.Node, frozenset[str]] = {}
    edges: set[tuple[str, str]] = set()
    values: dict[str, fx.Node] = {}
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            continue
        sources = [s for s in node.all_input_nodes if s.op != "get_attr"]
        before = frozenset().union(*(feeds[s] for s in sources))
        if node.op != "placeholder" and not sources:
            feeds[node] = frozenset()
            continue
        name = _key(node, before)
        if name is None:
            feeds[node] = before
            owner = next(iter(before)) if len(before) == 1 else ""
            if owner in values and isinstance(values[owner].meta["tensor"], tuple):
                values[owner] = node  # the first of several results shows the width
            continue
        made.boxes.setdefault(name, Box(name, _label(node)))
        values[name] = node
        edges |= {(source, name) for source in before if source != name}
        feeds[node] = frozenset([name])
    made.edges = sorted(edges)
    _colour(made, explainer, values)
    _lay_out(made)
    return made


def _key(node: fx.Node, before: frozenset[str]) -> str | None:
    """The box that a node belongs to, or ``None`` if it only passes values on."""
    if node.op in ("placeholder", "output"):
        return node.name
    if is_op(node) and any(s.op == "get_attr" for s in node.all_input_nodes):
        return str(node.meta["path"]) or node.name
    return node.name if is_op(node) and len(before) > 1 else None


def _label(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        return "output"
    if any(s.op == "get_attr" for s in node.all_input_nodes):
        return str(node.meta["path"]) or str(node.target).split(".")[1]
    return str(node.target).split(".")[1]


def _colour(made: Network, explainer: Explainer, values: dict[str, fx.Node]) -> None:
    """Number the coupled groups: boxes that share a group of units share a number."""
    s, labels = explainer.alignment.solution, explainer.alignment.coupling.labels
    shared = nx.Graph()
    for name, node in values.items():
        found = labels.get(node)
        arrays = [] if found is None or isinstance(found, tuple) else [a for a in found if a is not None]
        if not arrays:
            continue
        units = max(arrays, key=lambda a: a.numel())
        groups = s.groups_of(units).reshape(-1)
        box = made.boxes[name]
        box.before, box.after = len(groups), int((~s.removed[groups]).sum())
        shared.add_edges_from((name, int(g)) for g in np.unique(groups))
    components = list(nx.connected_components(shared))
    for number, component in enumerate(components):
        for name in component:
            if isinstance(name, str):
                made.boxes[name].group = number
    made.groups = len(components)


def _lay_out(made: Network) -> None:
    """Rows by longest path from the inputs; within a row, boxes near what feeds them."""
    graph = nx.DiGraph(made.edges)
    graph.add_nodes_from(made.boxes)
    if not nx.is_directed_acyclic_graph(graph):  # a module that is called twice feeds itself
        graph = nx.DiGraph((a, b) for a, b in made.edges if list(made.boxes).index(a) < list(made.boxes).index(b))
        graph.add_nodes_from(made.boxes)
    for row, names in enumerate(nx.topological_generations(graph)):
        wanted = {}
        for name in names:
            above = [made.boxes[p].x for p in graph.predecessors(name)]
            wanted[name] = sum(above) / len(above) if above else 0.0
        ordered = sorted(names, key=lambda n: (wanted[n], n))
        centre = sum(wanted.values()) / len(wanted)
        for i, name in enumerate(ordered):
            box = made.boxes[name]
            box.x, box.y = centre + i - (len(ordered) - 1) / 2, row
