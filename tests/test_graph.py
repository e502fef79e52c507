"""The graph as data: its checker, its printed form, its view as a NetworkX graph."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskprop import ModelSpeedup
from maskprop.errors import TraceError
from maskprop.graph.graph import Graph, TensorMeta, shape_of
from maskprop.graph.trace import Inputs, split_inputs, trace
from tests.small import MODELS, dense, inputs


class Block(nn.Module):
    """A residual sum, an op of two results, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        low, high = F.relu(self.fc1(x)).chunk(2, -1)
        return x + self.fc2(torch.cat([high, low], -1))


@pytest.fixture
def block() -> Block:
    return Block().eval()


@pytest.fixture
def graph(block: Block) -> Graph:
    return trace(block, split_inputs(torch.randn(2, 4)))


def node_of(graph: Graph, name: str) -> torch.fx.Node:
    return next(n for n in graph.ops if n.target.__name__.startswith(name + "."))


# --- the checker ------------------------------------------------------------------------------------------


def no_metadata(graph: Graph) -> None:
    del node_of(graph, "relu").meta["tensor"]


def no_place(graph: Graph) -> None:
    del node_of(graph, "relu").meta["path"]


def no_tensor(graph: Graph) -> None:
    del graph.state["fc1.weight"]


def a_python_function(graph: Graph) -> None:
    node_of(graph, "relu").target = torch.relu


def a_module_call(graph: Graph) -> None:
    node = node_of(graph, "relu")
    node.op, node.target = "call_module", "fc1"


def too_few_results(graph: Graph) -> None:
    split = node_of(graph, "split")
    split.meta["tensor"] = split.meta["tensor"][:1]


def one_of_one_result(graph: Graph) -> None:
    getitem = next(iter(node_of(graph, "split").users))
    getitem.args = (node_of(graph, "relu"), 0)


def no_output(graph: Graph) -> None:
    graph.fx.erase_node(graph.nodes[-1])


def two_outputs(graph: Graph) -> None:
    graph.fx.output((graph.nodes[0],))


def read_before_made(graph: Graph) -> None:
    node_of(graph, "add").prepend(node_of(graph, "relu"))


def an_in_place_call(graph: Graph) -> None:
    node_of(graph, "relu").target = torch.ops.aten.relu_.default


BROKEN = {
    no_metadata: r"'relu_default' \(aten.relu.default\) has no meta\['tensor'\]",
    no_place: r"'relu_default' \(aten.relu.default\) has no meta\['path'\]",
    no_tensor: "'p_fc1_weight' reads 'fc1.weight', which is not among the graph's tensors",
    a_python_function: "'relu_default' is a call_function of .*relu.*, and no torch op",
    a_module_call: "'relu_default' is a call_module of fc1, and no torch op",
    too_few_results: "'getitem_1' takes result 1 of 'split_tensor', which has 1",
    one_of_one_result: "'getitem' takes result 0 of 'relu_default', which has just one",
    no_output: "its one and only output node, and has 0",
    two_outputs: "its one and only output node, and has 2",
    read_before_made: "'split_tensor' reads 'relu_default', which is not made before it",
    an_in_place_call: r"'relu_default' \(aten.relu_.default\) writes to its argument",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_broken_graph_is_refused(block: Block, damage: Callable[[Graph], None]) -> None:
    def tracer(model: nn.Module, given: Inputs) -> Graph:
        made = trace(model, given)
        damage(made)
        return made

    before = {name: p.clone() for name, p in block.named_parameters()}
    with pytest.raises(TraceError, match=BROKEN[damage]):
        ModelSpeedup(block, torch.randn(2, 4), {"fc1.weight": torch.zeros(8, 1)}, tracer=tracer).speedup_model()
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_whole_graphs_pass(name: str) -> None:
    graph = trace(dense(name), split_inputs(inputs(name)))
    graph.check()
    assert all(n.meta["path"] in dict(dense(name).named_modules()) for n in graph.ops)


# --- printed ----------------------------------------------------------------------------------------------


def test_it_prints_every_call_with_its_shapes_and_place(graph: Graph) -> None:
    lines = str(graph).splitlines()
    assert len(lines) == len(graph.nodes)
    text = "\n".join(lines)
    assert "%input_0_0_0 = placeholder input_0_0_0()  # float32[2, 4]  ''" in lines
    assert "%p_fc1_weight = get_attr fc1.weight()  # float32[8, 4]  'fc1'" in lines
    assert "%relu_default = aten.relu.default(%addmm_default)  # float32[2, 8]  ''" in lines
    assert "aten.split.Tensor(%relu_default, 4, -1)  # float32[2, 4] | float32[2, 4]  ''" in text
    assert "aten.cat.default([%" in text


# --- as a NetworkX graph ----------------------------------------------------------------------------------


def test_the_dependency_graph_has_an_edge_from_each_value_to_each_reader(graph: Graph) -> None:
    found = graph.dependencies()
    assert isinstance(found, nx.DiGraph)
    assert set(found) == {n.name for n in graph.nodes}
    assert set(found.edges) == {(source.name, n.name) for n in graph.nodes for source in n.all_input_nodes}
    assert all(found.nodes[n.name]["node"] is n for n in graph.nodes)
    assert nx.is_directed_acyclic_graph(found)
    order = [n.name for n in graph.nodes]
    assert all(order.index(a) < order.index(b) for a, b in found.edges)


def test_what_depends_on_what_can_be_asked_of_it(graph: Graph) -> None:
    found = graph.dependencies()
    x, end = graph.nodes[0].name, graph.nodes[-1].name
    second = node_of(graph, "cat").name
    assert nx.has_path(found, x, end)
    assert nx.ancestors(found, second) >= {x, "p_fc1_weight", "relu_default"}
    assert "p_fc2_weight" not in nx.ancestors(found, second)
    assert {"output"} < nx.descendants(found, "p_fc1_weight")
    without = nx.restricted_view(found, [second], [])
    assert nx.has_path(without, x, end), "the residual sum goes around the layers"
    assert not nx.has_path(without, "p_fc1_weight", end)


# --- metadata ---------------------------------------------------------------------------------------------


def test_metadata_knows_how_a_tensor_lies_in_memory() -> None:
    image = torch.zeros(2, 3, 4, 5)
    assert TensorMeta.of(image).order == ()
    assert TensorMeta.of(image.contiguous(memory_format=torch.channels_last)).order == (0, 2, 3, 1)
    assert TensorMeta.of(image) == TensorMeta.of(image.contiguous(memory_format=torch.channels_last))
    assert str(TensorMeta.of(image.bool())) == "bool[2, 3, 4, 5]"


def test_the_shape_of_several_results_is_refused(graph: Graph) -> None:
    with pytest.raises(TraceError, match=r"'split_tensor' \(aten.split.Tensor\) holds several tensors"):
        shape_of(node_of(graph, "split"))
