"""Which axes are the model's own, and which are as long as its inputs make them.

A known value may vary along both. Channels, heads and learned positions are as many for every input; over space and
time a value varies with the distance to a padded border, say, and what a sum or a mean makes of that is another
number for an input of another size. So it is not known.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import fx

from maskprop.graph.graph import TensorMeta, shape_of
from maskprop.infer.facts import differs_along
from maskprop.infer.op import Op
from maskprop.infer.rules.convolution import Convolution
from maskprop.infer.rules.joining import Cat
from maskprop.infer.rules.movement import Movement, Parts
from maskprop.infer.rules.registry import find_rule
from maskprop.infer.rules.spatial import PerChannel
from maskprop.infer.rules.steps import Step

aten = torch.ops.aten
Own = tuple[bool, ...]

_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


def own_axes(node: fx.Node) -> Own:
    """For each axis of a recorded value, whether its size is surely the model's own, whatever the inputs are.

    The answer is kept in ``meta["own"]`` of the value and of all that it is made of.
    """
    stack = [node]
    while stack:
        one = stack[-1]
        before = [source for source in one.all_input_nodes if "own" not in source.meta]
        stack += before
        if not before:
            stack.pop()
            if "own" not in one.meta:
                one.meta["own"] = _own(one)
    own = node.meta["own"]
    return own if isinstance(own, tuple) else ()


def _own(node: fx.Node) -> Own | list[Own]:
    if node.op != "call_function":
        return (node.op == "get_attr",) * len(shape_of(node))
    if node.target is operator.getitem:
        several, index = node.args
        return several.meta["own"][index]  # type: ignore[no-any-return, union-attr]
    op = Op(node)
    inputs = [own for n in op.inputs if isinstance(own := n.meta["own"], tuple)]
    if len(inputs) < len(op.inputs):  # several results, read as one list
        return [_unknown(m) for m in op.results] if op.several else _unknown(op.results[0])
    made = [
        tuple(own or n == 1 for own, n in zip(_result(op, i, inputs, meta.shape), meta.shape, strict=True))
        if meta is not None
        else ()
        for i, meta in enumerate(op.results)
    ]
    return made if op.several else made[0]


def _unknown(meta: TensorMeta | None) -> Own:
    return () if meta is None else tuple(n == 1 for n in meta.shape)


def _result(op: Op, index: int, inputs: Sequence[Own], shape: Sequence[int]) -> Sequence[bool]:
    """The own axes of one result, by those of the inputs."""
    rule, ndim = find_rule(op.target), len(shape)
    if isinstance(rule, Movement):
        return _moved(list(rule.steps(op)), op.shapes[0], inputs[0], ndim)
    if isinstance(rule, Parts):
        return _moved(rule.steps(op)[index], op.shapes[0], inputs[0], ndim)
    if op.target in _PRODUCTS:
        a, b = inputs[-2:]
        return [*map(operator.or_, a[:-2], b[:-2]), a[-2], b[-1]]
    if op.target is aten.embedding.default:
        return [*inputs[1], inputs[0][1]]
    if isinstance(rule, Convolution):
        return [inputs[0][0], True, *[False] * (ndim - 2)]
    if rule is None:
        return [False] * ndim
    own = [_meets(op, inputs, shape, axis - ndim) for axis in range(ndim)]
    if isinstance(rule, PerChannel):
        return [False if axis in rule.space(op) else found for axis, found in enumerate(own)]
    if isinstance(rule, Cat) and op.target is aten.cat.default:
        dim = op.arg("dim", 0) % ndim
        own[dim] = all(found[dim] for found in inputs if len(found) == ndim)
    return own


def _meets(op: Op, inputs: Sequence[Own], shape: Sequence[int], axis: int) -> bool:
    """Whether an axis, counted from the end, has the size of an own one: what meets it is always as long."""
    pointwise = torch.Tag.pointwise in op.target.tags
    return any(
        len(found) >= -axis and found[axis] and given[axis] == shape[axis] and (pointwise or len(given) == len(shape))
        for found, given in zip(inputs, op.shapes, strict=True)
    )


def _moved(steps: Sequence[Step], src: tuple[int, ...], own: Own, ndim: int) -> Sequence[bool]:
    """Through movement: an axis is own if all the axes are that it comes from."""
    return [bool(axes) and all(own[axis] for axis in axes) for axes in _origins(tuple(steps), src, ndim)]


@functools.lru_cache(maxsize=1024)
def _origins(steps: tuple[Step, ...], src: tuple[int, ...], ndim: int) -> list[list[int]]:
    """The axes that each axis comes from through movement; a model's layers move alike."""
    come: list[list[int]] = [[] for _ in range(ndim)]
    for axis, n in enumerate(src):
        if n > 1:
            ramp = torch.arange(n).reshape([n if d == axis else 1 for d in range(len(src))])
            for step in steps:
                ramp = step.move(ramp)
            for d in range(ndim):
                if differs_along(ramp, d):
                    come[d].append(axis)
    return come
