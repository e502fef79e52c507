"""Take out what no output depends on: the layers of a branch whose result is a constant.

A residual branch whose last layer is masked whole adds the same constant to every input. That layer, and each layer
that only it read, loses its parameters: they become :class:`Constant`, on the same objects, so that the author's
``forward`` runs as before.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from maskprop.align.align import Alignment
from maskprop.graph.graph import Graph, TensorMeta
from maskprop.graph.trace import Inputs, trace_partial
from maskprop.infer.facts import Fact, squash
from maskprop.infer.sweep import Inference
from maskprop.rewrite.edits import Edits

log = logging.getLogger(__name__)

Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Constant(nn.Module):
    """What is left of a layer whose output is the same for every input: its shape, and a bias.

    Attributes:
        axis: of the channels in the output, counted from the end.
        size: how many there are.
        window: kernel, stride, padding and dilation along the spatial axes (a convolution's), or ``None`` where
            the output is as large as the input.
        bias: ``(size,)``, what the layer puts out; without one it is zero.
    """

    axis: int
    size: int
    window: Window | None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The constant, as large as the layer's output for the first tensor among the arguments."""
        like = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        shape = list(like.shape)
        shape[self.axis] = self.size
        if self.window is not None:
            for i, (kernel, stride, padding, dilation) in enumerate(zip(*self.window, strict=True), self.axis + 1):
                shape[i] = (shape[i] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        bias = getattr(self, "bias", None)
        if bias is None:
            return like.new_zeros(shape)
        column: Tensor = bias.reshape(-1, *[1] * (-1 - self.axis))
        return column.expand(shape).clone()

    def extra_repr(self) -> str:
        """Its size."""
        return f"{self.size}, axis={self.axis}"


def remove_dead(edits: Edits, graph: Graph, inference: Inference, alignment: Alignment, inputs: Inputs) -> list[str]:
    """Turn the layers of constant branches into :class:`Constant`.

    Args:
        edits: the compact model and its undo log.
        graph: of the dense model.
        inference: its facts.
        alignment: the plan that the compact model follows.
        inputs: the dummy input.

    Returns:
        Paths of the layers; none if the author's forward reads what they would lose.
    """
    if graph.opaque or not any(_turns_constant(n, inference) for n in graph.ops):
        return []
    layers = {layer.path: layer for layer in _layers(edits.model, graph)}
    ends = {p for p, layer in layers.items() if _is_constant(layer, inference)}
    live = _live(graph, layers, ends, inference)
    mark, found = edits.mark(), []
    for path, layer in layers.items():
        if not any(node in live for node in layer.nodes):
            _replace(edits, layer, None, alignment)
        elif path in ends and not any(node in live for node in layer.nodes if node not in layer.results):
            _replace(edits, layer, inference.facts.known[layer.results[0]].value(), alignment)
        else:
            continue
        found.append(path)
    _, error, where = trace_partial(edits.model, inputs, graph.concrete)
    if error is not None:
        log.info("the constant branches stay: without them '%s' fails with %s", where, error)
        edits.rollback(mark)
        return []
    return found


@dataclass
class _Layer:
    """A module without children that owns parameters, and its calls."""

    path: str
    module: nn.Module
    axis: int
    window: Window | None
    nodes: list[fx.Node] = field(default_factory=list)  # its ops, and its tensors that only it reads
    results: list[fx.Node] = field(default_factory=list)  # one a call


def _layers(model: nn.Module, graph: Graph) -> Iterator[_Layer]:
    """The layers that :class:`Constant` could stand in for."""
    ops_of: dict[str, list[fx.Node]] = defaultdict(list)
    tensors_of: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.fx.nodes:
        if node.op == "call_function":
            ops_of[str(node.meta["path"])].append(node)
        elif node.op == "get_attr":
            tensors_of[str(node.target).rpartition(".")[0]].append(node)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in graph.calls:
        module = modules[path]
        if any(module.children()) or any(f"{path}.{k}" in graph.mutated for k in module._buffers):
            continue
        if all(t is None for t in (*module._parameters.values(), *module._buffers.values())):
            continue
        ops, owned = ops_of[path], tensors_of[path]
        inside = set(ops)
        if any(not set(n.users) <= inside for n in owned):
            continue  # somebody else reads its weight
        layer = _Layer(path, module, *_form(module), nodes=[*ops, *owned])
        calls: dict[int, list[fx.Node]] = defaultdict(list)
        for n in ops:
            if any(user not in inside for user in n.users):
                calls[n.meta["call"]].append(n)
        layer.results = [n for nodes in calls.values() for n in nodes]
        if all(len(nodes) == 1 for nodes in calls.values()) and layer.results and _fits(layer, graph):
            yield layer


def _form(module: nn.Module) -> tuple[int, Window | None]:
    """Axis of the channels, counted from the end (positive: from the front), and the window."""
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed and not isinstance(module.padding, str):
        return -1 - len(module.kernel_size), (
            module.kernel_size,
            module.stride,
            tuple(int(p) for p in module.padding),
            module.dilation,
        )
    return (1 if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) else -1), None


def _fits(layer: _Layer, graph: Graph) -> bool:
    """Whether a Constant gives what the layer's first call gave; makes the axis count from the end."""
    args, kwargs = graph.calls[layer.path]
    like = next((a for a in (*args, *kwargs.values()) if isinstance(a, fx.Node)), None)
    metas = {n.meta["tensor"] for n in layer.results}
    if like is None or len({len(m.shape) for m in metas if isinstance(m, TensorMeta)}) != 1:
        return False
    result: TensorMeta = layer.results[0].meta["tensor"]
    ndim = len(result.shape)
    layer.axis = layer.axis - ndim if layer.axis > 0 else layer.axis
    if ndim < -layer.axis or len(like.meta["tensor"].shape) != ndim or like.meta["tensor"].dtype != result.dtype:
        return False
    stand_in = _stand_in(layer, result.shape[layer.axis])
    made: Tensor = stand_in(torch.empty(like.meta["tensor"].shape, device="meta"))
    return tuple(made.shape) == result.shape


def _stand_in(layer: _Layer, size: int) -> Constant:
    made = Constant()
    made.axis, made.size, made.window = layer.axis, size, layer.window
    return made


def _turns_constant(node: fx.Node, inference: Inference) -> bool:
    """Whether masks make an op's result known though its inputs are not."""
    known = inference.facts.known
    fact = known.get(node)
    facts = fact if isinstance(fact, tuple) else (fact,)
    return any(f is not None and f.total and not f.plain for f in facts) and not all(
        known[n].total for n in node.all_input_nodes if isinstance(known[n], Fact)
    )


def _is_constant(layer: _Layer, inference: Inference) -> bool:
    """Whether masks make every call's result the same known vector, which is zero or has a bias to live in."""
    values = []
    for node in layer.results:
        fact = inference.facts.known.get(node)
        if not isinstance(fact, Fact) or not fact.total or fact.plain:
            return False
        value = squash(fact.value())
        if value.numel() != value.shape[layer.axis]:
            return False
        values.append(value.reshape(-1))
    size = layer.results[0].meta["tensor"].shape[layer.axis]
    biases = [n for n in layer.nodes if n.op == "get_attr" and str(n.target).endswith(".bias")]
    has_bias = any(n.meta["tensor"].shape == (size,) for n in biases)
    return all(torch.equal(v, values[0]) for v in values) and (has_bias or not bool(values[0].any()))


def _live(graph: Graph, layers: dict[str, _Layer], ends: set[str], inference: Inference) -> set[fx.Node]:
    """Nodes that an output still depends on when the calls of ``ends`` depend on nothing."""
    results = {n for path in ends for n in layers[path].results}
    needed = inference.facts.needed
    live: set[fx.Node] = set()
    for node in reversed(graph.fx.nodes):
        if (node.op == "output" or node in live) and node not in results:
            live.update(n for n in node.all_input_nodes if n in needed)  # a product with zero needs no other factor
    return live


def _replace(edits: Edits, layer: _Layer, value: Tensor | None, alignment: Alignment) -> None:
    """Turn a layer into the constant that it puts out (``None``: nobody reads it)."""
    module, result = layer.module, layer.results[0]
    size = alignment.expected_shape(result)[layer.axis]
    bias = module._parameters.get("bias")
    if value is None or not bool(value.any()):
        bias = None
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and tensor is not bias:
            edits.drop_tensor(module, name)
    if value is not None and bias is not None:
        edits.set_data(bias, _kept(value, result, layer.axis, alignment).to(bias))
    edits.set_class(module, Constant)
    for name, what in (("axis", layer.axis), ("size", size), ("window", layer.window)):
        edits.set_attribute(module, name, what)


def _kept(value: Tensor, result: fx.Node, axis: int, alignment: Alignment) -> Tensor:
    """The constant's elements at the units that stay."""
    full = squash(value).reshape(-1).expand(result.meta["tensor"].shape[axis])
    labels: Sequence[Tensor | None] = alignment.coupling.labels[result]
    own = labels[axis]
    if own is None:
        return full
    return full[alignment.solution.kept(own)]
