"""Where a constant that a removed unit leaves behind can land."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from maskprop.graph.graph import shape_of
from maskprop.infer.op import Op

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


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


def bias_place(node: fx.Node) -> BiasPlace | None:
    """The place for a constant added to the result of a contraction, or ``None``."""
    op = Op(node)
    bias = (
        op.arg("bias")
        if node.target is aten.convolution.default
        else op.arg("self")
        if node.target is aten.addmm.default
        else None
    )
    if isinstance(bias, fx.Node):
        plain = op.arg("beta", 1) == 1 and op.arg("alpha", 1) == 1
        return BiasPlace("bias", str(bias.target)) if bias.op == "get_attr" and len(bias.users) == 1 and plain else None
    if node.target not in (aten.convolution.default, aten.mm.default):
        return None
    return _next_norm(node) or _next_add(node) or _new_bias(node, op)


def weight_place(node: fx.Node) -> tuple[str, bool] | None:
    """The parameter that a contraction reads as its weight, and whether it is transposed on the way."""
    turned = False
    while node.op == "call_function" and node.target in (aten.t.default, aten.transpose.int) and len(node.users) == 1:
        turned = not turned
        (node,) = node.all_input_nodes
    if node.op == "get_attr" and len(node.users) == 1:
        return str(node.target), turned
    return None


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _next_norm(node: fx.Node) -> BiasPlace | None:
    user = _sole_user(node)
    if user is None or user.target is not aten.native_batch_norm.default:
        return None
    norm = Op(user)
    mean = norm.arg("running_mean")
    if norm.arg("training"):
        return BiasPlace("cancel", "")
    if isinstance(mean, fx.Node) and mean.op == "get_attr" and len(mean.users) == 1:
        return BiasPlace("running_mean", str(mean.target))
    return None


def _next_add(node: fx.Node) -> BiasPlace | None:
    """A linear whose bias is added by a call of its own (after a view, for inputs of three axes)."""
    width = shape_of(node)[-1]
    user = _sole_user(node)
    while user is not None and user.target in _VIEWS and shape_of(user)[-1] == width:
        node, user = user, _sole_user(user)
    if user is None or user.target is not aten.add.Tensor or user.kwargs:
        return None
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
    if (
        len(others) == 1
        and others[0].op == "get_attr"
        and len(others[0].users) == 1
        and shape_of(others[0]) == (width,)
    ):
        return BiasPlace("bias", str(others[0].target))
    return None


def _new_bias(node: fx.Node, op: Op) -> BiasPlace | None:
    found = weight_place(op.inputs[1])
    owner: type = node.meta.get("module", object)
    path = str(node.meta["path"])
    if (
        found is None
        or found[0] != f"{path}.weight".lstrip(".")
        or not issubclass(owner, (nn.Linear, nn.modules.conv._ConvNd))
    ):
        return None
    return BiasPlace("new_bias", f"{path}.bias".lstrip("."))
