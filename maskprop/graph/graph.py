"""The Graph: a model's ATen calls in order, with the module that made each."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph as FxGraph
from torch.fx import Node

from maskprop.errors import MetaValueError, TraceError

if TYPE_CHECKING:
    import networkx as nx

# These declare a write to running statistics that evaluation mode does not do.
MUTABLE_STATISTICS = {
    "aten::native_batch_norm",
    "aten::cudnn_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::batch_norm_with_update",
}


@dataclass(frozen=True)
class TensorMeta:
    """Shape, dtype, device and memory layout of a recorded value.

    Attributes:
        order: the axes as they lie in memory, the slowest first; empty for the usual order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        """The metadata of a tensor."""
        strides = tensor.stride() if tensor.layout is torch.strided else ()
        return _meta(tensor.shape, strides, tensor.dtype, tensor.device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@functools.lru_cache(maxsize=1 << 14)  # a model's tensors have few sizes
def _meta(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> TensorMeta:
    order = tuple(sorted(range(len(strides)), key=lambda d: -strides[d]))
    order = () if order == tuple(range(len(strides))) else order
    return TensorMeta(tuple(int(s) for s in shape), dtype, device, order)


@dataclass
class ModuleCall:
    """One call of a module; the ops that it and the modules inside it made have numbers from ``number`` to ``last``.

    Attributes:
        path: the module.
        number, last: see above; the numbers of the calls inside it lie between them.
        result: what it returned, with nodes in place of tensors.
    """

    path: str
    number: int
    last: int = 0
    result: Any = None

    def __contains__(self, node: Node) -> bool:
        """Whether an op was made within the call."""
        return bool(self.number <= node.meta["call"] <= self.last)


@dataclass
class Graph:
    """What one forward pass did.

    Attributes:
        fx: the calls. Parameters, buffers and other tensors that the model holds are ``get_attr``
            nodes; ``node.meta["tensor"]`` is a :class:`TensorMeta` (a tuple of them, with ``None``
            for absent ones, for an op of several results), ``node.meta["path"]`` the module path and
            ``node.meta["call"]`` the running number of that module's call; a ``get_attr`` has its tensor under
            ``node.meta["state"]``; a node whose value Python read has ``node.meta["read"]``.
        state: tensors behind the ``get_attr`` nodes, by target.
        aliases: other names of the same parameter or buffer -> the name used here.
        concrete: whether real values were computed (the branch taken is then this input's).
        training: whether the author's modules ran in training mode.
        opaque: whether a tensor turned up that no recorded op made (``forward`` may have left torch in between).
        mutated: buffers that ``forward`` writes to.
        renewed: the tensors of :attr:`state` that a call leaves changed, and the nodes of what the next one reads;
            ``None`` where that is not seen.
        remembered: plain attributes in which ``forward`` keeps what its next call reads.
        hooked: paths of modules whose calls have hooks.
        output_paths: where each output stands in what ``forward`` returns.
        calls: arguments of every module's first call, with nodes in place of tensors.
        results: what that call returned, likewise.
        history: every call of a module, in the order in which they began.
        read: gives the values of tensors that are on the meta device, by name.
    """

    fx: FxGraph
    state: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    concrete: bool = False
    training: bool = False
    opaque: bool = False
    mutated: set[str] = field(default_factory=set)
    renewed: dict[str, Node | None] = field(default_factory=dict)
    remembered: list[str] = field(default_factory=list)
    hooked: set[str] = field(default_factory=set)
    output_paths: list[str] = field(default_factory=list)
    calls: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    history: list[ModuleCall] = field(default_factory=list)
    read: Callable[[str], Tensor] | None = None

    @property
    def nodes(self) -> list[Node]:
        """All nodes in execution order."""
        return list(self.fx.nodes)

    @property
    def ops(self) -> list[Node]:
        """The recorded calls in execution order, without the tuple look-ups."""
        return [n for n in self.fx.nodes if is_op(n)]

    def may_be_read(self, node: Node) -> bool:
        """Whether Python may have read a value: it did, or its shape says how many there were and no op reads it."""
        if "read" in node.meta or not self.concrete or node.users:
            return "read" in node.meta
        return isinstance(node.target, OpOverload) and torch.Tag.dynamic_output_shape in node.target.tags

    def value(self, name: str) -> Tensor:
        """The value of a tensor in :attr:`state`, detached; read from elsewhere if the model is on the meta device.

        Raises:
            MetaValueError: the tensor is on the meta device, and nothing was given that reads it.
        """
        tensor = self.state[name].detach()
        if not tensor.is_meta:
            return tensor
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        if name.startswith("_constant"):
            raise MetaValueError(
                f"forward makes a tensor of shape {tuple(tensor.shape)} from numbers, which are lost on the meta "
                "device, and its value is needed. Load the model, or pass verify=False if that is what needs it."
            )
        if self.read is None:
            raise MetaValueError(
                f"a constant that pruned units leave depends on the value of '{name}', which is on the meta device. "
                "Pass read=, a function from a name to the tensor, or load the model."
            )
        return self.read(name)

    def dependencies(self) -> nx.DiGraph:
        """The dependency graph: an edge from each value to each op that reads it.

        Nodes are the names of fx nodes; the attribute ``node`` holds the fx node itself.
        """
        import networkx as nx  # here, since it takes a while to import

        graph = nx.DiGraph()
        for node in self.fx.nodes:
            graph.add_node(node.name, node=node)
            graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
        return graph

    def check(self) -> None:
        """Check the invariants that the later stages rely on.

        Raises:
            TraceError: a node reads what is not made before it, lacks metadata, is neither an input, a tensor of
                :attr:`state`, an op that leaves its arguments alone nor one result of an op of several; or there
                is not exactly one output, at the end.
        """
        made: set[Node] = set()
        for node in self.fx.nodes:
            wrong = self._problem(node, made)
            if wrong:
                raise TraceError(f"graph node '{node.name}' {wrong}. This is a bug in the tracer that built it.")
            made.add(node)
        count = sum(n.op == "output" for n in made)
        if count != 1 or node.op != "output":
            raise TraceError(
                f"the graph must end with its one and only output node, and has {count}. This is a bug in the tracer "
                "that built it."
            )

    def _problem(self, node: Node, made: set[Node]) -> str:
        """What is wrong with a node, given those before it."""
        if not made.issuperset(node.all_input_nodes):
            late = next(n for n in node.all_input_nodes if n not in made)
            return f"reads '{late.name}', which is not made before it"
        if node.op == "output":
            return ""
        missing = [key for key in ("tensor", "path", "call") if key not in node.meta]
        if missing:
            return f"({node.target}) has no meta['{missing[0]}']"
        if node.op == "get_attr":
            return "" if node.target in self.state else f"reads '{node.target}', which is not among the graph's tensors"
        if node.op == "placeholder":
            return ""
        if node.target is operator.getitem:
            several, index = node.args
            metas = several.meta["tensor"] if isinstance(several, Node) else None
            count = len(metas) if isinstance(metas, tuple) else 0
            if isinstance(index, int) and 0 <= index < count:
                return ""
            return f"takes result {index} of '{several}', which has {count or 'just one'}"
        if not is_op(node):
            return f"is a {node.op} of {node.target}, and no torch op"
        schema = node.target._schema  # type: ignore[union-attr]
        if schema.is_mutable and schema.name not in MUTABLE_STATISTICS:
            return f"({node.target}) writes to its argument"
        return ""

    def __str__(self) -> str:
        lines = []
        for node in self.fx.nodes:
            meta = node.meta.get("tensor")
            shape = " | ".join(str(m) for m in meta) if isinstance(meta, tuple) else str(meta)
            args = ", ".join([_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()])
            lines.append(
                f"%{node.name} = {'' if node.op == 'call_function' else node.op + ' '}{node.target}({args})  # "
                f"{shape}  {where(node)}"
            )
        return "\n".join(lines)


def is_op(node: Node) -> bool:
    """Whether the node is a recorded call, as opposed to a look-up in a tuple of results."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def where(node: Node) -> str:
    """The module path of a node, for messages."""
    return f"'{node.meta.get('path', '')}'"


def shape_of(node: Node) -> tuple[int, ...]:
    """Shape of a node that holds one tensor."""
    meta = node.meta["tensor"]
    if not isinstance(meta, TensorMeta):
        raise TraceError(f"graph node '{node.name}' ({node.target}) holds several tensors where one was expected.")
    return meta.shape


def _show(arg: Any) -> str:
    if isinstance(arg, Node):
        return f"%{arg.name}"
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_show(a) for a in arg) + "]"
    return repr(arg)
