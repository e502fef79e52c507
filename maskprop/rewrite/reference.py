"""Outputs computed from a recorded graph: of the masked model, and of models that are on the meta device.

A graph is pure, so it runs with ``weight * mask`` in place of the weights without touching the model, whatever
hooks or parametrisations its modules have, and with weights that are read when their op comes and dropped after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from maskprop.graph.graph import Graph

# A real kernel may choose other strides than the recorded one did; then only a reshape always works.
_BY_VALUE = {torch.ops.aten.view.default: torch.reshape, torch.ops.aten._unsafe_view.default: torch.reshape}

Values = Callable[[str], Tensor]


def masked_values(graph: Graph, masks: Mapping[str, Tensor]) -> Values:
    """The graph's tensors by name, with the masks applied."""

    def value(name: str) -> Tensor:
        tensor = graph.value(name)
        return tensor * masks[name].to(tensor) if name in masks else tensor

    return value


def run_graph(graph: Graph, values: Values, inputs: list[Tensor]) -> Iterator[tuple[fx.Node, Any]]:
    """Run the graph, yielding every node with its value; values are dropped after their last use."""
    uses = {node: len(node.users) for node in graph.fx.nodes}
    made: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            made[node] = next(given)
        elif node.op == "get_attr":
            made[node] = values(str(node.target))
        elif node.op == "output":
            yield node, [made[n] for n in node.args[0]]
            return
        else:
            target = _BY_VALUE.get(node.target, node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
            with torch.no_grad():  # not around the loop: whoever stops reading leaves it where it is
                made[node] = target(*args, **_off_meta(kwargs))
        yield node, made[node]
        for source in node.all_input_nodes:
            uses[source] -= 1
            if not uses[source]:
                del made[source]


def outputs_of(graph: Graph, values: Values, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs of a recorded model, in the order of ``graph.output_paths``."""
    outputs: list[Tensor] = []
    for node, value in run_graph(graph, values, inputs):
        if node.op == "output":
            outputs = value
    return outputs


def _off_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a trace on the meta device makes there is made on the CPU when it runs."""
    device = kwargs.get("device")
    return kwargs if device is None or device.type != "meta" else {**kwargs, "device": torch.device("cpu")}
