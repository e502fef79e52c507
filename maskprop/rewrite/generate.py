"""A generated forward, for numbers that stand in ``forward`` itself.

``view(-1, 320)``, ``C // self.num_heads`` or a scale computed from a shape cannot be mended from outside. For the
smallest module that holds them, the author's forward is traced (see :mod:`maskprop.rewrite.concolic`); the traced
forward is run node by node on the compact module beside the plan, and a literal that no longer fits takes the planned
value. The result is a subclass of the author's class, put on the same object.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from maskprop.graph.graph import ModuleCall, shape_of
from maskprop.graph.record import Recorder
from maskprop.graph.shapes import QuickFakes
from maskprop.graph.structure import tensors_in
from maskprop.graph.trace import frozen_state, plain_kernels, quiet
from maskprop.infer.op import Op
from maskprop.rewrite.calls import Arguments
from maskprop.rewrite.concolic import OTHER_BRANCH, header, run_node, trace_module
from maskprop.rewrite.edits import Edits
from maskprop.rewrite.generated import generated_class
from maskprop.rewrite.replay import Replay

log = logging.getLogger(__name__)
aten = torch.ops.aten

# What indexing with a tuple of slices, numbers and None comes out as.
_INDEXING = (aten.slice.Tensor, aten.select.int, aten.unsqueeze.default)


class _GiveUp(Exception):
    """This module's forward cannot be generated."""


def generate_forwards(edits: Edits, replay: Replay, calls: Mapping[str, Arguments]) -> list[str]:
    """Give each module a forward in which the planned sizes stand, where that is possible.

    Args:
        edits: the compact model and its undo log.
        replay: what the plan expects.
        calls: the modules to treat, and how they were called.

    Returns:
        Paths of the modules that have a generated forward now.
    """
    traced: dict[str, tuple[fx.Graph, Arguments]] = {}
    with edits.suspended(), frozen_state(edits.model):  # the author's forward runs on the dense module only
        for path, recorded in calls.items():
            module = edits.model.get_submodule(path)
            nodes = recorded.nodes
            caches = {name: NoCache() for name in CACHES if name in nodes and nodes[name] is None}
            for stand_ins in [caches, {}] if caches else [{}]:
                arguments = recorded.beside(stand_ins)
                try:
                    with arguments.fake, QuickFakes():
                        traced[path] = trace_module(module, arguments.values(_dense_shape)), arguments
                    break
                except Exception as error:  # whatever fx or the module's code raises: this module is left as it is
                    log.info("no forward could be traced for '%s': %s: %s", path, type(error).__name__, error)
    done = []
    recorder = Recorder(edits.model, concrete=False)
    for path, (forward, arguments) in traced.items():
        module = edits.model.get_submodule(path)
        try:
            with frozen_state(module):
                source, imports = _Generator(recorder, module, path, replay, forward, arguments).run()
        except Exception as error:  # as above
            log.info("no forward could be generated for '%s': %s: %s", path, type(error).__name__, error)
            continue
        edits.set_class(module, generated_class(type(module), source, imports))
        done.append(path)
    return done


# Under these names attention modules take a key-value cache, which a later call may bring.
CACHES = ("past_key_values", "past_key_value", "layer_past")


class NoCache:
    """Stands in for a cache that the recorded call did not have."""

    def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What a first call of a cache returns."""
        return keys, values


def _dense_shape(node: fx.Node) -> Sequence[int]:
    return shape_of(node)


class _Generator:
    """Generates the forward of one module."""

    def __init__(
        self,
        recorder: Recorder,
        module: nn.Module,
        path: str,
        replay: Replay,
        forward: fx.Graph,
        arguments: Arguments,
    ) -> None:
        self.recorder, self.module, self.replay = recorder, module, replay
        self.forward, self.arguments, self.fake = forward, arguments, arguments.fake
        self.history = replay.history
        self.number = next(c for c in self.history if c.path == path).number
        dense = replay.dense(strict=True, among=replay.first_call(path))
        self.dense = [n for n in dense if "implied" not in n.meta]
        self.at = 0

    def run(self) -> tuple[str, dict[str, Any]]:
        """Source of the forward, and the objects that its names refer to."""
        values = self.arguments.values(self.replay.alignment.expected_shape)
        with torch.no_grad(), plain_kernels(), quiet(), self.fake:
            self._interpret(self.forward, values)
        _live_training(self.forward)
        self.forward.lint()
        code = self.forward.python_code("self")
        body = code.src[code.src.index("\n", code.src.index("def forward(")) :]
        return header(self.module, self.arguments.nodes) + body, dict(code.globals)

    # -- running beside the plan ----------------------------------------------------------------

    def _interpret(self, traced: fx.Graph, arguments: Mapping[str, Any]) -> None:
        env: dict[fx.Node, Any] = {}
        for node in traced.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                env[node] = arguments[str(node.target)]
                for name, tensor in tensors_in(env[node], str(node.target)):
                    self.recorder.add_input(tensor, name)
                continue
            if node.target is torch._assert and node.args[1] == OTHER_BRANCH:
                condition = node.all_input_nodes[0]
                if not env[condition]:  # what was decided by a dense size stays so
                    node.args = True, OTHER_BRANCH
                continue
            child = self._next_child() if node.op == "call_module" else None
            if child is not None and self.replay.inside_replaced(child.path):  # its ops are not compared
                env[node] = self._planned(child)
                continue
            try:
                value, ops = self._call(node, env)
                wrong = self._compare(ops)
            except _GiveUp:
                raise
            except Exception as error:  # a literal that does not fit raises as often as it misleads
                value, ops, wrong = None, [], f"{type(error).__name__}: {error}"
            if wrong is not None:
                try:
                    value, ops = self._mended_call(node, env, wrong)
                except _GiveUp:
                    if child is None:
                        raise
                    value, ops = self._planned(child), self._dense_ops(child)
            self.at += len(ops)
            env[node] = value
        if self.at != len(self.dense):
            raise _GiveUp(f"the traced forward makes {self.at} ops, the module {len(self.dense)}")

    def _next_child(self) -> ModuleCall:
        """The dense call that the next traced call of a module was."""
        call = self.history[self.number]  # numbers count from one
        self.number = call.last
        return call

    def _planned(self, child: ModuleCall) -> Any:
        """What a child will return when it is mended itself, which comes later."""
        with _disable_current_modes():  # the plan is read from real tensors
            value = self.arguments.blank(child.result, self.replay.alignment.expected_shape)
        for name, tensor in tensors_in(value, "planned"):
            self.recorder.add_input(tensor, name)
        return value

    def _dense_ops(self, child: ModuleCall) -> list[fx.Node]:
        """The ops that a child will make; none is compared of one that holds only replaced modules."""
        ops = list(itertools.takewhile(child.__contains__, self.dense[self.at :]))
        if not ops and any(n in child for n in self.dense):
            raise _GiveUp(f"'{child.path}' stands elsewhere in the trace")
        return ops

    def _mended_call(self, node: fx.Node, env: dict[fx.Node, Any], wrong: str) -> tuple[Any, list[fx.Node]]:
        self._mend(node, env, wrong)
        value, ops = self._call(node, env)
        again = self._compare(ops)
        if again is not None:
            raise _GiveUp(f"'{node.format_node()}' still gives {again}")
        return value, ops

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> tuple[Any, list[fx.Node]]:
        """Run one node; its value and the significant ops it made."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        with self.recorder.listening() as made:
            value = run_node(self.module, node.op, node.target, args, kwargs)
        return value, self.replay.significant([n for n in made if "implied" not in n.meta])

    def _compare(self, ops: list[fx.Node]) -> str | None:
        for offset, op in enumerate(ops):
            if self.at + offset >= len(self.dense):
                return "more ops than the module made"
            found = self.replay.differs(self.dense[self.at + offset], op)
            if found is not None:
                return f"{found[1]} where {found[0]} was expected"
        return None

    # -- mending a literal ----------------------------------------------------------------------

    def _mend(self, node: fx.Node, env: dict[fx.Node, Any], wrong: str) -> None:
        """Put the planned sizes or scalars into the node's arguments."""
        want = self.dense[self.at]
        name = str(getattr(node.target, "__name__", node.target))
        shapes = self.replay.shapes[want]
        if name == "scaled_dot_product_attention":
            node.kwargs = {**node.kwargs, "scale": attention_scale(self.dense[self.at :])}
        elif name in (
            "view",
            "reshape",
            "expand",
            "unflatten",
            "new_zeros",
            "new_ones",
            "new_full",
            "zeros",
            "ones",
            "full",
            "repeat",
            "tile",
        ):
            self._mend_sizes(node, env, name, want, shapes[0] or ())
        elif name in ("split", "split_with_sizes", "chunk"):
            dim = _split_dim(node)
            sizes = [s[dim] for s in shapes if s is not None]
            equal = len(set(sizes)) == 1 and want.target is not aten.split_with_sizes.default
            node.args = (node.args[0], sizes[0] if equal else sizes, *node.args[2:])
            if name == "chunk":  # it takes how many parts, not their sizes
                node.target = "split" if node.op == "call_method" else torch.split
        elif name in ("getitem", "setitem"):
            items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            ops = itertools.takewhile(lambda n: n.target in _INDEXING, self.dense[self.at :])
            cuts = [n for n in ops if n.target is aten.slice.Tensor]  # in the order of the items that make them
            made = tuple(self._mend_slice(item, env, cuts) if isinstance(item, slice) else item for item in items)
            node.args = (node.args[0], made, *node.args[2:])
        else:
            scalars = self.replay.numbers(want)
            numbers = [
                i
                for i, a in enumerate(node.args)
                if isinstance(a, (int, float)) or (isinstance(a, fx.Node) and isinstance(env.get(a), (int, float)))
            ]
            if len(scalars) != 1 or len(numbers) != 1:
                raise _GiveUp(f"'{node.format_node()}' gives {wrong}, and holds no number that could be changed")
            number = self._in_proportion(node.args[numbers[0]], scalars[0], node, env, operator.truediv)
            node.args = tuple(number if i == numbers[0] else a for i, a in enumerate(node.args))

    def _mend_slice(self, item: slice, env: dict[fx.Node, Any], cuts: list[fx.Node]) -> slice:
        """The slice with planned bounds where those move; takes its op from ``cuts``."""
        start, stop, step = (env[b] if isinstance(b, fx.Node) else b for b in (item.start, item.stop, item.step))
        if not cuts:
            return item
        call = Op(cuts[0])
        axis, (source,) = call.arg("dim"), call.inputs
        size = call.shapes[0][axis]
        bounds = slice(call.arg("start"), call.arg("end"), call.arg("step")).indices(size)
        if slice(start, stop, step).indices(size) != bounds:
            return item
        del cuts[0]
        with _disable_current_modes():
            first, last = (self.replay.alignment.expected_bound(source, axis, b) for b in bounds[:2])
        return item if (first, last) == bounds[:2] else slice(item.start and first, item.stop and last, item.step)

    def _mend_sizes(
        self, node: fx.Node, env: dict[fx.Node, Any], name: str, want: fx.Node, shape: Sequence[int]
    ) -> None:
        """Write planned sizes over literals, and over computed sizes that come out wrong."""
        start = 0 if name in ("zeros", "ones", "full") else 2 if name == "unflatten" else 1
        head, tail = node.args[:start], node.args[start:]
        packed = len(tail) == 1 and isinstance(tail[0], (tuple, list))
        sizes = list(tail[0] if packed else tail)  # type: ignore[arg-type]
        if len(sizes) == 1 and isinstance(env.get(sizes[0]), (tuple, list)):  # computed as a whole
            sizes = self._unpacked(sizes[0], node, env)
        if name == "unflatten":
            source, dim = env[node.all_input_nodes[0]], int(str(node.args[1]))
            dim = dim % source.dim()
            shape = shape[dim : dim + len(sizes)]
        dense = want.meta["tensor"].shape if name != "unflatten" else shape
        if name == "expand" and want.target is not aten.expand.default:  # planned to change nothing: it is not compared
            shape = dense = tuple(env[node.all_input_nodes[0]].shape)
        if len(sizes) != len(shape):
            raise _GiveUp(f"'{node.format_node()}' makes sizes in a way that is not understood")
        made = []
        for size, planned, before in zip(sizes, shape, dense, strict=True):
            actual = env[size] if isinstance(size, fx.Node) else size
            keep = actual == planned or (actual == -1 and (planned == before or name == "expand"))
            made.append(size if keep else self._in_proportion(size, planned, node, env))
        node.args = (*head, made) if packed else (*head, *made)

    def _unpacked(self, sizes: fx.Node, node: fx.Node, env: dict[fx.Node, Any]) -> list[fx.Node]:
        """Each of the sizes that a node computes, as a node."""
        with self.forward.inserting_before(node):
            parts = [self.forward.call_function(operator.getitem, (sizes, i)) for i in range(len(env[sizes]))]
        env.update(zip(parts, env[sizes], strict=True))
        return parts

    def _in_proportion(
        self, size: Any, planned: float, node: fx.Node, env: dict[fx.Node, Any], divide: Any = operator.floordiv
    ) -> Any:
        """The planned number; of one that is computed, as ``batch * 4`` is, the same part at other sizes."""
        if not isinstance(size, fx.Node) or _reads_shape(size) or not env[size]:
            return planned
        with self.forward.inserting_before(node):
            product = self.forward.call_function(operator.mul, (size, planned))
            part = self.forward.call_function(divide, (product, env[size]))
        env[product], env[part] = env[size] * planned, planned
        return part


def _reads_shape(node: fx.Node) -> bool:
    """Whether a node is one size of a tensor, as it is."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if node.target == "size":
        return len(node.args) > 1
    if node.target is not operator.getitem or source is None:
        return False
    return source.target == "size" or (source.target is getattr and source.args[1] == "shape")


def attention_scale(ops: Sequence[fx.Node]) -> float:
    """The dense scale: the square of what the math kernel multiplies q and k by."""
    for op in ops:
        if op.target is aten.mul.Scalar:
            return float(str(op.args[1])) ** 2
    raise _GiveUp("its attention does not scale its scores in a known way")


def _split_dim(node: fx.Node) -> int:
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    return int(str(dim))


def _live_training(graph: fx.Graph) -> None:
    """Read ``self.training`` where fx wrote down its value."""
    for node in list(graph.nodes):
        if isinstance(node.kwargs.get("training"), bool):
            with graph.inserting_before(node):
                live = graph.get_attr("training")
            node.kwargs = {**node.kwargs, "training": live}
