"""Take out what no output depends on: the layers of a branch whose result is a constant.

A residual branch whose last layer is masked whole adds the same constant to every input. That layer, and each layer
that only it read, loses its parameters: they become :class:`Constant`, on the same objects, so that the author's
``forward`` runs as before.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maskprop.align.align import Alignment
from maskprop.graph.graph import Graph, TensorMeta, shape_of
from maskprop.graph.paths import within
from maskprop.graph.trace import Inputs, frozen_state, quiet, trace_partial
from maskprop.infer.facts import Fact, any_over, everywhere
from maskprop.infer.standin import Held, StandIn
from maskprop.infer.sweep import Inference
from maskprop.modules import modules_by_path, of_torch
from maskprop.rewrite.constant import Constant, Window, shape_of_constant
from maskprop.rewrite.edits import Edits

log = logging.getLogger(__name__)

_ROUNDING = 1e-12, 1e-12  # relative and absolute, of what kernels compute in float64 at each place


def find_dead(
    model: nn.Module, graph: Graph, inference: Inference, inputs: Inputs, spared: Collection[str] = ()
) -> list[DeadLayer]:
    """The layers that :class:`Constant` takes the place of; the inference then knows that they read nothing.

    Args:
        model: the dense model.
        graph: of it.
        inference: after its sweeps; its :attr:`~maskprop.infer.sweep.Inference.left` and needed facts change.
        inputs: the dummy input.
        spared: modules whose layers stay.

    Returns:
        The layers; none if the author's forward reads what they would lose.
    """
    constant = [] if graph.opaque else [n for n in graph.ops if _turns_constant(n, inference)]
    used = _live(graph) if constant else set()
    if used.isdisjoint(constant):
        return []
    layers = [layer for layer in _layers(model, graph) if not within(layer.path, spared)]
    ends: list[DeadLayer] = []
    while True:
        found = (layer for layer in layers if layer not in ends and layer.turns_constant(inference, used))
        more = [layer for layer in found if layer.follows]
        if not more:
            break
        ends += more
        _leave(inference, more)  # which may show that more is constant where it matters
    if not ends:
        return []
    live = _live(graph, {n for layer in ends for n in layer.results}, inference.facts.needed)
    unused = {layer for layer in layers if layer.is_used(used) and not layer.is_used(live)}
    dead = [layer for layer in layers if layer in ends or (layer in unused and layer.follows)]
    for layer in dead:
        if live.isdisjoint(layer.results):
            layer.value = None
    _leave(inference, dead)
    edits = Edits(model)
    for layer in dead:
        layer.replace(edits, layer.size, layer.value is not None)
    _leave_fast_paths(edits, dead)
    _, error, where = trace_partial(model, inputs, graph.concrete)
    edits.rollback()
    if error is None:
        return dead
    log.info("the constant branches stay: without them '%s' fails with %s", where, error)
    forget_dead(inference)
    return []


def constants_held(dead: Sequence[DeadLayer], inference: Inference) -> dict[fx.Node, Tensor]:
    """Which elements of values are the constants that dead layers put out."""
    facts = {n: inference.facts.known[n] for layer in dead if layer.value is not None for n in layer.results}
    return {n: fact.known & ~fact.zero for n, fact in facts.items()}


def forget_dead(inference: Inference) -> None:
    """Take back what :func:`find_dead` told the inference."""
    inference.left.clear()
    inference.backward()


def remove_dead(edits: Edits, dead: Sequence[DeadLayer], alignment: Alignment) -> None:
    """Turn dead layers into :class:`Constant`, as large as the plan says; the plan gave them their values."""
    for layer in dead:
        size = alignment.expected_shape(layer.results[0])[layer.axis]
        layer.replace(edits, size, f"{layer.path}.bias" in alignment.held)
    _leave_fast_paths(edits, dead)


def _leave_fast_paths(edits: Edits, dead: Sequence[DeadLayer]) -> None:
    """The fused kernel of an encoder layer reads the weights that its layers lost: this setting decides on it."""
    for path in {layer.path.rpartition(".")[0] for layer in dead}:
        parent = edits.model.get_submodule(path)
        if isinstance(parent, nn.TransformerEncoderLayer):
            edits.set_attribute(parent, "activation_relu_or_gelu", 0)


def _leave(inference: Inference, layers: Sequence[DeadLayer]) -> None:
    """Tell the inference."""
    for layer in layers:
        inference.left |= layer.left()
    inference.backward()


@dataclass(eq=False)
class DeadLayer:
    """A module without children that owns parameters, and its calls; it may be dead.

    Attributes:
        path: of the module.
        module: itself.
        axis: of the channels in what it puts out, counted from the end.
        window: see :class:`Constant`.
        nodes: its ops, and its tensors, which only it reads.
        results: what it puts out, one a call.
        sources: what each call reads first.
        value: the constant, ``(channels,)`` in float64; ``None`` if it is zero or nothing reads it.
    """

    path: str
    module: nn.Module
    axis: int
    window: Window | None
    nodes: list[fx.Node]
    results: list[fx.Node]
    sources: list[fx.Node]
    value: Tensor | None = None

    @property
    def size(self) -> int:
        """Channels in the dense model."""
        return shape_of(self.results[0])[self.axis]

    @property
    def bias(self) -> fx.Node | None:
        """The parameter that holds the constant, if there is one already."""
        return next((n for n in self.nodes if str(n.target) == f"{self.path}.bias"), None)

    @property
    def has_place(self) -> bool:
        """Whether a bias can hold the constant."""
        if self.bias is not None:
            return shape_of(self.bias) == (self.size,)
        return getattr(self.module, "bias", None) is None and any(True for _ in self.module.parameters(recurse=False))

    def is_used(self, live: set[fx.Node]) -> bool:
        """Whether any of its nodes is among these."""
        return not live.isdisjoint(self.nodes)

    @property
    def follows(self) -> bool:
        """Whether the layer's output is as large as :class:`Constant` makes it for inputs of any size.

        Of a layer of torch's own that is known. An author's is called with inputs that are longer along one axis.
        """
        if of_torch(type(self.module)):
            return True
        metas = {n.meta["tensor"] for n in self.sources}
        own = next((t for t in (*self.module.parameters(), *self.module.buffers())), None)
        device = None if own is None else own.device
        others = [(m, d) for m in metas for d in range(len(m.shape)) if d != len(m.shape) + self.axis]
        with frozen_state(self.module), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), quiet():
            for meta, other in others:
                longer = [n + (d == other) for d, n in enumerate(meta.shape)]
                try:
                    shape = list(self.module(torch.empty(longer, dtype=meta.dtype, device=device)).shape)
                except Exception as error:  # whatever an author's layer raises
                    log.info("'%s' does not take an input of shape %s: %s", self.path, longer, error)
                    return False
                if shape != shape_of_constant(longer, self.axis, self.size, self.window):
                    return False
        return True

    def turns_constant(self, inference: Inference, used: set[fx.Node]) -> bool:
        """Whether masks make what is needed of every call's result one known vector, which is zero or has a place."""
        facts = [inference.facts.known.get(n) for n in self.results]
        if not used.issuperset(self.results) or not all(isinstance(f, Fact) and not f.plain for f in facts):
            return False
        value = self._constant(inference)
        if value is None or (bool(value.any()) and not self.has_place):
            return False
        self.value = value if bool(value.any()) else None
        return True

    def _constant(self, inference: Inference) -> Tensor | None:
        """What is needed of every call's result, if it is one known vector along :attr:`axis`."""
        value, fixed = torch.zeros(self.size, dtype=torch.float64), torch.zeros(self.size, dtype=torch.bool)
        for node in self.results:
            fact, ndim = inference.facts.known[node], len(shape_of(node))
            needed = inference.facts.needed.get(node, everywhere(False, ndim))
            units = any_over(needed, [d for d in range(ndim) if d != ndim + self.axis])
            if not bool((fact.known | ~units).all()):
                return None
            found = torch.where(units, fact.value(), 0.0)
            own = found.movedim(self.axis, -1).reshape(-1, found.shape[self.axis])[0].expand(self.size)
            units = units.reshape(-1).expand(self.size)
            both = torch.where(fixed & units, value, own)
            shape = [1] * ndim
            shape[self.axis] = self.size
            if not torch.allclose(found, own.reshape(shape), *_ROUNDING) or not torch.allclose(both, own, *_ROUNDING):
                return None
            value, fixed = torch.where(units, own, value), fixed | units
        return value

    def left(self) -> dict[fx.Node, StandIn | None]:
        """What the inference has to know, see :attr:`maskprop.infer.sweep.Inference.left`."""
        bias = None if self.value is None else self.bias
        held = None if self.value is None else Held(f"{self.path}.bias", bias, self.value)
        found: dict[fx.Node, StandIn | None] = {n: None for n in self.nodes if n is not bias}
        for result, source in zip(self.results, self.sources, strict=True):
            axis = len(shape_of(result)) + self.axis
            found[result] = StandIn(result, axis, source if _keeps_sizes(self.window) else None, held)
        return found

    def replace(self, edits: Edits, size: int, held: bool) -> None:
        """Turn the layer into a constant.

        Args:
            edits: the model and its undo log.
            size: how many channels it has.
            held: whether its bias holds them; they are zero otherwise.
        """
        module = self.module
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and not (held and name == "bias"):
                edits.drop_tensor(module, name)
        edits.set_class(module, Constant)
        for name, what in (("axis", self.axis), ("size", size), ("window", self.window)):
            edits.set_attribute(module, name, what)


def _keeps_sizes(window: Window | None) -> bool:
    """Whether what a constant puts out is as large as what it is given, whatever its size."""
    return window is None or all(
        stride == 1 and 2 * padding == dilation * (kernel - 1)
        for kernel, stride, padding, dilation in zip(*window, strict=True)
    )


def _layers(model: nn.Module, graph: Graph) -> Iterator[DeadLayer]:
    """The layers that :class:`Constant` could stand in for."""
    ops_of: dict[str, list[fx.Node]] = defaultdict(list)
    tensors_of: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.fx.nodes:
        if node.op == "call_function":
            ops_of[str(node.meta["path"])].append(node)
        elif node.op == "get_attr":
            tensors_of[str(node.target).rpartition(".")[0]].append(node)
    modules = modules_by_path(model, aliases=True)
    for path in graph.calls:
        module = modules[path]
        if module is model:  # stays of its author's class
            continue
        if any(module.children()) or any(f"{path}.{k}" in graph.mutated for k in module._buffers):
            continue
        if all(t is None for t in (*module._parameters.values(), *module._buffers.values())):
            continue
        ops, owned = ops_of[path], tensors_of[path]
        inside = set(ops)
        if any(not set(n.users) <= inside for n in owned):
            continue  # somebody else reads its weight
        calls: dict[int, list[fx.Node]] = defaultdict(list)
        for n in ops:
            if any(user not in inside for user in n.users):
                calls[n.meta["call"]].append(n)
        sources = [_source(number, ops, {*inside, *owned}) for number in calls]
        results = [n for nodes in calls.values() for n in nodes]
        if not results or any(len(nodes) != 1 for nodes in calls.values()) or None in sources:
            continue
        axis, window = _form(module)
        if axis > 0 and isinstance(results[0].meta["tensor"], TensorMeta):
            axis -= len(shape_of(results[0]))
        found = [n for n in sources if n is not None]
        if _fits(axis, window, results, found):
            yield DeadLayer(path, module, axis, window, [*ops, *owned], results, found)


def _source(number: int, ops: Sequence[fx.Node], own: set[fx.Node]) -> fx.Node | None:
    """What the ops of one call read first that is not the layer's own."""
    return next((s for n in ops if n.meta["call"] == number for s in n.all_input_nodes if s not in own), None)


def _form(module: nn.Module) -> tuple[int, Window | None]:
    """Axis of the channels, counted from the end (positive: from the front), and the window."""
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed and not isinstance(module.padding, str):
        return -1 - len(module.kernel_size), (
            module.kernel_size,
            module.stride,
            tuple(int(p) for p in module.padding),
            module.dilation,
        )
    if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)):
        return 1, None
    wide = [axis for p in module.parameters(recurse=False) for axis in range(-p.ndim, 0) if p.shape[axis] > 1]
    return wide[0] if len(set(wide)) == 1 else -1, None  # where its own parameters vary


def _fits(axis: int, window: Window | None, results: Sequence[fx.Node], sources: Sequence[fx.Node]) -> bool:
    """Whether a constant along an axis gives what each of a layer's calls gave."""
    for like, result in zip(sources, results, strict=True):
        given, made = like.meta["tensor"], result.meta["tensor"]
        if not isinstance(given, TensorMeta) or not isinstance(made, TensorMeta) or given.dtype != made.dtype:
            return False
        if not 1 <= -axis <= len(made.shape) or len(given.shape) != len(made.shape):
            return False
        if shape_of_constant(given.shape, axis, made.shape[axis], window) != list(made.shape):
            return False
    return True


def _turns_constant(node: fx.Node, inference: Inference) -> bool:
    """Whether masks make all that is needed of an op's result known, if anything is, though its inputs are not."""
    known, needed = inference.facts.known, inference.facts.needed
    fact, need = known.get(node), needed.get(node)
    facts, needs = (fact, need or [None] * len(fact)) if isinstance(fact, tuple) else ((fact,), [need])
    constant = node not in needed or any(
        f is not None and not f.plain and (f.total or (n is not None and not f.nothing and bool((f.known | ~n).all())))
        for f, n in zip(facts, needs, strict=True)
    )
    return constant and not all(known[n].total for n in node.all_input_nodes if isinstance(known[n], Fact))


def _live(graph: Graph, results: Collection[fx.Node] = (), needed: Collection[fx.Node] | None = None) -> set[fx.Node]:
    """Nodes that an output still depends on when these results depend on nothing.

    What holds no elements depends on nothing either: for an input of another size it may hold some.

    Args:
        graph: the recorded forward pass.
        results: of layers that are constant.
        needed: nodes that have elements which are needed; a product with zero needs no other factor.
    """
    import networkx as nx  # here, since it takes a while to import

    reads = graph.dependencies()
    ends = [*results, *(n for n in graph.fx.nodes if n.op == "call_function" and _holds_nothing(n))]
    reads.remove_edges_from(list(reads.in_edges([n.name for n in ends])))
    if needed is not None:
        reads.remove_nodes_from([n.name for n in graph.fx.nodes if n.op != "output" and n not in needed])
    return {reads.nodes[name]["node"] for name in nx.ancestors(reads, "output")}


def _holds_nothing(node: fx.Node) -> bool:
    meta = node.meta["tensor"]
    return isinstance(meta, TensorMeta) and 0 in meta.shape
