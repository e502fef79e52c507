"""Random networks with random masks: each speedup equals the masked network, and there is nothing left to do."""

from __future__ import annotations

import random

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from random_networks import RandomNet, random_masks
from torch import Tensor, fx, nn

from benchmarks.zoo.check import masked_reference, relative_error
from benchmarks.zoo.randomise import randomise
from maskprop import ModelSpeedup
from maskprop.graph.trace import split_inputs, trace
from maskprop.infer.facts import Fact
from maskprop.infer.sweep import Inference
from maskprop.masks import load_masks
from maskprop.rewrite.constant import Constant

TOLERANCE = 1e-9  # float64, so that nothing hides behind rounding


class Subject:
    """A network in float64, its masks, and inputs for it."""

    def __init__(self, r: random.Random) -> None:
        torch.manual_seed(r.getrandbits(32))
        self.generator = torch.Generator().manual_seed(r.getrandbits(32))
        self.net = RandomNet(r, r.randint(2, 12)).double().eval()
        randomise(self.net, self.images(2))
        self.masks = random_masks(self.net, r)

    def images(self, batch: int) -> Tensor:
        return torch.randn(batch, 3, 8, 8, generator=self.generator, dtype=torch.float64)


def sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def layer_of(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


@examples(60)
@given(r=st.randoms(use_true_random=False))
def test_equals_the_masked_network_and_nothing_is_left_to_do(r: random.Random) -> None:
    check_speedup(Subject(r))


# Constants of layers without a bias, along other axes than the last; a shuffle of a shuffle; a constant that a product
# cuts; units put back out of another head than the one that stays; a forward around replaced attention; its thirds;
# a number beside a table; a branch that nothing needs; a bias that is added apart; shares of what is looked up; columns
# that read what attention makes of constants; the last channels of a group that stays.
@pytest.mark.parametrize(
    "seed", [173, 922, 30009, 30052, 30151, 30788, 41270, 70141, 90163, 90324, 91527, 640, 41299, 110244, 131088]
)
def test_what_second_runs_once_found(seed: int) -> None:
    check_speedup(Subject(random.Random(seed)))


def check_speedup(subject: Subject) -> None:
    """It equals the masked network, trains, and a second run removes nothing."""
    net, before = subject.net, sizes(subject.net)
    masked = masked_reference(net, subject.masks)
    speedup = ModelSpeedup(net, subject.images(2), subject.masks)
    speedup.speedup_model()

    with torch.no_grad():
        for batch in (2, 1, 3):
            x = subject.images(batch)
            assert relative_error(net(x), masked(x)) <= TOLERANCE

    after = sizes(net)
    emptied = {name for name in before if isinstance(layer_of(net, name), (Constant, nn.Identity))}
    assert after.keys() - speedup.plan.new_bias.keys() >= before.keys() - emptied, "state_dict names stay"
    assert after.keys() - speedup.plan.new_bias.keys() <= before.keys() | {f"{n}.value" for n in after}, "none is new"
    for name in after.keys() & before.keys() - emptied:
        assert all(a <= b for a, b in zip(after[name], before[name], strict=True)), f"{name} grew"

    net.train()
    net(subject.images(3)).square().sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in net.parameters())
    net.eval().zero_grad()

    again = ModelSpeedup(net, subject.images(2), {name: p != 0 for name, p in net.named_parameters()})
    again.speedup_model()
    assert again.plan.empty, "a second run finds more to remove"
    assert not again.report.repair.removed, "a second run finds another layer that is constant"


# -- the facts behind it ------------------------------------------------------------------------------


class Ran:
    """A recorded graph, run on the masked tensors.

    Args:
        needed: if given, whatever is not needed is replaced by random numbers on the way.
    """

    def __init__(self, inference: Inference, x: Tensor, needed: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        graph, masks = inference.graph, inference.masks
        self.values: dict[fx.Node, object] = {}
        with torch.no_grad():
            for node in graph.fx.nodes:
                if node.op == "output":
                    self.outputs = [self.values[n] for n in node.args[0]]
                    return
                if node.op == "placeholder":
                    value: object = x
                elif node.op == "get_attr":
                    name = str(node.target)
                    value = graph.state[name].detach() * masks[name] if name in masks else graph.state[name].detach()
                else:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
                    assert callable(node.target)
                    value = node.target(*args, **kwargs)
                if needed and isinstance(value, Tensor) and value.is_floating_point():
                    reads = inference.facts.needed.get(node, torch.zeros((), dtype=torch.bool))
                    other = torch.randn(value.shape, generator=draw, dtype=value.dtype)
                    value = torch.where(reads, value, other)
                self.values[node] = value


def inferred(subject: Subject, mode: str) -> Inference:
    graph = trace(subject.net, split_inputs(subject.images(2)))
    masks = load_masks(subject.net, subject.masks, None).parameters
    masks = {graph.aliases.get(name, name): mask for name, mask in masks.items()}
    inference = Inference(graph, masks, mode, confidence=4)
    inference.run()
    return inference


def check_facts(subject: Subject, inference: Inference) -> None:
    """What is known comes out so on other inputs, and nothing depends on what is not needed."""
    for x in (subject.images(2), subject.images(2)):
        for node, value in Ran(inference, x).values.items():
            fact = inference.facts.known[node]
            if isinstance(fact, Fact) and isinstance(value, Tensor) and bool(fact.known.any()):
                known = fact.known.expand(value.shape)
                expected = fact.value().expand(value.shape)[known].double()
                assert torch.allclose(value[known].double(), expected, rtol=1e-9, atol=1e-9), node
                zeros = value[fact.zero.expand(value.shape)].double()
                assert torch.allclose(zeros, torch.zeros_like(zeros), atol=1e-9), node  # a norm of equal numbers rounds
    x = subject.images(2)
    assert relative_error(Ran(inference, x, needed=True).outputs, Ran(inference, x).outputs) <= TOLERANCE


@examples(25)
@given(r=st.randoms(use_true_random=False))
def test_facts_by_rules_hold(r: random.Random) -> None:
    subject = Subject(r)
    check_facts(subject, inferred(subject, "auto"))


@examples(3)
@given(r=st.randoms(use_true_random=False))
def test_facts_by_probes_alone_hold(r: random.Random) -> None:
    subject = Subject(r)
    check_facts(subject, inferred(subject, "gradient"))
