"""Inputs and outputs of any shape: nested tuples, dicts, named tuples, dataclasses, keyword arguments, None."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.check import masked_reference, relative_error, tensors
from benchmarks.zoo.specimen import Inputs, call
from maskprop import ModelSpeedup
from maskprop.errors import DummyInputError
from maskprop.graph.graph import Graph
from maskprop.graph.structure import map_each_once, map_tensors, tensors_in
from maskprop.graph.trace import split_inputs, trace


class Pair(NamedTuple):
    """Two outputs."""

    first: Tensor
    second: Tensor | None


@dataclass
class Output:
    """What transformers' models return, in small."""

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    loss: Tensor | None = None


class Net(nn.Module):
    """Eight units between an input and an output that ``read`` and ``give`` make anything of."""

    def __init__(self, read: Callable[..., Tensor], give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)
        self.read, self.give = read, give

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.give(self.fc2(F.relu(self.fc1(self.read(*args, **kwargs)))))


def itself(x: Tensor) -> Tensor:
    return x


def vectors(batch: int) -> Tensor:
    return torch.randn(batch, 6)


def sped_up(net: Net, make: Callable[[int], Inputs]) -> Graph:
    """Prune three units; outputs of the same structure with the values of the masked network."""
    masks = {"fc1.weight": torch.ones(8, 1), "fc1.bias": torch.ones(8)}
    for mask in masks.values():
        mask[[0, 1, 4]] = 0
    masked = masked_reference(net.eval(), masks)
    speedup = ModelSpeedup(net, make(2), masks)
    speedup.speedup_model()
    assert net.fc1.out_features == net.fc2.in_features == 5
    with torch.no_grad():
        for batch in (2, 1, 3):
            value = make(batch)
            ours, theirs = call(net, value), call(masked, value)
            assert skeleton(ours) == skeleton(theirs)
            assert relative_error(ours, theirs) <= 1e-5
    return speedup.graph


def skeleton(value: Any) -> Any:
    """The structure with shapes in place of tensors."""
    return map_tensors(value, lambda t: tuple(t.shape))


# --- outputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("give", "paths"),
    [
        (lambda y: y, [""]),
        (lambda y: (y, (2 * y, [y + 1])), ["0", "1.0", "1.1.0"]),
        (lambda y: {"a": y, "b": {"c": [2 * y]}}, ["a", "b.c.0"]),
        (lambda y: OrderedDict(z=y, a=-y), ["z", "a"]),
        (lambda y: (None, y, "text", 3), ["1"]),
        (lambda y: Pair(y, None), ["first"]),
        (lambda y: Output(y, (y + 1, 2 * y), {"mean": y.mean(0)}), ["logits", "hidden.0", "hidden.1", "extra.mean"]),
        (lambda y: [Output(y, loss=y.sum()), Pair(y, y)], ["0.logits", "0.loss", "1.first", "1.second"]),
    ],
    ids=["tensor", "nested", "dicts", "ordered", "others", "named", "dataclass", "mixed"],
)
def test_outputs_of_any_structure(give: Callable[[Tensor], Any], paths: list[str]) -> None:
    graph = sped_up(Net(itself, give), vectors)
    assert graph.output_paths == paths


def test_an_output_in_a_structure_keeps_its_shape() -> None:
    """The hidden units are an output too: none of them may leave."""
    net = Net(itself, itself)
    net.forward = lambda x: {"y": net.fc2(net.fc1(x)), "more": (None, net.fc1(x))}  # type: ignore[method-assign]
    mask = torch.ones(8, 1)
    mask[0] = 0
    ModelSpeedup(net.eval(), vectors(2), {"fc1.weight": mask}).speedup_model()
    assert net.fc1.out_features == 8


# --- inputs -----------------------------------------------------------------------------------------------


def keyword(x: Tensor, *, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
    return x * scale if shift is None else x * scale + shift


def nested(pair: Any, table: dict[str, Any], nothing: None = None) -> Tensor:
    assert nothing is None
    result: Tensor = pair[0] + pair[1][0] * table["scale"] + table["more"]["shift"]
    return result


def dataclass_in(value: Output) -> Tensor:
    return value.logits + value.hidden[0]


@pytest.mark.parametrize(
    ("read", "make"),
    [
        (keyword, lambda n: {"x": vectors(n)}),
        (keyword, lambda n: {"x": vectors(n), "shift": vectors(n), "scale": 2.0}),
        (keyword, lambda n: (vectors(n), {"shift": vectors(n)})),
        (keyword, lambda n: {"x": vectors(n), "shift": None}),
        (nested, lambda n: ((vectors(n), [vectors(n)]), {"scale": vectors(n), "more": {"shift": vectors(n)}}, {})),
        (nested, lambda n: ([vectors(n), (vectors(n),)], {"scale": 2, "more": {"shift": 1.5}}, None)),
        (dataclass_in, lambda n: (Output(vectors(n), (vectors(n),)),)),
    ],
    ids=["dict", "keywords", "last dict", "none", "nested", "numbers", "dataclass"],
)
def test_inputs_of_any_structure(read: Callable[..., Tensor], make: Callable[[int], Inputs]) -> None:
    graph = sped_up(Net(read, itself), make)
    given = len(list(tensors_in(split_inputs(make(2)))))
    assert sum(n.op == "placeholder" for n in graph.nodes) == given


def test_a_tensor_given_twice_is_one_value_of_two_inputs() -> None:
    net, x = Net(lambda a, b: a * b, itself), vectors(2)
    graph = trace(net.eval(), split_inputs((x, x)))
    product = next(n for n in graph.ops if n.target is torch.ops.aten.mul.Tensor)
    assert product.args[0] is product.args[1]


@pytest.mark.parametrize("value", [3, "x", None, {1, 2}])
def test_what_is_no_input_is_refused(value: Any) -> None:
    with pytest.raises(DummyInputError, match=f"dummy_input is a {type(value).__name__}; expected a tensor"):
        split_inputs(value)


# --- the helpers ------------------------------------------------------------------------------------------


def test_mapping_rebuilds_the_same_types_and_leaves_the_rest() -> None:
    other = object()
    value = [Pair(torch.ones(1), None), Output(torch.ones(2)), OrderedDict(a=(torch.ones(3), other)), torch.Size([4])]
    made = map_tensors(value, lambda t: t + 1)
    assert [type(v) for v in made] == [type(v) for v in value]
    assert made[2]["a"][1] is other
    assert [float(t.sum()) for t in tensors(made)] == [2.0, 4.0, 6.0]
    assert [float(t.sum()) for t in tensors(value)] == [1.0, 2.0, 3.0], "the given structure is left alone"
    assert [path for path, _ in tensors_in(value)] == ["0.first", "1.logits", "2.a.0"]


def test_each_tensor_is_mapped_once() -> None:
    x = torch.ones(1)
    a, (b, c) = map_each_once((x, [x, x.clone()]), lambda t: t + 1)
    assert a is b
    assert a is not c
