"""Follow the compact model through the dense graph, op by op, as long as it does what the plan expects.

Most compact models do so to their end. Then there is nothing to explain, and no graph of them is needed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from maskprop.graph.graph import Graph, ModuleCall
from maskprop.graph.record import Recorder
from maskprop.graph.shapes import new_fake
from maskprop.graph.structure import map_tensors, tensors_in
from maskprop.graph.trace import Inputs, quiet, record
from maskprop.modules import own_tensors
from maskprop.rewrite.alike import Call, are_alike, is_untouched

if TYPE_CHECKING:
    from maskprop.rewrite.replay import Replay

# Layers whose result follows from the sizes of what they are given and of their own tensors.
_PLAIN = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Linear),
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU),
}

# Calls in which fewer ops are followed one by one are followed sooner than compared.
_MANY = 8


def follows(model: nn.Module, inputs: Inputs, graph: Graph, replay: Replay) -> bool:
    """Whether a compact model makes exactly the calls of the dense one's graph.

    Args:
        model: compact.
        inputs: the dummy input.
        graph: of the dense model, traced on fake tensors.
        replay: says what the plan expects of each call.

    Returns:
        ``False`` as soon as anything is not quite the same; it may still be as good.
    """
    follower = _Follower(model, graph, replay)
    try:
        with quiet():
            record(follower, model, inputs)
    except Exception:  # of the author's forward, too: a whole replay tells what is wrong
        return False
    return all(replay.agrees_constant(node, tensor) for node, tensor in follower.constants)


class _Diverged(Exception):
    """The compact model does something else."""


class _Follower(Recorder):
    """Binds the compact model's tensors to the nodes of the dense graph."""

    looks_back = False

    def __init__(self, model: nn.Module, graph: Graph, replay: Replay) -> None:
        super().__init__(model, concrete=False)
        nodes = graph.nodes
        self.graph.training = graph.training
        self.constants: list[tuple[fx.Node, Tensor]] = []
        self._replay = replay
        self._diverged = False
        self._ops, self._done, self._one_by_one = graph.ops, 0, 0
        self._inputs = iter([n for n in nodes if n.op == "placeholder"])
        self._lifted = iter([n for n in nodes if "lifted" in n.meta])
        self._states = {str(n.target): n for n in nodes if n.op == "get_attr"}
        self._parts = {n.args: n for n in nodes if n.target is operator.getitem}
        self._outputs = nodes[-1].args[0]
        self._dense = {call.number: call for call in graph.history}
        self._first = {call.path: call.number for call in reversed(graph.history)}
        self._followed: dict[type, list[Call]] = {}

    def add_input(self, tensor: Tensor, name: str) -> None:
        self._bind(tensor, next(self._inputs))

    def finish(self, outputs: list[tuple[str, Tensor]]) -> Graph:
        same = tuple(self._node(t) for _, t in outputs) == self._outputs
        if self._diverged or not same or self._done < len(self._ops):
            raise self._divergence()
        return self.graph

    def _divergence(self) -> _Diverged:
        self._diverged = True  # an author's forward may catch the exception
        return _Diverged()

    def _lift(self, constant: Tensor) -> fx.Node:
        node = next(self._lifted, None)
        if node is None:
            raise self._divergence()
        self.constants.append((node, constant))
        return node

    def _emit_tagged(self, target: Any, args: Any, kwargs: Any, meta: Any, place: Any = None) -> fx.Node:
        if target is operator.getitem:
            # a part that the dense model never reads has no node there
            return self._parts.get(args) or super()._emit_tagged(target, args, kwargs, meta, place)
        want = self._ops[self._done] if self._done < len(self._ops) else None
        if want is None or not self._replay.agrees(want, target, args, kwargs, meta):
            raise self._divergence()
        self._done += 1
        self._one_by_one += 1
        return want

    def _note_read(self, node: fx.Node) -> None:
        raise self._divergence()

    def _nodes_of(self, value: Any) -> Any:
        return None  # nobody asks what the compact model's modules are given

    # -- calls whose result is known ---------------------------------------------------------------

    def _run(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        known = None
        if type(module) in _PLAIN and len(args) == 1 and isinstance(args[0], FakeTensor) and is_untouched(module):
            known = self._skip_call(args[0])
        if known is None:
            return self._run_block(module, args, kwargs)
        if not _fits(module, args[0].shape, self._replay.shape(known)):
            raise self._divergence()
        if getattr(module, "inplace", False):
            self._values[id(args[0])].write(known, self._emit)
            return args[0]
        return self._made(known, args[0])

    def _run_block(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a module, unless an earlier call shows what it would do."""
        path, number = self._stack[-1]
        dense = self._dense.get(number)
        if dense is None or self._first.get(path) != number:
            return super()._run(module, args, kwargs)
        call = Call(module, path, super()._nodes_of((args, kwargs)), self._ops_of(dense))
        followed = self._followed.setdefault(type(module), [])
        if self._is_known(call, dense.result, followed):
            given = {self._node_of_call(t): t for _, t in tensors_in((args, kwargs))}
            self._done += len(call.ops)
            self._calls = dense.last
            like = next(t for t in given.values() if isinstance(t, FakeTensor))
            return map_tensors(
                dense.result, lambda node: given[node] if node in given else self._made(node, like), fx.Node
            )
        one_by_one = self._one_by_one
        result = super()._run(module, args, kwargs)
        if self._one_by_one - one_by_one >= _MANY:
            followed.append(call)
        return result

    def _is_known(self, call: Call, result: Any, followed: Sequence[Call]) -> bool:
        """Whether a call is like one that was followed, and results in tensors that can be made here."""
        ops = call.ops
        likely = [one for one in followed if len(one.ops) == len(ops) and self._sizes(one.ops) == self._sizes(ops)]
        if not likely:
            return False
        given = {node for _, node in tensors_in(call.given, kind=fx.Node) if node.op != "get_attr"}
        if not given or not _is_made(result, {*given, *ops}):
            return False
        with _disable_current_modes():  # what is computed here is none of the model's ops
            return any(are_alike(one, call, self._replay) for one in likely)

    def _sizes(self, ops: Sequence[fx.Node]) -> Any:
        """What two calls that are alike have in common, to begin with."""
        return self._replay.shapes[ops[0]], self._replay.shapes[ops[-1]]

    def _ops_of(self, call: ModuleCall) -> list[fx.Node]:
        """The ops of a call of the dense model's, if they come next."""
        return list(itertools.takewhile(call.__contains__, itertools.islice(self._ops, self._done, None)))

    def _made(self, known: fx.Node, like: FakeTensor) -> Tensor:
        """The compact model's tensor for what the dense one's call resulted in."""
        meta = known.meta["tensor"]
        made = new_fake(like.fake_mode, self._replay.shape(known), meta.dtype, meta.device, meta.order)
        self._bind(made, known)
        return made

    def _call_at_hand(self) -> list[fx.Node]:
        """The ops of the dense model's call of the running module, if it comes next."""
        done = self._done
        if done == len(self._ops) or self._ops[done].meta["path"] != self._stack[-1][0]:
            return []
        number = self._ops[done].meta["call"]
        while done < len(self._ops) and self._ops[done].meta["call"] == number:
            done += 1
        return self._ops[self._done : done]

    def _skip_call(self, given: Tensor) -> fx.Node | None:
        """What the running call results in, if it is given the same as in the dense model; its ops count as done."""
        own = self._call_at_hand()
        if not own or own[0].meta["module"] is not self._types[-1]:
            return None
        if any(op in self._replay.alignment.numbers for op in own):
            return None
        number = own[0].meta["call"]
        read = {n for op in own for n in op.all_input_nodes if n.op != "get_attr" and n.meta["call"] != number}
        result = self._dense[number].result
        if not isinstance(result, fx.Node) or read != {self._node(given)}:
            return None
        self._done += len(own)
        return result


def _is_made(result: Any, made: Collection[fx.Node]) -> bool:
    """Whether a call's result holds these values and no more, but for tuples and lists."""
    if isinstance(result, fx.Node):
        return result in made
    return result is None or (type(result) in (tuple, list) and all(_is_made(part, made) for part in result))


def _fits(module: nn.Module, given: Sequence[int], made: Sequence[int]) -> bool:
    """Whether a layer's own tensors are as large as what it is given, and what the plan says that it makes, ask for."""
    tensors = list(own_tensors(module).values())
    if not tensors:
        return tuple(given) == tuple(made)
    if isinstance(module, nn.Linear):
        wide, (weight, *rest) = (made[-1],), tensors
        fits = tuple(weight.shape) == (made[-1], given[-1])
    elif isinstance(module, nn.modules.conv._ConvNd):
        channels = len(made) - len(module.kernel_size) - 1
        wide, (weight, *rest) = (made[channels],), tensors
        rows, columns = (given, made) if module.transposed else (made, given)
        fits = (weight.shape[0], weight.shape[1] * module.groups) == (rows[channels], columns[channels])
    else:
        wide, rest, fits = (given[1],), [t for t in tensors if t.ndim], tuple(given) == tuple(made)
    return fits and all(tuple(t.shape) == wide for t in rest)
