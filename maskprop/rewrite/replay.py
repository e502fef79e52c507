"""Trace the compact model and compare it, op by op, with what the plan expects."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from maskprop.align.align import Alignment
from maskprop.align.constants import number_at
from maskprop.graph.graph import Graph, TensorMeta, is_op
from maskprop.graph.paths import within
from maskprop.graph.trace import Inputs, trace_partial
from maskprop.infer.op import Op
from maskprop.rewrite.arguments import number_arguments, settings_of, size_positions
from maskprop.rewrite.follow import follows
from maskprop.rewrite.mismatch import Mismatch
from maskprop.rewrite.recorded import (
    BOUNDED,
    LAYOUT,
    adds_bias,
    idle_slice,
    in_shape,
    is_idle,
    made_by,
    order_of,
    other_input,
    read_nodes,
    same_target,
    shapes_of,
    shapes_of_meta,
    start_of,
    without_ones,
    without_unread,
    writes_all,
)

aten = torch.ops.aten


class Replay:
    """What the compact model's trace should look like, by the alignment of the dense one."""

    def __init__(self, graph: Graph, alignment: Alignment, replaced: Sequence[str] = ()) -> None:
        """Args: replaced: paths of modules that compute the same in another way; their ops are not compared."""
        self.alignment = alignment
        self.replaced = tuple(replaced)
        self._new_biases = alignment.plan.new_bias.keys()
        self.ops = [n for n in graph.fx.nodes if is_op(n)]
        self._graph = graph
        self._read = read_nodes(graph)
        self.history = graph.history
        self.shapes = {n: self._expected(n) for n in self.ops}
        self.concrete, self.training = graph.concrete, graph.training
        self._constants = {n: graph.state[str(n.target)] for n in graph.fx.nodes if n.op == "get_attr"}
        self._by_path: dict[str, list[fx.Node]] = {}
        self._position: dict[fx.Node, int] = {}
        self._place = {n: i for i, n in enumerate(self.ops)}
        self._dense: dict[bool, list[fx.Node]] = {}
        self._starts = {n: self._expected_start(n) for n in self.ops if n.target in BOUNDED}
        for node in self.ops:
            mates = self._by_path.setdefault(str(node.meta["path"]), [])
            self._position[node] = len(mates)
            mates.append(node)

    def ops_of(self, path: str) -> list[fx.Node]:
        """The ops that a module itself made, in order."""
        return self._by_path.get(path, [])

    def around(self, node: fx.Node) -> list[tuple[tuple[int, ...] | None, tuple[int, ...] | None]]:
        """Dense and compact shapes of an op's results and inputs."""
        pairs = list(zip(shapes_of(node), self.shapes[node], strict=True))
        for source in node.all_input_nodes:
            if is_op(source) and source in self.shapes:
                pairs += zip(shapes_of(source), self.shapes[source], strict=True)
            elif not isinstance(source.meta["tensor"], tuple):
                pairs.append((source.meta["tensor"].shape, self.alignment.expected_shape(source)))
        return pairs

    def first_call(self, path: str) -> list[fx.Node]:
        """The ops that a module and those below it made when it was called first, in order."""
        call = next(c for c in self.history if c.path == path)
        return [n for n in self.ops if n in call]

    def position(self, node: fx.Node) -> int | None:
        """Where an op stands among its module's own."""
        return self._position.get(node)

    def dense(self, strict: bool, among: Sequence[fx.Node] | None = None, most: int | None = None) -> list[fx.Node]:
        """The dense ops that are compared, see :meth:`significant`; all of them, or those among some, or the first."""
        if strict not in self._dense:
            found = (n for n in self.ops if self._is_compared(n, strict))
            if most is not None and among is None:
                return list(itertools.islice(found, most))
            self._dense[strict] = list(found)
        if among is None:
            return self._dense[strict]
        chosen = set(among)
        return [n for n in self._dense[strict] if n in chosen]

    def _is_compared(self, node: fx.Node, strict: bool) -> bool:
        if self._skipped(node) or writes_all(node, self.shapes.get):
            return False
        return not is_idle(node, self.shapes[node], self.input_shape(node), strict)

    def significant(self, actual: Sequence[fx.Node], strict: bool = True) -> list[fx.Node]:
        """The compact ops that are compared: no memory layout, nothing in replaced modules, no idle reshape.

        Not ``strict``: no reshape that only adds or drops axes of size 1 either. Authors leave those out where a
        count is one (``repeat_kv`` with a single query head a group).
        """
        kept = [n for n in actual if not self._skipped(n)]
        return [n for n in kept if not is_idle(n, shapes_of(n), in_shape(n), strict) and not writes_all(n, shapes_of)]

    def _skipped(self, node: fx.Node) -> bool:
        if node.target in LAYOUT or "inserted" in node.meta:
            return True
        if node.target is aten.t.default and node.all_input_nodes[0].op == "get_attr":
            return True  # a linear's own weight: with a new bias it is turned later
        if node.target is aten.add.Tensor and adds_bias(node):
            return True  # a linear of what is not contiguous adds its bias apart
        return self.inside_replaced(str(node.meta["path"]))

    def inside_replaced(self, path: str) -> bool:
        """Whether a module is, or belongs to, one that computes the same in another way."""
        return within(path, self.replaced)

    def _expected(self, node: fx.Node) -> tuple[tuple[int, ...] | None, ...]:
        meta = node.meta["tensor"]
        if isinstance(meta, tuple):
            read = {user.args[1] for user in node.users}
            return tuple(self.alignment.expected_shape(node, i) if i in read else None for i in range(len(meta)))
        return (self.alignment.expected_shape(node),)

    def run(self, model: nn.Module, inputs: Inputs) -> Mismatch | None:
        """Run ``model`` on fake tensors and return the first mismatch."""
        if self.follows(model, inputs):
            return None
        graph, error, path = trace_partial(model, inputs, self.concrete, self.training)
        return self.compare(graph, error, path)

    def follows(self, model: nn.Module, inputs: Inputs) -> bool:
        """Whether the compact model does exactly what the plan expects, with no reshape more or less."""
        if self.concrete or self.replaced or self._new_biases:
            return False
        return follows(model, inputs, self._graph, self)

    def agrees(self, want: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], meta: Any) -> bool:
        """Whether a compact call, with dense nodes for tensors, is the dense one but for the sizes that it is given."""
        wanted, actual = self.shapes[want], shapes_of_meta(meta)
        if not same_target(want.target, target) or want in self.alignment.numbers:
            return False
        if len(wanted) != len(actual) or any(w is not None and w != a for w, a in zip(wanted, actual, strict=True)):
            return False
        if want in self._starts and self._starts[want] != start_of(want, in_shape(want)):
            return False
        if args == want.args and kwargs == want.kwargs:
            return True
        sizes = size_positions(target)
        return (
            len(args) == len(want.args)
            and kwargs == want.kwargs
            and all(a == b or i in sizes for i, (a, b) in enumerate(zip(args, want.args, strict=True)))
        )

    def agrees_constant(self, node: fx.Node, constant: Tensor) -> bool:
        """Whether a tensor that ``forward`` makes of numbers is what the plan expects of the dense one."""
        kept = self._constant(node)
        return kept is None or constant.is_meta or _equal(kept, constant)

    def compare(
        self,
        graph: Graph,
        error: Exception | None,
        path: str,
        expected: Sequence[fx.Node] | None = None,
        own: str | None = None,
    ) -> Mismatch | None:
        """The first mismatch between a compact model's recorded ops and the dense ones.

        Args:
            graph: of the compact model, or of one of its modules.
            error: what ended it early, if anything did.
            path: of the module where it ended.
            expected: the dense ops; all by default.
            own: the module whose numbers count alone: those of the others are theirs to mend.
        """
        self._constants.update({n: graph.state[str(n.target)] for n in graph.fx.nodes if n.op == "get_attr"})
        made = graph.ops
        found = self._first_mismatch(True, expected, made, error, path, own)
        if found is None:
            return self._unread_bias(graph) if expected is None else None
        lenient = self._first_mismatch(False, expected, made, error, path, own)
        # where both see the same op at fault, the strict one names the reshape before it
        if lenient is None or found.op is None or lenient.op is None:
            return lenient
        return found if found.index >= lenient.index - 3 and found.path == lenient.path else lenient

    def _first_mismatch(
        self,
        strict: bool,
        expected: Sequence[fx.Node] | None,
        made: list[fx.Node],
        error: Exception | None,
        path: str,
        own: str | None,
    ) -> Mismatch | None:
        compact = self.significant(made, strict)
        dense = self.dense(strict, expected, most=None if error is None else len(compact) + 1)
        compact = without_unread(dense, compact)
        mates: dict[fx.Node, fx.Node] = {}
        before: fx.Node | None = None
        for want, got in zip(dense, compact, strict=False):
            found = self.differs(want, got, strict) or other_input(want, got, mates)
            mates[want] = got
            if found is not None and (own in (None, want.meta["path"]) or not isinstance(found[0], (int, float))):
                wanted, actual = found
                got = idle_slice(want, before, made) or got
                return Mismatch(self._place[want], str(want.meta["path"]), want, wanted, actual, got=got)
            before = got
        n = min(len(dense), len(compact))
        at = dense[n] if n < len(dense) else None
        if error is not None and n:  # which may be raised by a reshape that is not compared
            rest = (op for op in expected or self.ops if self._place[op] > self._place[dense[n - 1]])
            at = next((op for op in rest if self._is_compared(op, True)), at)
        index = len(self.ops) if at is None else self._place[at]
        if error is not None:
            skipped = None if at is None else idle_slice(at, before, made)
            return Mismatch(
                index,
                path if skipped is None else str(skipped.meta["path"]),
                at,
                None if at is None else self.shapes[at],
                "an exception",
                f"{type(error).__name__}: {error}",
                skipped,
            )
        if len(dense) != len(compact):
            where = str((at if at is not None else compact[n]).meta["path"])
            return Mismatch(index, where, at, f"{len(dense)} ops", f"{len(compact)} ops")
        return None

    def _unread_bias(self, graph: Graph) -> Mismatch | None:
        """A new bias in a module whose forward, its author's own, takes no notice of one."""
        read = {str(node.target) for node in graph.fx.find_nodes(op="get_attr")}
        paths = sorted(name.rpartition(".")[0] for name in self._new_biases - read)
        path = next((p for p in paths if not self.inside_replaced(p)), None)
        if path is None:
            return None
        return Mismatch(len(self.ops), path, self.ops_of(path)[0], "a bias", "a forward that reads none")

    def input_shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The compact shape of what an op reads first, if it is one tensor."""
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if source is None or not isinstance(source.meta["tensor"], TensorMeta):
            return None
        found = self.shapes.get(source)
        return self.alignment.expected_shape(source) if found is None else found[0]

    def differs(self, want: fx.Node, got: fx.Node, strict: bool = True) -> tuple[Any, Any] | None:
        """What was wanted and what came, where a compact op is not what the dense one says.

        Not ``strict``: axes of size 1 may stand anywhere, as ``einsum`` moves them.
        """
        if not same_target(want.target, got.target):
            return want.target, got.target
        if want not in self._read:
            return None
        for a, b in zip(want.all_input_nodes, got.all_input_nodes, strict=False):
            left, right = self._constant(a), self._constant(b)
            if left is not None and right is not None and not _equal(left, right):
                return left, right
        wanted, actual = self.shapes[want], shapes_of(got)
        if len(wanted) == len(actual):  # results that nothing reads do not matter
            actual = tuple(None if w is None else a for w, a in zip(wanted, actual, strict=True))
        if wanted != actual and (strict or without_ones(wanted) != without_ones(actual)):
            return wanted, actual
        found = self._repeated(want, got) or self._other_units(want, got)
        if found is not None:
            return found
        if want in self._starts and self._starts[want] != start_of(got, in_shape(got)):
            return f"the units from {self._starts[want]}", f"those from {start_of(got, in_shape(got))}"
        for (x, _), (y, _) in zip(self._numbers(want), self._numbers(got), strict=False):
            if abs(x - y) > 1e-6 * max(abs(x), abs(y)):  # kernels round numbers to the tensor's type
                return x, y
        if want.target is got.target and (strict or not self._moves_alike(want, got)):
            before, now = settings_of(want), settings_of(got)
            if before != now:
                return next((f"{k}={v}", f"{k}={now[k]}") for k, v in before.items() if now[k] != v)
        return None

    def _repeated(self, want: fx.Node, got: fx.Node) -> tuple[Any, Any] | None:
        """The shapes of an operand that is repeated along an axis where the dense one was as long as the others.

        The result of an op that broadcasts does not show it.
        """
        if torch.Tag.pointwise not in want.target.tags or len(want.all_input_nodes) != len(got.all_input_nodes):  # type: ignore[union-attr]
            return None
        out = shapes_of(got)[0] or ()
        for a, b in zip(want.all_input_nodes, got.all_input_nodes, strict=True):
            dense, shape = shapes_of(a)[0] or (), shapes_of(b)[0] or ()
            if len(dense) == len(shape) and any(
                m == 1 < min(n, k) for m, n, k in zip(shape, dense, out[len(out) - len(shape) :], strict=True)
            ):
                return dense, shape
        return None

    def _other_units(self, want: fx.Node, got: fx.Node) -> tuple[Any, Any] | None:
        """The units that an operand is cut to on entry, where they are not the planned ones.

        A patched expression may be evaluated several times, each time for an op with units of its own.
        """
        for position, _, _, units in self.alignment.cuts_at(want):
            node = Op(got).inputs[position]
            while "inserted" in node.meta and node.target is not aten.index_select.default:
                node = node.all_input_nodes[0]
            index = self._constant(node.all_input_nodes[-1]) if "inserted" in node.meta else None
            if index is not None and tuple(index.tolist()) != units:
                return f"units {units}", f"units {tuple(index.tolist())}"
        return None

    def _moves_alike(self, want: fx.Node, got: fx.Node) -> bool:
        """Whether two permutations bring the axes that are not of size 1 in the same order."""
        if want.target is not aten.permute.default:
            return False
        return order_of(want, self.input_shape(want) or ()) == order_of(got, in_shape(got) or ())

    def _expected_start(self, node: fx.Node) -> int | None:
        """Where a part starts: units before it may have left, which its size does not show."""
        (source,), shape = node.all_input_nodes, in_shape(node)
        start = start_of(node, shape)
        if node.target is aten.slice.Tensor and Op(node).arg("step", 1) != 1:
            return start  # within the first run, of which all units stay
        return start and self.alignment.expected_bound(source, Op(node).arg("dim") % len(shape or ()), start)

    def start(self, node: fx.Node) -> int | None:
        """Where a part should start."""
        return self._starts.get(node)

    def expected(self, node: fx.Node) -> tuple[tuple[int, ...] | None, ...]:
        """The compact shapes of a call's results, or of one value; ``None`` where nothing reads it."""
        if node.target is operator.getitem:
            several, index = node.args
            return (self.shapes[several][index],)  # type: ignore[index]
        return self.shapes[node] if node in self.shapes else (self.alignment.expected_shape(node),)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The compact shape of a value that is read."""
        (found,) = self.expected(node)
        assert found is not None
        return found

    def numbers(self, node: fx.Node) -> list[float]:
        """The numbers that a call gives its op to compute with, as the plan wants them."""
        return [number for number, given in self._numbers(node) if given]

    def _numbers(self, node: fx.Node) -> list[tuple[float, bool]]:
        """The numbers that an op computes with, defaults too, and whether the call gives them."""
        position, planned = self.alignment.numbers.get(node, (-1, 0.0))
        found: list[tuple[float, bool]] = []
        for i, name, default in number_arguments(node.target):
            given = i < len(node.args) or name in node.kwargs
            value = node.args[i] if i < len(node.args) else node.kwargs.get(name, default)
            if i == position:
                found.append((planned, True))
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                found.append((value, given))
            elif value is None and node.target is aten._fused_rms_norm.default:
                found.append((number_at(node, i), True))
        return found

    def maker(self, node: fx.Node, constant: Any) -> fx.Node | None:
        """The op by which a constant of ``forward`` that an op reads came to be."""
        for source in node.all_input_nodes:
            if isinstance(constant, Tensor) and self._constant(source) is constant:
                return made_by(source)
        return None

    def _constant(self, node: fx.Node) -> Tensor | None:
        """What stays of a constant of ``forward``, read through ops that do not change its values."""
        node = made_by(node)
        found = self._constants.get(node) if "lifted" in node.meta else None
        if found is None or found.is_meta:  # on the meta device shapes have to do
            return None
        return self.alignment.kept_part(node, found)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
