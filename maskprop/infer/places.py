"""Where a constant that a removed unit leaves behind can land."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from maskprop.graph.graph import shape_of
from maskprop.infer.op import Op

aten = torch.ops.aten
_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
_TURNS = (aten.t.default, aten.transpose.int, *_CASTS)
_SQUEEZES = (aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass(frozen=True)
class BiasPlace:
    """A vector over the consumer's outputs that takes an added constant.

    Attributes:
        kind: ``"bias"`` (a parameter, added to), ``"running_mean"`` (a buffer, subtracted from), ``"cancel"`` (a
            batch norm on batch statistics removes constants by itself), ``"new_bias"`` (a leaf module gets one).
        target: name of the parameter or buffer.
    """

    kind: str
    target: str


def calls_alike(node: fx.Node) -> list[fx.Node]:
    """The calls that a contraction shares its weight with, itself among them, if all are alike but for their input.

    A module that is called several times makes such calls. What one of them leaves in the weight or the bias, it
    leaves in all; so they have a place together or none.
    """
    owner, _ = _source(Op(node).inputs[_weight_position(node)])
    if owner.op != "get_attr" or len(owner.users) == 1:
        return [node]
    found: list[fx.Node] = []
    for user in owner.users:
        while user.target in _TURNS and _alone(user):
            user = next(iter(user.users))
        found.append(user)
    frame = _frame(node)
    return found if all(_frame(call) == frame for call in found) else [node]


def bias_place(node: fx.Node) -> BiasPlace | None:
    """The place for a constant added to the result of a contraction (and of the calls alike), or ``None``."""
    calls = calls_alike(node)
    for find in (_own_bias,) if _bias_of(node) else (_next_norm, _next_add, _new_bias):
        found = {find(call, len(calls)) for call in calls}
        if found != {None} and len(found) == 1:
            return found.pop()
    return None


def _bias_of(node: fx.Node) -> fx.Node | None:
    """The bias that a contraction adds itself."""
    name = {aten.convolution.default: "bias", aten.addmm.default: "self"}.get(node.target)  # type: ignore[call-overload]
    found = None if name is None else Op(node).arg(name)
    return found if isinstance(found, fx.Node) else None


def _own_bias(node: fx.Node, uses: int) -> BiasPlace | None:
    op, bias = Op(node), _bias_of(node)
    assert bias is not None
    owner = _before_casts(bias)
    plain = op.arg("beta", 1) == 1 and op.arg("alpha", 1) == 1
    alone = owner.op == "get_attr" and len(owner.users) == uses
    return BiasPlace("bias", str(owner.target)) if plain and alone else None


def weight_place(node: fx.Node, uses: int = 1) -> tuple[str, bool] | None:
    """The parameter that a contraction reads as its weight, and whether it is transposed on the way.

    ``uses``: how many calls are alike and read it.
    """
    owner, turned = _source(node)
    return (str(owner.target), turned) if owner.op == "get_attr" and len(owner.users) == uses else None


def _source(node: fx.Node) -> tuple[fx.Node, bool]:
    """What a value was before turns and casts that nothing else reads, and whether it is transposed since."""
    turned = False
    while node.op == "call_function" and node.target in _TURNS and _alone(node):
        turned ^= node.target not in _CASTS
        (node,) = node.all_input_nodes
    return node, turned


def _weight_position(node: fx.Node) -> int:
    return 1 if node.target is aten.convolution.default else len(Op(node).inputs) - 1


def _frame(node: fx.Node) -> tuple[Any, ...]:
    """What a contraction has besides its input: the op, the weight, the bias, and its numbers."""
    if node.op != "call_function" or node.target in _TURNS:
        return (node,)
    op, data = Op(node), 1 if node.target is aten.addmm.default else 0
    sources = [_source(n) for i, n in enumerate(op.inputs) if i != data]
    return node.target, sources, [a for a in node.args if not isinstance(a, fx.Node)], dict(node.kwargs)


def is_weight(node: fx.Node) -> bool:
    """Whether a value is one of the model's own tensors, at most transposed or cast."""
    while node.op == "call_function" and node.target in _TURNS:
        (node,) = node.all_input_nodes
    return node.op == "get_attr"


def _alone(node: fx.Node) -> bool:
    return len(node.users) == 1


def _before_casts(node: fx.Node) -> fx.Node:
    """What a value was before it was cast (as autocast does), if nothing else reads it on the way."""
    while node.target in _CASTS and _alone(node):
        (node,) = node.all_input_nodes
    return node


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _next_norm(node: fx.Node, uses: int) -> BiasPlace | None:
    user = _sole_user(node)
    if user is None or user.target is not aten.native_batch_norm.default:
        return None
    norm = Op(user)
    mean = norm.arg("running_mean")
    if norm.arg("training"):
        return BiasPlace("cancel", "")
    if isinstance(mean, fx.Node) and mean.op == "get_attr" and len(mean.users) == uses:
        return BiasPlace("running_mean", str(mean.target))
    return None


def _next_add(node: fx.Node, uses: int) -> BiasPlace | None:
    """A linear whose bias is added by a call of its own (after a view, for inputs of three axes)."""
    width = shape_of(node)[-1]
    user = _sole_user(node)
    while user is not None and user.target in (*VIEWS, *_SQUEEZES) and shape_of(user)[-1] == width:
        node, user = user, _sole_user(user)
    if user is None or user.target is not aten.add.Tensor or user.kwargs:
        return None
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
    if (
        len(others) == 1
        and others[0].op == "get_attr"
        and len(others[0].users) == uses
        and shape_of(others[0]) == (width,)
    ):
        return BiasPlace("bias", str(others[0].target))
    return None


def _new_bias(node: fx.Node, uses: int) -> BiasPlace | None:
    if node.target not in (aten.convolution.default, aten.mm.default):
        return None
    found = weight_place(Op(node).inputs[1], uses)
    owner: type = node.meta.get("module", object)
    path = str(node.meta["path"])
    name = f"{path}.bias".lstrip(".")
    if (
        found is None
        or found[0] != f"{path}.weight".lstrip(".")
        or not issubclass(owner, (nn.Linear, nn.modules.conv._ConvNd))
        or any(n.target == name for n in node.graph.find_nodes(op="get_attr"))  # it has one, in a way not understood
    ):
        return None
    return BiasPlace("new_bias", name)


@dataclass(frozen=True)
class ScalePlace:
    """What makes up for a mean that grew by a factor f.

    Attributes:
        numbers: ops that add a number to the mean, and the number's position: it grows by f too.
        weight: the parameter w that the result meets in a product.
        offset: the product is by ``offset + w``.
        power: of f, that ``offset + w`` takes.
    """

    numbers: tuple[tuple[fx.Node, int], ...]
    weight: fx.Node
    offset: float
    power: float


_POWERS = {aten.rsqrt.default: -0.5, aten.sqrt.default: 0.5, aten.reciprocal.default: -1.0}
_ADDS = (aten.add.Tensor, aten.add.Scalar)
_SAME_DEGREE = {
    aten._to_copy.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.alias.default,
    aten.clone.default, *VIEWS,
}  # fmt: skip


def scale_place(node: fx.Node) -> ScalePlace | None:
    """Follow a mean of squares to the weight of its RMS norm (Zhang & Sennrich, 2019); ``None`` if it ends elsewhere.

    Every value on the way is a power of the factor f times what it was: ``mean + eps`` is ``f * (mean + eps / f)``,
    ``rsqrt`` makes ``f`` to ``f**-0.5``, a product takes it along, and the weight takes what is left.
    """
    numbers: list[tuple[fx.Node, int]] = []
    power = 1.0
    while True:
        user = _sole_user(node)
        if user is None or user.op != "call_function":
            return None
        target, args = user.target, user.args
        other = next((a for a in args[:2] if a is not node), None)
        if target in _POWERS:
            power *= _POWERS[target]
        elif target is aten.pow.Tensor_Scalar and isinstance(other, (int, float)):
            power *= other
        elif target in _ADDS and isinstance(other, (int, float)) and power == 1.0 and not user.kwargs:
            numbers.append((user, args.index(other)))
        elif target is aten.mul.Tensor and isinstance(other, fx.Node):
            weight = _scaled_weight(other)
            if weight is not None:
                return ScalePlace(tuple(numbers), *weight, -power)
        elif target is aten.div.Tensor and isinstance(other, fx.Node):
            power = power if args[0] is node else -power
        elif target not in _SAME_DEGREE:
            return None
        node = user


def _scaled_weight(node: fx.Node) -> tuple[fx.Node, float] | None:
    """A parameter that only this product reads, and the number that is added to it first."""
    offset = 0.0
    while node.op == "call_function" and len(node.users) == 1:
        if node.target in _ADDS and not node.kwargs and offset == 0.0:
            numbers = [a for a in node.args if isinstance(a, (int, float))]
            if len(numbers) != 1:
                return None
            offset = float(numbers[0])
        elif node.target not in (aten._to_copy.default, aten.alias.default):
            return None
        (node,) = node.all_input_nodes
    return (node, offset) if node.op == "get_attr" and len(node.users) == 1 and len(shape_of(node)) == 1 else None
