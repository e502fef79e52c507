"""The two sweeps: what is known, forward; what is needed, backward.

The forward rules do not read neededness, so one round of closed-form rules is the fixed point.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from maskprop.errors import UnsupportedOpError
from maskprop.graph.graph import Graph, TensorMeta, shape_of
from maskprop.infer.facts import Fact, all_over, any_over, as_double, everywhere, squash
from maskprop.infer.op import Op
from maskprop.infer.rules import Rule, find_rule
from maskprop.infer.rules.probe import Claims, Probe
from maskprop.infer.standin import StandIn

UNKNOWN = Rule()


@dataclass
class Facts:
    """Facts of every node.

    Attributes:
        known: a :class:`Fact` a node, or a tuple of them for an op of several results.
        needed: bool tensors, broadcastable over the value; a list for an op of several results. A node that
            is missing is not needed at all.
        rules: how often each kind of rule ran.
        unruled: ops without a rule of which nothing was asked.
        probes: what the numeric probe found of the others.
    """

    known: dict[fx.Node, Any] = field(default_factory=dict)
    needed: dict[fx.Node, Any] = field(default_factory=dict)
    rules: dict[str, int] = field(default_factory=dict)
    unruled: list[Op] = field(default_factory=list)
    probes: list[Claims] = field(default_factory=list)
    sweeps: int = 0


class Inference:
    """Runs the sweeps over a graph.

    Args:
        graph: the recorded forward pass.
        masks: bool masks by the names of the graph's tensors, each broadcastable to its tensor.
        mode: ``"auto"`` probes an op without a rule, ``"rules"`` refuses it, ``"gradient"`` probes every op.
        confidence: on how many random inputs.
        generator: where those come from.

    Attributes:
        left: nodes of layers that leave as a whole: what stands in for a result, ``None`` for what is gone.
        unlike: elements of values that count as unknown, whatever the rules say.
    """

    def __init__(
        self,
        graph: Graph,
        masks: Mapping[str, Tensor],
        mode: str = "auto",
        confidence: int = 8,
        generator: torch.Generator | None = None,
    ) -> None:
        self.graph = graph
        self.masks = masks
        self.mode = mode
        self.confidence = confidence
        self.generator = generator or torch.Generator().manual_seed(0)
        self.facts = Facts()
        self.left: dict[fx.Node, StandIn | None] = {}
        self.unlike: Mapping[fx.Node, Tensor] = {}
        self.sized: Collection[fx.Node] = ()
        self._fleeting: dict[fx.Node, Tensor] = {}
        self.ops: dict[fx.Node, Op] = {}
        self._rules: dict[fx.Node, Rule] = {}

    def run(self) -> Facts:
        """Both sweeps."""
        self.forward()
        self.backward()
        return self.facts

    def forward(self) -> None:
        """Derive what is known, from inputs to outputs.

        Tensors that a call of the model leaves changed are known where they stay the same: the next call reads those.
        """
        for node in self.graph.fx.nodes:
            self.update_direct(node)
        self.facts.sweeps += 1
        changed = dict(self._changed())
        for node, where in changed.items():
            self._fleeting[node] = self._fleeting[node] | where if node in self._fleeting else where
        if changed:
            self.forward()

    def _changed(self) -> Iterator[tuple[fx.Node, Tensor]]:
        """What is taken for known of the model's tensors and is not the same after the call."""
        for node, last in self.renewed():
            fact = self.facts.known[node]
            changed = fact.known
            if last is not None:
                after = self.facts.known[last]
                changed = fact.known & ~((fact.zero & after.zero) | (after.known & (fact.value() == after.value())))
            if bool(changed.any()):
                yield node, changed

    def backward(self) -> None:
        """Derive what is needed, from outputs to inputs."""
        self.facts.needed.clear()
        self._send_back()
        while self._need_next():
            self._send_back()

    def _send_back(self) -> None:
        for node in reversed(self.graph.fx.nodes):
            if self.graph.may_be_read(node) and isinstance(node.meta["tensor"], TensorMeta):
                self._need(node, _all(node))
            self.update_indirect(node)

    def _need_next(self) -> bool:
        """Whether the next call needs more of what this one leaves in the model's tensors than was taken for needed."""
        needed, more = self.facts.needed, False
        for node, last in self.renewed():
            if node in needed and last is not None:
                more |= last not in needed or bool((needed[node] & ~needed[last]).any())
                self._need(last, needed[node])
        return more

    def renewed(self) -> Iterator[tuple[fx.Node, fx.Node | None]]:
        """The model's tensors that a call leaves changed, and what the next call reads there, if that is seen."""
        for node in self.graph.fx.nodes if self.graph.renewed else ():
            if node.op == "get_attr" and node.target in self.graph.renewed:
                last = self.graph.renewed[str(node.target)]
                yield node, last if last is not None and shape_of(last) == shape_of(node) else None

    def forget(self, unlike: Mapping[fx.Node, Tensor], sized: Collection[fx.Node] = ()) -> None:
        """Run both sweeps again without what is known of some elements of values.

        Args:
            unlike: which elements.
            sized: calls that take as much of an axis as the sizes of the inputs say: all of it may be needed, and
                what they give is known where it is the same all along.
        """
        self.unlike, self.sized = unlike, sized
        self.left.clear()
        self.run()

    def op(self, node: fx.Node) -> Op:
        """The call as the rules see it."""
        if node not in self.ops:
            self.ops[node] = Op(node)
        return self.ops[node]

    def rule(self, node: fx.Node) -> Rule:
        """The rule of a call.

        Raises:
            UnsupportedOpError: there is none and the mode is ``"rules"``.
        """
        if node not in self._rules:
            found = self._rules[node] = self._choose(node)
            kind = "opaque" if found is UNKNOWN else type(found).__name__
            self.facts.rules[kind] = self.facts.rules.get(kind, 0) + 1
        return self._rules[node]

    def _choose(self, node: fx.Node) -> Rule:
        op = self.op(node)
        found = find_rule(op.target) if self.mode != "gradient" else None
        if found is not None:
            return found
        if self.mode == "rules" and not all(self.facts.known[n].total for n in op.inputs):
            raise UnsupportedOpError(
                f"{node.target} in '{node.meta['path']}' has no rule and inference='rules' allows no other way. "
                "Register one with maskprop.register_rule, or use inference='auto'."
            )
        # torch's own kernels may abort the process on arguments that no caller gives: only users' ops are probed
        of_torch = op.target.namespace in ("aten", "prims", "prim") and self.mode != "gradient"
        if self.mode == "rules" or not op.inputs or of_torch:
            self.facts.unruled.append(op)
            return UNKNOWN
        probe = Probe(op, self.confidence, self.generator)
        self.facts.probes.append(probe.claims)
        return probe

    def update_direct(self, node: fx.Node) -> None:
        """Derive what is known of one node's value."""
        known = self.facts.known
        if node.op == "placeholder":
            known[node] = Fact.unknown(len(shape_of(node)))
        elif node.op == "get_attr":
            known[node] = self._state_fact(str(node.target))
        elif node.target is operator.getitem:
            known[node] = known[node.args[0]][node.args[1]]  # type: ignore[index]
        elif node.op == "call_function":
            op = self.op(node)
            facts = [known[n] for n in op.inputs]
            found = known[node] = self.rule(node).known(op, facts)
            if node in self.sized and isinstance(found, Fact) and not found.plain:
                known[node] = found.without(~self._same_all_along(op, facts))
        for less in (self.unlike, self._fleeting):
            if node in less:
                known[node] = known[node].without(less[node])

    def _same_all_along(self, op: Op, facts: Sequence[Fact]) -> Tensor:
        """What a call that takes a part of an axis gives whichever part it is."""
        axis, value = op.arg("dim", 0) % facts[0].known.ndim, facts[0].value()
        same = value.amax(axis, keepdim=True) == value.amin(axis, keepdim=True)
        taken = self.rule(op.node).known(op, [Fact.zeros(all_over(facts[0].known, [axis]) & same), *facts[1:]])
        assert isinstance(taken, Fact)
        return taken.zero

    def update_indirect(self, node: fx.Node) -> None:
        """Send one node's neededness to its inputs."""
        needed = self.facts.needed
        if node.op == "output":
            for source in node.all_input_nodes:
                self._need(source, _all(source))
            return
        if node not in needed or node.op != "call_function" or node in self.left:
            return
        if node.target is operator.getitem:
            several, index = node.args
            assert isinstance(several, fx.Node)
            parts = needed.setdefault(several, [_none(m) for m in self.op(several).results])
            parts[index] = parts[index] | needed[node]
            return
        op = self.op(node)
        parts = needed[node] if op.several else [needed[node]]
        asked, some = None, False  # a norm's vectors are all needed alike
        asks = self.rule(node).needed(op, [self.facts.known[n] for n in op.inputs], parts)
        if node in self.sized:
            asks = [any_over(asks[0], [op.arg("dim", 0) % asks[0].ndim]), *asks[1:]]
        for source, part in zip(op.inputs, asks, strict=True):
            if part is not asked:
                asked, some = part, bool(part.any())
            if some:
                self._need(source, part)

    def _need(self, node: fx.Node, part: Tensor) -> None:
        before = self.facts.needed.get(node)
        self.facts.needed[node] = part if before is None else before | part

    def _state_fact(self, name: str) -> Fact:
        graph, tensor = self.graph, self.graph.state[name]
        mask = self.masks.get(name)
        number = name.startswith("_constant") and tensor.numel() == 1 and type(tensor) is Tensor and not tensor.is_meta
        if mask is None and (number or name.startswith("_activation_mask")):
            return Fact.of_value(as_double(tensor).cpu())
        again = tensor.is_meta  # what is read from elsewhere may be too much to hold
        if mask is None:
            return Fact.constant(tensor.ndim, lambda: graph.value(name).cpu(), again)
        keep = mask.cpu().reshape((1,) * (tensor.ndim - mask.ndim) + mask.shape)
        true = everywhere(True, tensor.ndim)
        return Fact(true, squash(~keep.bool()), lambda: as_double(graph.value(name)).cpu() * keep, again=again)


def _all(node: fx.Node) -> Tensor:
    return everywhere(True, len(shape_of(node)))


def _none(meta: Any) -> Tensor:
    return everywhere(False, 0 if meta is None else len(meta.shape))
