"""Walk the graph once and collect labels and relations."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from maskprop.graph.graph import is_op, shape_of
from maskprop.infer.coupling import Coupling, Cut, Labels, LabelsOf, moved
from maskprop.infer.facts import lead
from maskprop.infer.op import Op
from maskprop.infer.rules.movement import Movement, Parts
from maskprop.infer.rules.pointwise import Pointwise, Uniform
from maskprop.infer.sweep import Inference


def couple(
    inference: Inference, constants: str, even: frozenset[str] = frozenset(), cuts: frozenset[Cut] = frozenset()
) -> Coupling:
    """Labels of every value and the relations between them.

    Args:
        inference: after its sweeps.
        constants: ``"exact"``, ``"fold"`` or ``"drop"``.
        even: see :class:`maskprop.infer.coupling.Coupling`.
        cuts: likewise.
    """
    facts = inference.facts
    c = Coupling(
        constants=constants,
        even=even,
        cuts=cuts,
        facts=facts.known,
        needed=facts.needed,
    )
    literal = _literal_tables(inference)
    shared = _shared_tables(inference) | literal
    for node in inference.graph.fx.nodes:
        c.node = node.name
        if node in inference.left:
            stand_in = inference.left[node]
            c.labels[node] = _unlabelled(node.meta["tensor"]) if stand_in is None else stand_in.couple(c)
        elif node.op == "placeholder" or (node in literal and literal.isdisjoint(node.all_input_nodes)):
            c.labels[node] = _unlabelled(node.meta["tensor"])
        elif node.target is operator.getitem:
            c.labels[node] = c.labels[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            op = inference.op(node)
            labels: Sequence[Labels] = LabelsOf(op.inputs, c)
            pointwise = torch.Tag.pointwise in op.target.tags or op.target is torch.ops.aten.baddbmm.default
            if pointwise and node not in literal:
                labels = [_on_entry(op, i, labels, c) if n in shared else labels[i] for i, n in enumerate(op.inputs)]
            c.labels[node] = inference.rule(node).couple(op, labels, c)
        elif node.op == "output":
            for source in node.all_input_nodes:
                _keep(source, c, "is an output of the model")
        if inference.graph.may_be_read(node):
            _keep(node, c, "is read where no op shows it")
    for node in inference.graph.fx.nodes:  # now that every reader has given its labels
        if node.op == "get_attr" and node not in inference.left and _is_state_weight(node):
            c.node = node.name
            _tie_state(node, c)
    for node, last in inference.renewed():
        if last is None:
            _keep(node, c, "is written to where no op shows it")
            continue
        c.node = last.name
        for before, after in zip(c.labels_of(node), c.labels_of(last), strict=True):
            c.equal(before, after)
    return c


def _is_state_weight(node: fx.Node) -> bool:
    recurrent = issubclass(node.meta.get("module", object), (nn.RNNBase, nn.RNNCellBase))
    return recurrent and str(node.target).rpartition(".")[2].startswith("weight_hh")


def _tie_state(node: fx.Node, c: Coupling) -> None:
    """A recurrent kernel wants as many columns for its state as rows for each gate, also where the state is zero."""
    rows, columns = c.labels_of(node)
    count, size = shape_of(node)
    gates, rest = divmod(count, size)
    if columns is None or rest or gates not in (1, 3, 4):  # a projected state has a size of its own
        return
    for gate in (None,) * gates if rows is None else rows.reshape(gates, -1):
        c.equal(gate, columns.reshape(-1))


def _unlabelled(meta: Any) -> Any:
    """No axis shrinks, of one value or of several."""
    if isinstance(meta, tuple):
        return tuple(_unlabelled(m) for m in meta)
    return [] if meta is None else [None] * len(meta.shape)


def _keep(node: fx.Node, c: Coupling, reason: str) -> None:
    labels: Any = c.labels_of(node)
    for one in labels if isinstance(labels, tuple) else [labels]:
        c.pin_all(one, reason)


def _on_entry(op: Op, position: int, labels: Sequence[Labels], c: Coupling) -> Labels:
    """Labels of a shared operand as it enters an op: its own, or where it is cut there, those of what it meets.

    Cutting what can shrink and has no other reader gains nothing.
    """
    own, alone = list(labels[position]), _read_once(op.inputs[position], c)
    for axis, n in enumerate(op.shapes[position]):
        place = axis - len(own)
        if n == 1 or (op.target is torch.ops.aten.baddbmm.default and axis):
            continue
        reach = (a for i, a in enumerate(labels) if i != position and len(a) >= -place and op.shapes[i][place] == n)
        met = next((a[place] for a in reach if a[place] is not None), None)
        cut = op.node.name, position, place
        if met is not None and not (alone and own[axis] is not None):
            c.cuttable[cut] = own[axis], met
        if met is not None and cut in c.cuts:
            c.pin(own[axis], "is cut where it is read")
            same = c.uniform(met, [d for d in range(met.ndim) if d != met.ndim + place])
            own[axis] = moved(same, lambda a: a.reshape(a.shape[max(0, a.ndim - len(own)) :]))
            own[axis] = moved(own[axis], lambda a: lead(a, len(own)))
    return own


def _read_once(node: fx.Node, c: Coupling) -> bool:
    """Whether nothing else reads a value, or the numbers that it was made of."""
    if len(node.users) != 1:
        return False
    metas = ((n, n.meta["tensor"]) for n in node.all_input_nodes)
    made_of = [n for n, meta in metas if isinstance(meta, tuple) or meta.dtype.is_floating_point]
    return all(_read_once(n, c) for n in made_of if any(a is not None for a in c.labels_of(n)))


def _literal_tables(inference: Inference) -> set[fx.Node]:
    """Values that ``forward`` makes of numbers alone, as ``torch.arange(8)``, which does not shrink.

    One number everywhere is no table: its sizes follow those of what it meets.
    """
    made: set[fx.Node] = set()
    uniform: set[fx.Node] = set()
    for node in inference.graph.fx.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" and "lifted" in node.meta:
            made.add(node)
            if not shape_of(node):
                uniform.add(node)
        elif node.op == "call_function" and node not in inference.left and made.issuperset(sources):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                continue
            made.add(node)
            rule = None if node.target is operator.getitem else inference.rule(node)
            follows = rule is None or isinstance(rule, (Movement, Parts, Pointwise))
            if isinstance(rule, Uniform) or (follows and sources and uniform.issuperset(sources)):
                uniform.add(node)
    return made - uniform


def _shared_tables(inference: Inference) -> set[fx.Node]:
    """Values that several modules read and that no activation went into: slopes, rotations, position biases.

    What a layer that left puts out is one too.
    """
    active: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in inference.graph.fx.nodes:
        if node.op == "placeholder":
            if node.meta["tensor"].dtype.is_floating_point:
                active.add(node)
            continue
        if node in inference.left and inference.left[node] is None:
            continue
        indexed = node.target is torch.ops.aten.embedding.default and not inference.facts.known[node.args[1]].total
        made = node not in inference.left
        if indexed or (made and not active.isdisjoint(node.all_input_nodes)):
            active.add(node)
        elif is_op(node) and any(user.meta.get("call", node.meta["call"]) != node.meta["call"] for user in node.users):
            found.add(node)
        elif node.target is torch.ops.aten.slice.Tensor and node.args[0] in found:
            found.add(node)  # of a table for longer inputs
    return found
