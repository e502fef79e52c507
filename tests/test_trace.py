"""The tracer: dtypes, values that Python reads, and what running a graph leaves behind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskprop.graph.graph import TensorMeta
from maskprop.graph.trace import split_inputs, trace
from maskprop.rewrite.reference import run_graph


class Reads(nn.Module):
    """Compares, and branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.fc(x)
        if h.mean() > 1e6:
            h = -h
        return h, h > 0


def test_recorded_metadata_is_that_of_the_values() -> None:
    model, x = Reads().eval(), torch.randn(2, 4)
    graph = trace(model, split_inputs(x))
    assert graph.concrete  # a value was read
    for node, value in run_graph(graph, lambda name: graph.state[name], [x]):
        if isinstance(value, Tensor):
            assert node.meta["tensor"] == TensorMeta.of(value)


def test_a_graph_that_is_run_in_part_leaves_the_grad_mode_alone() -> None:
    model, x = Reads().eval(), torch.randn(2, 4)
    graph = trace(model, split_inputs(x))
    running = run_graph(graph, lambda name: graph.state[name], [x])
    for _ in range(5):
        next(running)
        assert torch.is_grad_enabled()
