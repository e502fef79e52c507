"""The tracer: which tensors it runs on, what it makes of Python between the layers, and what it leaves behind.

Most tests go all the way: units leave, and the compact model gives what the masked one gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.zoo.check import masked_reference, relative_error
from benchmarks.zoo.specimen import Inputs, call
from maskprop import ModelSpeedup
from maskprop.graph.graph import Graph, TensorMeta
from maskprop.graph.trace import split_inputs, trace
from maskprop.rewrite.reference import run_graph

HIDDEN = {"fc1.weight": (5, 6), "fc1.bias": (5,), "fc2.weight": (3, 5)}  # three of eight units left


class Net(nn.Module):
    """Two layers, eight units between them, and what ``body`` makes of the layers and the input."""

    def __init__(self, body: Callable[..., Any], **more: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)
        self.body = body
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def vectors(batch: int) -> Tensor:
    return torch.randn(batch, 6)


def sped_up(net: nn.Module, make: Callable[[int], Inputs] = vectors, **options: Any) -> ModelSpeedup:
    """Prune three units, compare with the masked network on fresh inputs and other batches."""
    net.eval()
    masks = {name: torch.ones_like(p) for name, p in net.named_parameters() if name in ("fc1.weight", "fc1.bias")}
    for mask in masks.values():
        mask[[0, 1, 4]] = 0
    masked = masked_reference(net, masks)
    speedup = ModelSpeedup(net, make(2), masks, **options)
    speedup.speedup_model()
    with torch.no_grad():
        for batch in (2, 1, 3):
            value = make(batch)
            assert relative_error(call(net, value), call(masked, value)) <= 1e-5
    return speedup


def shrunk(net: nn.Module, before: dict[str, Any] | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of those parameters that are not as in a fresh ``Net``."""
    dense = {"fc1.weight": (8, 6), "fc1.bias": (8,), "fc2.weight": (3, 8), "fc2.bias": (3,), **(before or {})}
    return {name: tuple(p.shape) for name, p in net.named_parameters() if dense.get(name) != tuple(p.shape)}


def traced(net: nn.Module, value: Inputs | None = None, tracer: Any = "auto") -> Graph:
    return trace(net.eval(), split_inputs(vectors(2) if value is None else value), tracer)


def plain(net: Net, x: Tensor) -> Tensor:
    return net.fc2(F.relu(net.fc1(x)))


# --- fake, concrete, meta ---------------------------------------------------------------------------------


def by_item(net: Net, x: Tensor) -> Tensor:
    return net.fc2(F.relu(net.fc1(x))) * (1 + int(x.abs().sum().item() > 0))


def by_bool(net: Net, x: Tensor) -> Tensor:
    h = net.fc1(x)
    return net.fc2(h.relu() if (x < 1e6).all() else h.sigmoid())


def by_len_of_nonzero(net: Net, x: Tensor) -> Tensor:
    rows = (x[:, 0] > -1e6).nonzero()[:, 0]
    return net.fc2(F.relu(net.fc1(x[rows])))


def by_boolean_index(net: Net, x: Tensor) -> Tensor:
    return net.fc2(F.relu(net.fc1(x[x[:, 0] > -1e6])))


def by_boolean_write(net: Net, x: Tensor) -> Tensor:
    h = F.relu(net.fc1(x)).clone()
    h[x[:, 0] > 0] = 0
    return net.fc2(h)


def by_tolist(net: Net, x: Tensor) -> Tensor:
    steps = torch.where(x[0] > -1e6, 1, 2).tolist()
    return sum(net.fc2(F.relu(net.fc1(x * n))) for n in steps)


def by_equal(net: Net, x: Tensor) -> Tensor:
    h = net.fc1(x)
    return net.fc2(h.relu()) * (1 + torch.equal(x, x + 0))


def by_numpy(net: Net, x: Tensor) -> Tensor:
    return net.fc2(F.relu(net.fc1(x))) * float(x.sign().abs().numpy().max())


@pytest.mark.parametrize(
    "body",
    [by_item, by_bool, by_len_of_nonzero, by_boolean_index, by_tolist, by_numpy, by_equal],
    ids=lambda body: body.__name__,
)
def test_a_value_that_python_reads_asks_for_the_real_input(body: Callable[..., Any]) -> None:
    net = Net(body)
    speedup = sped_up(net)
    assert speedup.graph.concrete
    assert shrunk(net) == HIDDEN
    assert "dummy input" in str(speedup.report)


@pytest.mark.parametrize("body", [plain, by_boolean_write], ids=lambda body: body.__name__)
def test_fake_tensors_are_enough_where_no_value_is_read(body: Callable[..., Any]) -> None:
    net = Net(body)
    speedup = sped_up(net)
    assert not speedup.graph.concrete
    assert "dummy input" not in str(speedup.report)
    assert shrunk(net) == HIDDEN


def test_a_number_of_the_models_own_is_read_without_the_input() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        steps = torch.linspace(0, net.steps.sum().item(), 3)  # as drop-path rates are made
        return net.fc2(F.relu(net.fc1(x)) * steps[1].item())

    net = Net(body)
    net.register_buffer("steps", torch.arange(4.0))
    speedup = sped_up(net)
    assert not speedup.graph.concrete
    assert shrunk(net) == HIDDEN


def test_a_branch_is_that_of_the_masked_model() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        h = net.fc1(x).relu()
        return net.fc2(h.tanh() if h.sum() < 20 else h.sigmoid() - 0.5)

    net = Net(body)
    with torch.no_grad():
        net.fc1.bias[:2] = 10  # which the masks take away
    assert "sigmoid.default" in {n.target.__name__ for n in traced(net).ops}
    speedup = sped_up(net)
    assert "tanh.default" in {n.target.__name__ for n in speedup.graph.ops}
    assert shrunk(net) == HIDDEN


def test_only_the_branch_taken_is_recorded() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        return net.fc2(net.fc1(x).relu() if x.mean() > 0 else net.fc1(x).tanh())

    for sign, op in ((1, "relu"), (-1, "tanh")):
        names = [n.target.__name__ for n in traced(Net(body), sign * torch.ones(2, 6)).ops]
        assert {name for name in names if name.split(".")[0] in ("relu", "tanh")} == {f"{op}.default"}


def test_the_tracers_agree() -> None:
    """The same calls, arguments, shapes and places on fake, real and meta tensors, and of a model on meta."""
    net = Net(plain).eval()
    graphs = [traced(net, tracer=kind) for kind in ("fake", "concrete", "meta")]
    assert [graph.concrete for graph in graphs] == [False, True, False]
    graphs.append(traced(Net(plain).to("meta")))
    lines = [str(graph) for graph in graphs]
    assert lines[0].count("\n") >= 8
    assert len(set(lines)) == 1


@pytest.mark.parametrize("read", [Tensor.tolist, Tensor.numpy, np.asarray, Tensor.nonzero], ids=lambda f: f.__name__)
def test_what_python_reads_of_a_hidden_value_keeps_its_units(read: Callable[[Tensor], Any]) -> None:
    net = Net(lambda net, x: net.fc2(net.fc1(x).relu()) * (1 + len(read(net.fc1(x).mean(0).exp()))))
    sped_up(net)
    assert shrunk(net) == {}


def test_on_the_real_input_too_what_nothing_reads_is_not_needed() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(12, 4, batch_first=True), nn.Linear(12, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            padding = None if mask.all() else ~mask
            return self.out(self.attention(x, x, x, key_padding_mask=padding)[0])

    net = Masked().eval()
    kept = torch.arange(12).repeat(3) >= 6  # two of four heads
    masks = {"attention.in_proj_weight": kept[:, None].float(), "attention.in_proj_bias": kept.float()}
    masked = masked_reference(net, masks)
    speedup = ModelSpeedup(net, (torch.randn(2, 5, 12), torch.ones(2, 5).bool()), masks)
    speedup.speedup_model()
    assert speedup.graph.concrete
    assert net.attention.in_proj_weight.shape == (18, 12)
    fresh = torch.randn(3, 4, 12), torch.ones(3, 4).bool()
    assert relative_error(net(*fresh).detach(), masked(*fresh).detach()) <= 1e-5


def test_a_model_that_asks_whether_it_is_traced_is_traced_on_the_real_input() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        hidden = torch.relu(net.fc1(x))
        return net.fc2(hidden if isinstance(x, FakeTensor) else hidden * hidden)

    net = Net(body)
    before = shrunk(net)
    speedup = sped_up(net)
    assert speedup.graph.concrete
    assert shrunk(net, before) == HIDDEN


def test_a_value_on_the_meta_device_is_missed_with_an_error() -> None:
    from maskprop.errors import DummyInputError

    with pytest.raises(DummyInputError, match=r"forward of Net failed on the dummy input .*Check `model\("):
        traced(Net(by_item).to("meta"))
    with pytest.raises(DummyInputError, match="forward of Net failed"):
        traced(Net(by_item), tracer="fake")


def test_recorded_metadata_is_that_of_the_values() -> None:
    def body(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        h = net.fc1(x)
        if h.mean() > 1e6:
            h = -h
        return h, h > 0

    net, x = Net(body).eval(), vectors(2)
    graph = traced(net, x)
    assert graph.concrete
    for node, value in run_graph(graph, lambda name: graph.state[name], [x]):
        if isinstance(value, Tensor):
            assert node.meta["tensor"] == TensorMeta.of(value)


def test_a_graph_that_is_run_in_part_leaves_the_grad_mode_alone() -> None:
    net, x = Net(plain).eval(), vectors(2)
    graph = traced(net, x)
    running = run_graph(graph, lambda name: graph.state[name], [x])
    for _ in range(5):
        next(running)
        assert torch.is_grad_enabled()


# --- modules ----------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A block whose layer runs twice, and an op of its own between."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.act = inner, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.act(self.inner(x)) * 2)


def test_every_op_has_the_path_of_its_module() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        return net.fc2(net.block(net.fc1(x)).tanh())

    net = Net(body, block=nn.Sequential(Twice(nn.Linear(8, 8)), nn.ReLU()))
    graph = traced(net)
    places = [(n.target.__name__.split(".")[0], n.meta["path"], n.meta["module"]) for n in graph.ops]
    assert [place for place in places if place[0] != "t"] == [
        ("addmm", "fc1", nn.Linear),
        ("addmm", "block.0.inner", nn.Linear),
        ("relu", "block.0.act", nn.ReLU),
        ("mul", "block.0", Twice),
        ("addmm", "block.0.inner", nn.Linear),
        ("relu", "block.1", nn.ReLU),
        ("tanh", "", Net),
        ("addmm", "fc2", nn.Linear),
    ]
    calls = [n.meta["call"] for n in graph.ops if n.meta["path"] == "block.0.inner"]
    assert len(set(calls)) == 2, "two calls of one module are told apart"
    block = next(made for made in graph.history if made.path == "block")
    assert {n.meta["path"] for n in graph.ops if n in block} == {"block.0", "block.0.inner", "block.0.act", "block.1"}


def test_a_shared_module_has_one_path_and_keeps_what_one_of_its_calls_needs() -> None:
    """``again`` is ``fc1`` by another name; each call's reader is blind to other units, and two are the same."""

    def body(net: Net, x: Tensor) -> Tensor:
        return net.fc2(F.relu(net.fc1(x))) + net.other(net.again(-x))

    net = Net(body, other=nn.Linear(8, 3))
    net.again = net.fc1
    graph = traced(net)
    assert {n.meta["path"] for n in graph.ops} == {"fc1", "fc2", "other", ""}
    assert len({n.meta["call"] for n in graph.ops if n.meta["path"] == "fc1"}) == 2
    masks = {"fc2.weight": torch.ones(1, 8), "other.weight": torch.ones(1, 8)}
    masks["fc2.weight"][:, [0, 1, 4]] = 0
    masks["other.weight"][:, [1, 4, 5]] = 0
    masked = masked_reference(net, masks)
    ModelSpeedup(net, vectors(2), masks).speedup_model()
    assert net.again is net.fc1
    left = {"fc1.weight": (6, 6), "fc1.bias": (6,), "fc2.weight": (3, 6), "other.weight": (3, 6)}
    assert shrunk(net, {"other.bias": (3,)}) == left
    with torch.no_grad():
        assert relative_error(net(x := vectors(3)), masked(x)) <= 1e-5


def test_tied_parameters_stay_one() -> None:
    def body(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(net.fc1(x))
        return F.linear(h, net.back.weight.t()), net.fc2(h)

    net = Net(body, back=nn.Linear(6, 8, bias=False))
    net.back.weight = net.fc1.weight
    names = list(net.state_dict())
    assert traced(net).aliases == {"back.weight": "fc1.weight"}
    sped_up(net)
    assert net.back.weight is net.fc1.weight
    assert shrunk(net) == HIDDEN
    assert list(net.state_dict()) == names


def test_buffers_shrink_with_what_reads_them_and_no_others_do() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        return net.fc2(F.relu(net.fc1(x) * net.scale + net.shift))

    net = Net(body)
    net.register_buffer("scale", torch.rand(8))
    net.register_buffer("shift", torch.rand(1, 8), persistent=False)
    net.register_buffer("seen", torch.zeros(8))
    net.plain = torch.rand(8)
    graph = traced(net)
    assert {name for name in graph.state if "." not in name} == {"scale", "shift"}
    masked = {"shift": net.shift.clone()}
    net.shift[:, [0, 1, 4]] = 0  # else constants are left behind, which go to a bias
    sped_up(net)
    assert (net.scale.shape, net.shift.shape, net.seen.shape, net.plain.shape) == ((5,), (1, 5), (8,), (8,))
    assert torch.equal(net.shift, masked["shift"][:, [2, 3, 5, 6, 7]])


def test_an_unused_module_stays_as_it_is() -> None:
    net = Net(plain, unused=nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    assert not any(name.startswith("unused") for name in traced(net).state)
    before = {name: p.clone() for name, p in net.unused.state_dict().items()}
    sped_up(net)
    assert net.fc1.out_features == 5
    assert all(torch.equal(p, before[name]) for name, p in net.unused.state_dict().items())


# --- writes -----------------------------------------------------------------------------------------------


def in_place(net: Net, x: Tensor) -> Tensor:
    h = net.fc1(x).clone()
    h.mul_(2).relu_()
    h += h
    return net.fc2(h)


def into_rows(net: Net, x: Tensor) -> Tensor:
    h = torch.zeros_like(net.fc1(x))
    h[1:] = net.fc1(x)[:-1]
    h[0] = net.fc1(x)[-1] * 2
    return net.fc2(F.relu(h))


def through_a_view_of_a_view(net: Net, x: Tensor) -> Tensor:
    h = net.fc1(x).clone()
    h.t()[:, :1].mul_(3)
    view = h.view(-1, 1, h.shape[1])
    h.relu_()
    return net.fc2(view[:, 0])  # read after what it views was written to


def by_unbind(net: Net, x: Tensor) -> Tensor:
    h = net.fc1(x).clone()
    for row in h.unbind(0):
        row.relu_()
    return net.fc2(h)


def by_out(net: Net, x: Tensor) -> Tensor:
    h = net.fc1(x)
    made = torch.empty_like(h)
    torch.mul(h, 2, out=made)
    made.transpose_(0, 1)
    return net.fc2(made.t())


@pytest.mark.parametrize(
    "body", [in_place, into_rows, through_a_view_of_a_view, by_unbind, by_out], ids=lambda body: body.__name__
)
def test_writes_become_calls_that_return_their_result(body: Callable[..., Any]) -> None:
    net = Net(body)
    graph = traced(net)
    assert not any(n.target._schema.is_mutable for n in graph.ops)
    with torch.no_grad():
        x = vectors(2)
        (expected,) = (net(x),)
        *_, (_, last) = run_graph(graph, lambda name: graph.state[name], [x])
    assert torch.allclose(torch.as_tensor(last if isinstance(last, Tensor) else last[0]), expected, atol=1e-6)
    if body is not by_unbind:  # which has as many outputs as the batch has rows
        sped_up(net)
        assert shrunk(net) == HIDDEN


def test_a_buffer_that_forward_counts_in_is_as_before_afterwards() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        net.count += 1
        net.last = F.relu(net.fc1(x))
        return net.fc2(net.last * net.count / net.count)

    net = Net(body)
    net.register_buffer("count", torch.full((1,), 7.0))
    net.last = None
    graph = traced(net)
    assert graph.mutated == {"count"}
    assert (net.count.item(), net.last) == (7.0, None)
    x = vectors(2)
    masks = {"fc1.weight": torch.ones(8, 1), "fc1.bias": torch.ones(8)}
    for mask in masks.values():
        mask[[0, 1, 4]] = 0
    ModelSpeedup(net, x, masks).speedup_model()
    assert net.count.item() == 7
    assert shrunk(net) == HIDDEN
