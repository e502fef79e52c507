"""Record the ATen calls of a forward pass under a dispatch mode."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from maskprop.graph.decompose import DECOMPOSED
from maskprop.graph.functional import Value, functional_overload
from maskprop.graph.graph import MUTABLE_STATISTICS, Graph, ModuleCall, TensorMeta, is_op
from maskprop.graph.numbers import number_of
from maskprop.graph.shapes import run_on_fakes
from maskprop.graph.structure import map_tensors
from maskprop.modules import modules_by_path, named_tensors

# Calls that answer a question about a tensor's metadata and compute nothing.
_QUERIES = {
    "prim::device",
    "prim::layout",
    "aten::sym_size",
    "aten::sym_stride",
    "aten::is_contiguous",
    "aten::is_pinned",
}


_DEVICE = torch.ops.prim.device.default

CALL = "_compiled_call_impl"

_Place = tuple[str, int, type]

_inserting: list[bool] = []


@contextmanager
def inserted_ops() -> Iterator[None]:
    """What is recorded meanwhile carries ``meta["inserted"]``: it is no part of the author's forward."""
    _inserting.append(True)
    try:
        yield
    finally:
        _inserting.pop()


class Recorder(TorchDispatchMode):
    """Turns dispatched ATen calls into the nodes of a :class:`Graph`.

    Args:
        model: its parameters, buffers and tensor attributes become ``get_attr`` nodes.
        concrete: whether the tensors hold real values.
        masks: of its parameters, applied where a number is read that depends on them alone.
    """

    looks_back = True  # whether it matters what the model remembers

    def __init__(self, model: nn.Module, concrete: bool, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph(fx.Graph(), {}, concrete=concrete)
        self._values: dict[int, Value] = {}
        self._unread: dict[int, Callable[[], fx.Node]] = {}  # results that nothing has read yet
        self._keep: list[Tensor] = []  # ids stay unique while the tensors live
        modules = modules_by_path(model, aliases=True)
        self._names: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in named_tensors(modules, bare=True):
            first, _ = self._names.setdefault(id(tensor), (name, tensor))
            if name != first:
                self.graph.aliases[name] = first
        self._masks = {self.graph.aliases.get(name, name): mask for name, mask in (masks or {}).items()}
        self._states: dict[str, fx.Node] = {}
        self._paths = {m: path for path, m in reversed(modules.items())}  # of several paths, the first
        self._stack: list[tuple[str, int]] = [("", 0)]
        self._types: list[type] = [type(model)]
        self._calls = 0
        self.last_path = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is ever compiled; torch's guard against it costs time, and seconds at first

    @functools.cached_property
    def _storages(self) -> dict[int, str]:
        """Names of the model's tensors by the memory that they lie in."""
        return {t.untyped_storage()._cdata: name for name, t in self._names.values() if not t.is_sparse}

    # -- what the tracer calls ------------------------------------------------------------------

    @property
    def on_meta(self) -> bool:
        """Whether a parameter is on the meta device."""
        return any(t.is_meta for _, t in self._names.values() if isinstance(t, nn.Parameter))

    @contextmanager
    def module_paths(self) -> Iterator[None]:
        """Follow which module is running: a call of one comes here, in the way in which it reaches what compiles it.

        That is an attribute of the module. A patch of ``nn.Module.__call__`` has Python forget what it knows of every
        class of modules, which takes longer than many a forward pass on fake tensors.
        """

        def recorded(module: nn.Module, path: str, /, *args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            self.last_path = path
            self.graph.history.append(made := ModuleCall(path, self._calls))
            if module._forward_hooks or module._forward_pre_hooks:
                self.graph.hooked.add(path)
            first = path not in self.graph.calls
            if first:
                self.graph.calls[path] = self._nodes_of(args), self._nodes_of(kwargs) if kwargs else {}
            self._stack.append((path, self._calls))
            self._types.append(type(module))
            try:
                result = self._run(module, args, kwargs)
            finally:
                self._stack.pop()
                self._types.pop()
            self.last_path = self._stack[-1][0]
            made.last, made.result = self._calls, self._nodes_of(result)
            if first:
                self.graph.results[path] = made.result
            return result

        before = [(vars(module), vars(module).get(CALL)) for module in self._paths]
        for module, path in self._paths.items():
            vars(module)[CALL] = functools.partial(recorded, module, path)
        try:
            yield
        finally:
            for attributes, compiled in before:
                attributes.pop(CALL, None)
                if compiled is not None:
                    attributes[CALL] = compiled

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """The node of a tensor that a recorded call was given or made; ``None`` of any other."""
        made = id(tensor) in self._values or id(tensor) in self._unread
        return self._node(tensor) if made else None

    def note_tensor_read(self, tensor: Tensor) -> None:
        """Note that Python reads a value where no op shows it."""
        value = self._values.get(id(tensor))
        if value is not None:
            self._note_read(value.current(self._emit))

    def _run(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module."""
        return module._call_impl(*args, **kwargs)

    @contextmanager
    def listening(self) -> Iterator[list[fx.Node]]:
        """Record; on leaving, the list holds the ops that were made meanwhile."""
        before = len(self.graph.fx.nodes)
        made: list[fx.Node] = []
        with self:
            yield made
        count = len(self.graph.fx.nodes) - before
        made += [n for n in itertools.islice(reversed(self.graph.fx.nodes), count) if is_op(n)][::-1]

    def _nodes_of(self, value: Any) -> Any:
        """The same structure with nodes in place of tensors."""
        return map_tensors(value, self._node_of_call)

    def _node_of_call(self, tensor: Tensor) -> fx.Node:
        return self._node(_physical(tensor))

    def add_input(self, tensor: Tensor, name: str) -> None:
        """Declare an input of the forward pass."""
        node = self.graph.fx.placeholder(name)
        self._bind(tensor, self._tag(node, TensorMeta.of(tensor)))

    def finish(self, outputs: list[tuple[str, Tensor]]) -> Graph:
        """Close the graph with its outputs."""
        nodes = [self._node(t) for _, t in outputs]
        if not self.on_meta and any(t.is_meta for _, t in self._names.values()):
            raise RuntimeError("forward gave a tensor of the model the memory of a fake one, by setting its `data`")
        self.graph.output_paths = [path for path, _ in outputs]
        self.graph.fx.output(tuple(nodes))
        self.drop_unread()
        return self.graph

    def _renewed(self) -> Iterator[tuple[str, fx.Node | None]]:
        """The model's tensors that were read and then written to, or replaced by others, and their last values."""
        modules = {path: module for module, path in self._paths.items()}
        for name, node in self._states.items():
            tensor, (path, _, key) = self.graph.state[name], name.rpartition(".")
            if path in modules and not isinstance(tensor, nn.Parameter):
                own = modules[path]
                held = own._buffers[key] if key in own._buffers else vars(own).get(key)
                tensor = held if isinstance(held, Tensor) else tensor
            value = self._values.get(id(tensor))
            last = None if value is None else value.node
            if last is not node:
                yield name, last

    def drop_unread(self) -> None:
        """Erase the calls that were only implied and that nothing reads."""
        for node in self._unread_nodes():
            self.graph.fx.erase_node(node)

    def mark_unread(self) -> None:
        """Mark those calls instead, in a recording that was cut short: what came next might have read them."""
        for node in self._unread_nodes():
            node.meta["unread"] = True

    def _unread_nodes(self) -> list[fx.Node]:
        """Implied calls that nothing reads, nor the model's next call: what that will read is told to the graph."""
        found: dict[fx.Node, None] = {}
        self.graph.renewed = dict(self._renewed())
        remembered = set(self.graph.renewed.values())
        for node in reversed(self.graph.fx.nodes):
            implied = node.op == "get_attr" or "implied" in node.meta or node.target is operator.getitem
            if implied and found.keys() >= node.users.keys() and node not in remembered:
                found[node] = None
        return list(found)

    # -- recording ------------------------------------------------------------------------------

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is _DEVICE and isinstance(args[0], FakeTensor):  # asked all the time
            return args[0].fake_device
        kwargs = kwargs or {}
        schema = op._schema
        if schema.name in _QUERIES:
            return op(*args, **kwargs)
        if schema.name in DECOMPOSED:
            with self:
                made = DECOMPOSED[schema.name](*args, **kwargs)
            if made is not NotImplemented:
                return made
        node_args = tuple(map(self._to_node, args))
        node_kwargs = {name: self._to_node(arg) for name, arg in kwargs.items()}
        if schema.name == "aten::_local_scalar_dense":
            self._note_read(node_args[0])
            if not self.graph.concrete:
                return number_of(node_args[0], self.graph.state, self._masks)
        if schema.is_mutable:
            self._note_written(op, args)
        result = op(*args, **kwargs) if self.graph.concrete else run_on_fakes(op, args, kwargs)
        if torch.Tag.inplace_view in op.tags:
            self._record_in_place_view(op, args, node_args, node_kwargs)
        elif schema.is_mutable and schema.name not in MUTABLE_STATISTICS:
            self._record_write(op, args, kwargs, node_args, node_kwargs, result)
        else:
            self._record(op, args, node_args, node_kwargs, result)
        return result

    def _record(self, op: OpOverload, args: Any, node_args: Any, node_kwargs: dict[str, Any], result: Any) -> None:
        if isinstance(result, Tensor):
            if self._values.get(id(result)) is not None and any(result is a for a in args):
                return  # the op handed back its argument
            emit = functools.partial(
                self._emit_tagged, op, node_args, node_kwargs, TensorMeta.of(result), self._place()
            )
            if not _takes_tensors(op):  # many of these are made for nothing
                self._postpone(result, emit)
                return
            node = emit()
            self._bind(result, node, *self._view_of(op, args, node, None))
        elif isinstance(result, (list, tuple)):
            metas = tuple(TensorMeta.of(r) if isinstance(r, Tensor) else None for r in result)
            node = self._emit_tagged(op, node_args, node_kwargs, metas)
            for i, item in enumerate(result):
                if not isinstance(item, Tensor):
                    continue
                emit = functools.partial(self._emit_tagged, operator.getitem, (node, i), {}, metas[i], self._place())
                view = self._view_of(op, args, node, i)
                if view:
                    self._bind(item, emit(), *view)
                else:
                    self._postpone(item, emit)
        elif result is not None:  # a number that was made of them
            for node in itertools.chain(node_args, node_kwargs.values()):
                if isinstance(node, fx.Node):
                    self._note_read(node)

    def _record_write(
        self, op: OpOverload, args: Any, kwargs: Any, node_args: Any, node_kwargs: dict[str, Any], result: Any
    ) -> None:
        pure = functional_overload(op)
        targets = [
            args[i] if i < len(args) else kwargs.get(a.name)
            for i, a in enumerate(op._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        for a in op._schema.arguments:
            if a.is_out:
                node_kwargs.pop(a.name, None)
        results = result if isinstance(result, (list, tuple)) else [result]
        metas = [TensorMeta.of(r) for r in (results if len(targets) > 1 else [targets[0]])]
        node = self._emit_tagged(pure, node_args, node_kwargs, metas[0] if len(metas) == 1 else tuple(metas))
        for i, target in enumerate(targets):
            value = self._values[id(target)]
            one = node if len(targets) == 1 else self._emit_tagged(operator.getitem, (node, i), {}, metas[i])
            value.write(one, self._emit)
            if isinstance(results[min(i, len(results) - 1)], Tensor):
                result_i = results[min(i, len(results) - 1)]
                if id(result_i) not in self._values:
                    self._values[id(result_i)] = value
                    self._keep.append(result_i)

    def _record_in_place_view(self, op: OpOverload, args: Any, node_args: Any, node_kwargs: dict[str, Any]) -> None:
        """``transpose_`` and the like: the same tensor object becomes a view of what it was."""
        node = self._emit_tagged(functional_overload(op), node_args, node_kwargs, TensorMeta.of(args[0]))
        self._values[id(args[0])] = Value(node, self._values[id(args[0])], node, seen=self._values[id(args[0])].version)

    def _view_of(self, op: OpOverload, args: Any, node: fx.Node, index: int | None) -> tuple[Any, ...]:
        """Parent, view node and output index of a result that shares its first argument's memory."""
        returns = op._schema.returns
        info = returns[0].alias_info if returns else None
        if info is None or not args or not isinstance(args[0], Tensor):
            return ()
        return self._values[id(args[0])], node, index

    # -- nodes ----------------------------------------------------------------------------------

    def _to_node(self, arg: Any) -> Any:
        """An argument of an op: a tensor, a plain value, or a list of them."""
        if isinstance(arg, Tensor):
            return self._node(arg)
        return [self._to_node(a) for a in arg] if isinstance(arg, (list, tuple)) else arg

    def _node(self, tensor: Tensor) -> fx.Node:
        value = self._values.get(id(tensor))
        if value is None:
            value = self._adopt(tensor)
        return value.current(self._emit)

    def _adopt(self, tensor: Tensor) -> Value:
        """A result that is read for the first time; or what no recorded op made: the model's own, or a constant."""
        emit = self._unread.pop(id(tensor), None)
        if emit is not None:
            return self._bind(tensor, emit())
        found = self._names.get(id(tensor))
        if found is not None:
            return self._bind(tensor, self._state(*found))
        same = self._storages.get(tensor.untyped_storage()._cdata) if not tensor.is_sparse else None
        if same is not None:  # `parameter.data`, say: another object, same memory
            owner = next(t for n, t in self._names.values() if n == same)
            if owner.shape == tensor.shape and owner.stride() == tensor.stride():
                value = self._values[id(tensor)] = self._values.get(id(owner)) or self._adopt(owner)
                self._keep.append(tensor)
                return value
        return self._bind(tensor, self._lift(tensor))

    def _lift(self, constant: Tensor) -> fx.Node:
        """The node of a tensor that ``forward`` made of numbers."""
        node = self._state(f"_constant{len(self.graph.state)}", constant)
        node.meta["lifted"] = True
        self.graph.opaque |= self.graph.concrete
        return node

    def _state(self, name: str, tensor: Tensor) -> fx.Node:
        """The node of a tensor that the model holds."""
        node = self._states.get(name)
        if node is None:
            self.graph.state[name] = tensor
            node = self.graph.fx.create_node("get_attr", name, (), {}, name="p_" + name.replace(".", "_"))
            self._states[name] = self._tag(node, TensorMeta.of(tensor))
            node.meta["state"] = tensor
        return node

    def _bind(
        self,
        tensor: Tensor,
        node: fx.Node,
        parent: Value | None = None,
        view: fx.Node | None = None,
        index: int | None = None,
    ) -> Value:
        value = Value(node, parent, view, index, seen=parent.version if parent else 0)
        self._values[id(tensor)] = value
        self._keep.append(tensor)
        return value

    def _postpone(self, tensor: Tensor, emit: Callable[[], fx.Node]) -> None:
        """Record a result only when something reads it."""
        self._unread[id(tensor)] = emit
        self._keep.append(tensor)

    def _emit_tagged(self, target: Any, args: Any, kwargs: Any, meta: Any, place: _Place | None = None) -> fx.Node:
        name = target.__name__.replace(".", "_").lower()
        node = self.graph.fx.create_node("call_function", target, name=name)
        node.args = args  # given at once, they would be searched for symbolic sizes, which takes most of the time
        if kwargs:
            node.kwargs = kwargs
        if _inserting:
            node.meta["inserted"] = True
        return self._tag(node, meta, place)

    def _emit(self, target: Any, args: Any, kwargs: Any, meta: Any) -> fx.Node:
        """Record a call that the functional form needs and that was never dispatched."""
        node = self._emit_tagged(target, args, kwargs, meta)
        node.meta["implied"] = True
        return node

    def _tag(self, node: fx.Node, meta: Any, place: _Place | None = None) -> fx.Node:
        path, call, kind = place or self._place()
        node.meta.update(tensor=meta, path=path, call=call, module=kind)
        return node

    def _place(self) -> _Place:
        """Module path, running number and type of the call that is running."""
        return *self._stack[-1], self._types[-1]

    # -- values ---------------------------------------------------------------------------------

    def _note_read(self, node: fx.Node) -> None:
        """Python reads a value."""
        node.meta["read"] = True

    def _note_written(self, op: OpOverload, args: Any) -> None:
        """Remember which of the model's own tensors a forward pass writes to."""
        for position in _written(op):
            arg = args[position] if position < len(args) else None
            if isinstance(arg, Tensor) and not isinstance(arg, FakeTensor):  # the model's own are not fake
                name = self._storages.get(arg.untyped_storage()._cdata)
                if name is not None:
                    self.graph.mutated.add(name)


def _physical(tensor: Tensor) -> Tensor:
    """The tensor that ``torch.func``'s transforms wrap while they run a module: its calls are recorded on that."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


@functools.cache
def _written(op: OpOverload) -> list[int]:
    """Positions of the arguments that an op writes to."""
    infos = [a.alias_info for a in op._schema.arguments]
    return [i for i, info in enumerate(infos) if info is not None and info.is_write]


@functools.cache
def _takes_tensors(op: OpOverload) -> bool:
    return any("Tensor" in str(a.type) for a in op._schema.arguments)
