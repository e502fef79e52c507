"""Follow the compact model through the dense graph, op by op, as long as it does what the plan expects.

Most compact models do so to their end. Then there is nothing to explain, and no graph of them is needed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from maskprop.graph.graph import Graph
from maskprop.graph.record import Recorder
from maskprop.graph.trace import Inputs, quiet, record

# Whether a call is what the plan expects in the place of a dense one: the dense call; target, arguments, keyword
# arguments (with dense nodes in place of tensors) and metadata of the compact one.
Agrees = Callable[[fx.Node, Any, tuple[Any, ...], dict[str, Any], Any], bool]


def follows(model: nn.Module, inputs: Inputs, graph: Graph, agrees: Agrees, constant: Callable[..., bool]) -> bool:
    """Whether a compact model makes exactly the calls of the dense one's graph.

    Args:
        model: compact.
        inputs: the dummy input.
        graph: of the dense model, traced on fake tensors.
        agrees: compares a call.
        constant: whether a tensor that ``forward`` makes of numbers is what the plan expects of a dense one's node.

    Returns:
        ``False`` as soon as anything is not quite the same; it may still be as good.
    """
    follower = _Follower(model, graph, agrees)
    try:
        with quiet():
            record(follower, model, inputs)
    except Exception:  # of the author's forward, too: a whole replay tells what is wrong
        return False
    return all(constant(node, tensor) for node, tensor in follower.constants)


class _Diverged(Exception):
    """The compact model does something else."""


class _Follower(Recorder):
    """Binds the compact model's tensors to the nodes of the dense graph."""

    def __init__(self, model: nn.Module, graph: Graph, agrees: Agrees) -> None:
        super().__init__(model, concrete=False)
        nodes = graph.nodes
        self.graph.training = graph.training
        self.constants: list[tuple[fx.Node, Tensor]] = []
        self._agrees = agrees
        self._diverged = False
        self._ops = iter(graph.ops)
        self._inputs = iter([n for n in nodes if n.op == "placeholder"])
        self._lifted = iter([n for n in nodes if "lifted" in n.meta])
        self._states = {str(n.target): n for n in nodes if n.op == "get_attr"}
        self._parts = {n.args: n for n in nodes if n.target is operator.getitem}
        self._outputs = nodes[-1].args[0]

    def add_input(self, tensor: Tensor, name: str) -> None:
        self._bind(tensor, next(self._inputs))

    def finish(self, outputs: list[tuple[str, Tensor]]) -> Graph:
        same = tuple(self._node(t) for _, t in outputs) == self._outputs
        if self._diverged or not same or next(self._ops, None) is not None:
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
        want = next(self._ops, None)
        if want is None or not self._agrees(want, target, args, kwargs, meta):
            raise self._divergence()
        return want

    def _note_read(self, node: fx.Node) -> None:
        raise self._divergence()
