"""The unmasked model as the alignment stage sees it: which units could leave, and what would be left then."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from maskprop.align.align import Alignment, align, align_alike
from maskprop.align.couple import couple
from maskprop.align.plan import Plan
from maskprop.align.solve import Ints, Solution, multiples, never_empty, regularity
from maskprop.graph.graph import Graph, TensorMeta, is_op, shape_of
from maskprop.graph.trace import Inputs, Tracer, trace
from maskprop.infer.coupling import Coupling, owned_axes
from maskprop.infer.op import Op
from maskprop.infer.sweep import Inference
from maskprop.rewrite.dead import find_dead
from maskprop.rewrite.training import TrainingPass, idle_modules, training_pass


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs of a forward pass on the dummy input (a multiply-add is two)."""

    parameters: int
    flops: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.parameters - other.parameters, self.flops - other.flops)


class Structure:
    """Labels and relations of a model without masks, in which only structural pins hold.

    Args:
        model: left as it is.
        inputs: positional and keyword arguments of ``forward``.
        tracer: see :func:`maskprop.graph.trace.trace`.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, tracer: str | Tracer = "auto") -> None:
        self.model, self.inputs, self.tracer = model, inputs, tracer
        self.graph: Graph = trace(model, inputs, tracer)
        parameters = list(model.parameters())
        self._total = sum(p.numel() for p in parameters)
        self._parameters = {id(p) for p in parameters}
        self.inference = Inference(self.graph, {})
        self.inference.run()
        relations = couple(self.inference, "exact")
        pins = [pin for pin in relations.pins if not pin.live]
        self.coupling: Coupling = dataclasses.replace(relations, pins=pins, contractions=[])
        self.states = {str(n.target): n for n in self.graph.fx.nodes if n.op == "get_attr"}
        self.owned: list[tuple[str, int, Tensor]] = [
            (name, axis, labels)
            for name, node in self.states.items()
            for axis, labels in enumerate(self.coupling.labels_of(node))
            if labels is not None
        ]
        axes = owned_axes(self.coupling.labels_of(node) for node in self.states.values())
        self._axes = [*axes, *self.coupling.nonempty]
        self.base = Solution(self.coupling, [labels for *_, labels in self.owned], alike=True)
        self.units = self._units()
        self.leaks: set[tuple[str, int]] = set()  # axes of consumers, found when masks are made

    def _units(self) -> Ints:
        """Labels' groups that can leave by themselves: no row of a split axis, and no such row pinned."""
        row, outer, inner = self.base.triples.T if len(self.base.triples) else np.zeros((3, 0), dtype=np.int64)
        may = self.base.may.copy()
        while True:
            before = may.copy()
            np.logical_and.at(may, outer, may[row])
            np.logical_and.at(may, inner, may[row])
            if np.array_equal(before, may):
                break
        self.base.may = may
        is_row = np.zeros(len(may), dtype=bool)
        is_row[row] = True
        return np.flatnonzero(may & ~is_row)

    def remove(self, units: Ints) -> Solution:
        """What leaves if these units are masked: shapes that would not be regular keep more."""
        s = copy.copy(self.base)
        s.may = self.base.may.copy()
        s.may[self.units] = False
        s.may[units] = self.base.may[units]
        s.solve(
            {
                "regular": regularity(self.coupling.regulars),
                "not empty": never_empty(self._axes),
                "multiple": multiples(self.coupling.multiples),
            }
        )
        return s

    # -- accounting -----------------------------------------------------------------------------

    @cached_property
    def dense(self) -> Cost:
        """What the model costs as it is."""
        keep_all = copy.copy(self.base)
        keep_all.removed = np.zeros(len(self.base.may), dtype=bool)
        return self.cost(keep_all)

    def cost(self, s: Solution) -> Cost:
        """Parameters and FLOPs of the model that is left, by the formulas of ``torch.utils.flop_counter``."""
        return self._cost(Alignment(self.coupling, s, Plan(), self.states), ())

    def _cost(self, left: Alignment, gone: Collection[fx.Node]) -> Cost:
        shape = cache(left.expected_shape)
        total = self._total
        for name, node in self.states.items():
            if id(self.graph.state[name]) in self._parameters:
                total -= _numel(shape_of(node)) - (0 if node in gone else _numel(shape(node)))
        total += sum(bias.numel() for bias in left.plan.new_bias.values())
        total -= self._leaves_training(left, gone)
        return Cost(total, sum(_flops(node, shape) for node in self._counted if node not in gone))

    def _leaves_training(self, left: Alignment, gone: Collection[fx.Node]) -> int:
        """Parameters that leave modules which only training runs, where they can follow."""
        alike = None if self._training is None else align_alike(self._training.inference, left, gone)
        if self._training is None or alike is None:
            return 0
        plan = alike.plan.only(lambda name: name not in left.plan.keep)
        tensors = self._training.inference.graph.state
        own = [name for name in plan.keep if id(tensors[name]) in self._parameters]
        return sum(_numel(plan.shapes[name]) - _numel(plan.compact_shape(name)) for name in own)

    @cached_property
    def _training(self) -> TrainingPass | None:
        if self.graph.concrete or not any(idle_modules(self.model, self.graph)):
            return None
        return training_pass(self.model, self.inference, self.inputs)

    @cached_property
    def _counted(self) -> list[fx.Node]:
        return [n for n in self.graph.fx.nodes if is_op(n) and _formula(n) is not None]

    def saving(self, units: Ints) -> Cost:
        """What leaves with these units if everything else stays."""
        return self.dense - self.cost(self.remove(units))

    # -- under masks ----------------------------------------------------------------------------

    def outcome(self, masks: Mapping[str, Tensor]) -> tuple[Cost, Alignment]:
        """What a speedup with these masks would leave, which may be less than the masks ask for.

        Next to what is constant anyway (a table of positions, a class token) more falls silent than was masked.

        Args:
            masks: by parameter name.
        """
        inference = Inference(self.graph, masks)
        inference.run()
        find_dead(self.model, self.graph, inference, self.inputs)
        left = align(inference)
        return self._cost(left, inference.left), left


def graph_cost(model: nn.Module, graph: Graph) -> Cost:
    """What a traced model costs: the measure that :meth:`Structure.cost` forecasts."""
    shapes = {n: n.meta["tensor"].shape for n in graph.fx.nodes if isinstance(n.meta.get("tensor"), TensorMeta)}
    flops = 0
    for node in graph.fx.nodes:
        if is_op(node) and (formula := _formula(node)) is not None:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), shapes.get)
            flops += formula(*args, **kwargs, out_val=shapes.get(node))
    return Cost(sum(p.numel() for p in model.parameters()), int(flops))


def measure(model: nn.Module, inputs: Inputs, tracer: str | Tracer = "auto") -> Cost:
    """Parameters and FLOPs of a model, counted on fake tensors with fused kernels off."""
    return graph_cost(model, trace(model, inputs, tracer))


def consumed_axes(graph: Graph) -> set[tuple[str, int]]:
    """Axes of parameters that some op sums over."""
    from maskprop.infer.places import weight_place

    found = set()
    for node in graph.fx.nodes:
        if not is_op(node):
            continue
        op = Op(node)
        name = op.target._schema.name
        if name == "aten::convolution":
            place = weight_place(op.inputs[1])
            grouped = op.arg("groups") > 1
            if place is not None and not (grouped and op.shapes[1][1] == 1):
                found.add((place[0], 0 if op.arg("transposed") else 1))
        elif name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            for source, axis in ((op.inputs[-2], 1), (op.inputs[-1], 0)):
                place = weight_place(source)
                if place is not None:
                    found.add((place[0], (1 - axis if place[1] else axis) + (len(op.shape) - 2)))
    return found


def _formula(node: fx.Node) -> Callable[..., int] | None:
    target = node.target
    assert isinstance(target, OpOverload)
    found: Callable[..., int] | None = flop_registry.get(target.overloadpacket)
    return found


def _flops(node: fx.Node, shape: Callable[[fx.Node], tuple[int, ...]]) -> int:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), shape)
    formula = _formula(node)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=shape(node)))


def _numel(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
