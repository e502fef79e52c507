"""The masked model's outputs, computed from the recorded graph.

The graph is pure, so it runs with ``weight * mask`` in place of the weights without touching the model, whatever
hooks or parametrisations its modules have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from maskprop.graph.graph import Graph

# A real kernel may choose other strides than the recorded one did; then only a reshape always works.
_BY_VALUE = {torch.ops.aten.view.default: torch.reshape, torch.ops.aten._unsafe_view.default: torch.reshape}


def masked_state(graph: Graph, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The graph's tensors with masks applied (copies of the masked ones only)."""
    return {name: t.detach() * masks[name].to(t) if name in masks else t.detach() for name, t in graph.state.items()}


def run_graph(graph: Graph, state: Mapping[str, Tensor], inputs: list[Tensor]) -> Iterator[tuple[fx.Node, Any]]:
    """Run the graph, yielding every node with its value; values are dropped after their last use."""
    uses = {node: len(node.users) for node in graph.fx.nodes}
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    with torch.no_grad():
        for node in graph.fx.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = state[str(node.target)]
            elif node.op == "output":
                yield node, [values[n] for n in node.args[0]]
                return
            else:
                target = _BY_VALUE.get(node.target, node.target)
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = target(*args, **kwargs)
            yield node, values[node]
            for source in node.all_input_nodes:
                uses[source] -= 1
                if not uses[source]:
                    del values[source]


def reference_outputs(graph: Graph, state: Mapping[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs of the masked model, in the order of ``graph.output_paths``."""
    outputs: list[Tensor] = []
    for node, value in run_graph(graph, state, inputs):
        if node.op == "output":
            outputs = value
    return outputs
