"""Compare the compact model with the masked one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from maskprop.align.align import Alignment
from maskprop.errors import NonFiniteError
from maskprop.graph.graph import Graph, is_op
from maskprop.graph.randomness import generators_kept
from maskprop.graph.structure import map_each_once, tensors_in
from maskprop.graph.trace import Inputs, frozen_state, masked_tensors, not_compiled, trace
from maskprop.infer.facts import everywhere
from maskprop.rewrite.draws import StillDraws
from maskprop.rewrite.reference import Values, masked_values, outputs_of, run_graph
from maskprop.rewrite.replay import Replay

_Outputs = TypeVar("_Outputs")
log = logging.getLogger(__name__)

# Relative L2 error that rounding alone explains, by the coarsest dtype on the way to an output.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Check:
    """One comparison: the worst output, its relative error and the tolerance."""

    output: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether rounding explains the error."""
        return self.error <= self.tolerance


def fresh_inputs(inputs: Inputs, generator: torch.Generator, tame: bool = False) -> Inputs:
    """Other inputs of the same shapes: normal for floats of the same scale, integers within the range that came.

    ``tame``: for models that do not take every input: the floats that came in another order, the same integers.
    """

    def fresh(t: Tensor) -> Tensor:
        if t.dtype == torch.bool or t.numel() == 0:
            return t
        if tame:
            order = torch.randperm(t.numel(), generator=generator).to(t.device)
            return t.reshape(-1)[order].reshape(t.shape) if t.is_floating_point() else t
        if t.is_floating_point() or t.is_complex():
            made = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
            scale = t.double().std() if t.numel() > 1 else t.double().abs().mean()
            return (made * (scale if scale > 0 else 1.0) + t.double().mean()).to(t.dtype)
        low, high = int(t.min()), int(t.max())
        return torch.randint(low, high + 1, t.shape, generator=generator).to(t)

    found: Inputs = map_each_once(inputs, fresh)  # the graph reads a tensor that is given twice in one place
    return found


def another_batch(inputs: Inputs, dim: int) -> Inputs:
    """The inputs with one more along the batch axis, wherever that is as long as in the first of them."""
    sizes = [t.shape[dim] for _, t in tensors_in(inputs) if t.ndim > dim]

    def longer(t: Tensor) -> Tensor:
        return torch.cat([t, t.narrow(dim, 0, 1)], dim) if t.ndim > dim and t.shape[dim] == sizes[0] else t

    found: Inputs = map_each_once(inputs, longer)
    return found


def run_model(model: nn.Module, inputs: Inputs) -> list[tuple[str, Tensor]]:
    """Outputs in evaluation mode, the model left as it was."""
    with frozen_state(model), torch.no_grad(), not_compiled():
        args, kwargs = inputs
        return [(path, t.detach()) for path, t in tensors_in(model(*args, **kwargs))]


def run_read(model: nn.Module, read: Values, inputs: Inputs) -> list[tuple[str, Tensor]]:
    """Outputs, in evaluation mode, of a model on the meta device whose tensors are read as their ops come."""
    graph = trace(model, inputs, "meta")
    graph.read = read
    outputs = outputs_of(graph, graph.value, [t for _, t in tensors_in(inputs)])
    return list(zip(graph.output_paths, outputs, strict=True))


def masked_runner(
    graph: Graph, masks: Mapping[str, Tensor], model: nn.Module | None = None
) -> Callable[[Inputs], list[Tensor]]:
    """Gives the masked model's outputs: by its graph, which is pure; or by ``model``, its tensors masked meanwhile."""
    if model is None:
        values = masked_values(graph, masks)
        return lambda batch: outputs_of(graph, values, [t for _, t in tensors_in(batch)])

    def run(batch: Inputs) -> list[Tensor]:
        with masked_tensors(model, masks):
            return [tensor for _, tensor in run_model(model, batch)]

    return run


class Reference:
    """Outputs of the masked model, computed before anything changes.

    Args:
        graph: of the dense model.
        run: gives the masked model's outputs for a batch.
        batches: inputs to compare on.
        still: whether all that is drawn is the same number (see :class:`~maskprop.rewrite.draws.StillDraws`).
    """

    def __init__(
        self, graph: Graph, run: Callable[[Inputs], list[Tensor]], batches: Sequence[Inputs], still: bool = False
    ) -> None:
        self._run = run
        self._still = still
        self.batches: list[Inputs] = []
        self.outputs: list[list[Tensor]] = []
        self.paths = graph.output_paths
        self.coarsest = _coarsest(graph)
        for batch in batches:
            self.add(batch)

    def add(self, batch: Inputs) -> None:
        """Compare on these inputs, too.

        Raises:
            NonFiniteError: an output of the masked model is nan, so that nothing can be compared.
            Exception: whatever the model raises for them.
        """
        outputs = self._drawing_alike(self._run, batch)
        for path, output in zip(self.paths, outputs, strict=True):
            if output.is_floating_point() and bool(output.isnan().any()):
                raise NonFiniteError(
                    f"output '{path}' of the masked model holds nan on the dummy input, so the result cannot be "
                    "checked. The model is unchanged. Give a dummy input that the model can handle, or pass "
                    "verify=False."
                )
        self.batches.append(batch)
        self.outputs.append(outputs)

    def compare(self, run: Callable[[Inputs], list[tuple[str, Tensor]]]) -> Check:
        """Run the compact model on every batch.

        Raises:
            Exception: whatever ``run`` raises.
        """
        worst = Check("", 0.0, TOLERANCE[torch.float32])
        for batch, wanted in zip(self.batches, self.outputs, strict=True):
            got = self._drawing_alike(run, batch)
            if len(got) != len(wanted):
                return Check("the number of outputs", float("inf"), 0.0)
            for path, (_, actual), expected in zip(self.paths, got, wanted, strict=True):
                check = _check(path, actual, expected, self.coarsest)
                if check.error - check.tolerance > worst.error - worst.tolerance or not worst.output:
                    worst = check
        return worst

    def _drawing_alike(self, run: Callable[[Inputs], _Outputs], batch: Inputs) -> _Outputs:
        """Run a model that may draw random numbers, which are the same whenever it does."""
        with generators_kept(seed=0), StillDraws() if self._still else nullcontext():
            return run(batch)

    def constant_outputs(self) -> list[str]:
        """Outputs that do not vary: no comparison on them proves anything."""
        found = []
        for i, path in enumerate(self.paths):
            values = [o[i] for o in self.outputs]
            if values[0].is_floating_point() and all(
                v.numel() > 1 and bool((v == v.flatten()[0]).all()) for v in values
            ):
                found.append(path or "the output")
        return found


def computes_as(graph: Graph, model: nn.Module, masks: Mapping[str, Tensor], inputs: Inputs) -> bool:
    """Whether a graph gives what the model does: where code asks whether it is traced, it may go another way then."""
    reference = Reference(graph, masked_runner(graph, masks), [inputs])
    with masked_tensors(model, masks):
        return reference.compare(partial(run_model, model)).passed


def first_difference(graph: Graph, values: Values, alignment: Alignment, compact: Graph, inputs: Inputs) -> str:
    """Where the compact model first departs from the masked one, in words; empty if that cannot be told.

    Args:
        graph: of the dense model.
        values: its tensors with the masks applied.
        alignment: what left.
        compact: the graph of the compact model.
        inputs: what both are run on.
    """
    replay = Replay(graph, alignment)
    tensors = [t for _, t in tensors_in(inputs)]
    wanted = set(replay.dense(strict=True))
    actual = set(replay.significant([n for n in compact.fx.nodes if is_op(n)]))
    dense_values = ((n, v) for n, v in run_graph(graph, values, tensors) if n in wanted)
    compact_values = ((n, v) for n, v in run_graph(compact, compact.value, tensors) if n in actual)
    for (node, expected), (other, got) in zip(dense_values, compact_values, strict=False):
        labels: Any = alignment.coupling.labels_of(node)
        if isinstance(expected, tuple) and isinstance(got, tuple):
            expected, got, labels = expected[0], got[0], labels[0]
        if not isinstance(expected, Tensor) or not isinstance(got, Tensor) or node.target is not other.target:
            continue
        kept = everywhere(True, expected.ndim)
        for array in labels or ():
            if array is not None:
                kept = kept & ~torch.from_numpy(alignment.solution.leaves(array))
        part = expected[kept.expand(expected.shape)]
        if part.numel() != got.numel() or not _check("", got.reshape(-1), part).passed:
            return f", first at {node.target} in '{node.meta['path']}'"
    return ""


def compare_outputs(actual: Sequence[tuple[str, Tensor]], expected: Sequence[tuple[str, Tensor]]) -> list[Check]:
    """Compare what :func:`run_model` gave for two models, output by output."""
    if len(actual) != len(expected):
        return [Check("the number of outputs", float("inf"), 0.0)]
    return [_check(path or "output", a, e) for (_, a), (path, e) in zip(actual, expected, strict=True)]


def _coarsest(graph: Graph) -> float:
    """The tolerance of the coarsest dtype that anything on the way from the inputs is rounded to."""
    depends: set[fx.Node] = set()
    found = 0.0
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            depends.add(node)
        elif node.op == "call_function" and not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            metas = node.meta["tensor"]
            for meta in metas if isinstance(metas, tuple) else (metas,):
                found = max(found, 0.0 if meta is None else TOLERANCE.get(meta.dtype, 0.0))
    return found


def _check(path: str, actual: Tensor, expected: Tensor, coarsest: float = 0.0) -> Check:
    """Compare two tensors; ``coarsest`` is the tolerance for what they were computed from, if that was rounded more."""
    path = path or "output"
    tolerance = TOLERANCE.get(expected.dtype, 0.0)
    tolerance = max(tolerance, coarsest) if tolerance else 0.0
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return Check(path, float("inf"), tolerance)
    if not expected.is_floating_point():
        if expected.is_complex():
            return _check(path, torch.view_as_real(actual), torch.view_as_real(expected), coarsest)
        return Check(path, float((actual != expected).double().mean()) if expected.numel() else 0.0, tolerance)
    a, b = actual.double(), expected.double()
    same = a.isfinite() & b.isfinite()
    if not torch.equal(
        torch.where(same, 0.0, torch.nan_to_num(a)), torch.where(same, 0.0, torch.nan_to_num(b))
    ) or not torch.equal(a.isnan(), b.isnan()):
        return Check(path, float("inf"), tolerance)
    a, b = torch.where(same, a, 0.0), torch.where(same, b, 0.0)
    norm = float(b.norm())
    return Check(path, float((a - b).norm()) / norm if norm > 0 else float((a - b).norm()), tolerance)
