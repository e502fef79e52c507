"""Walk the graph once and collect labels and relations."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from maskprop.infer.coupling import Coupling
from maskprop.infer.sweep import Inference


def couple(inference: Inference, constants: str, even: frozenset[str] = frozenset()) -> Coupling:
    """Labels of every value and the relations between them.

    Args:
        inference: after its sweeps.
        constants: ``"exact"``, ``"fold"`` or ``"drop"``.
        even: see :class:`maskprop.infer.coupling.Coupling`.
    """
    facts = inference.facts
    c = Coupling(
        constants=constants,
        even=even,
        facts=facts.known,
        needed=facts.needed,
    )
    for node in inference.graph.fx.nodes:
        c.node = node.name
        if node in inference.left:
            stand_in = inference.left[node]
            c.labels[node] = _unlabelled(node.meta["tensor"]) if stand_in is None else stand_in.couple(c)
        elif node.op == "placeholder":
            c.labels[node] = _unlabelled(node.meta["tensor"])
        elif node.target is operator.getitem:
            c.labels[node] = c.labels[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            op = inference.op(node)
            c.labels[node] = inference.rule(node).couple(op, [c.labels_of(n) for n in op.inputs], c)
        elif node.op == "output":
            for source in node.all_input_nodes:
                _keep(source, c, "is an output of the model")
        if inference.graph.may_be_read(node):
            _keep(node, c, "is read where no op shows it")
    return c


def _unlabelled(meta: Any) -> Any:
    """No axis shrinks, of one value or of several."""
    if isinstance(meta, tuple):
        return tuple(_unlabelled(m) for m in meta)
    return [] if meta is None else [None] * len(meta.shape)


def _keep(node: fx.Node, c: Coupling, reason: str) -> None:
    labels: Any = c.labels_of(node)
    for one in labels if isinstance(labels, tuple) else [labels]:
        c.pin_all(one, reason)
