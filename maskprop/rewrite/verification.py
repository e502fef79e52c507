"""Verify a rewritten model: on the dummy input, on random inputs, and at another batch size where that may matter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from maskprop.align.align import Alignment
from maskprop.align.plan import Plan
from maskprop.errors import DummyInputError, MaskpropError, VerifyError
from maskprop.graph.graph import Graph
from maskprop.graph.trace import Inputs, describe_inputs, trace_partial
from maskprop.rewrite.apply import compact_tensor
from maskprop.rewrite.draws import draws
from maskprop.rewrite.edits import Edits, tensor_of
from maskprop.rewrite.reference import Values, masked_values
from maskprop.rewrite.verify import (
    Check,
    Reference,
    another_batch,
    first_difference,
    fresh_inputs,
    masked_runner,
    run_model,
    run_read,
)

log = logging.getLogger(__name__)


@dataclass
class Verification:
    """What one speedup is held against: made while the model is still dense, asked after it was rewritten.

    Attributes:
        model: is rewritten in place.
        graph: of the dense model.
        masks: bool masks by the names of the graph's tensors.
        inputs: the dummy input.
        trace: records the dense model on other inputs; ``None`` where the graph alone has all masks (activations').
        batch_dim: see :class:`maskprop.ModelSpeedup`.
        exact: whether a difference is a problem.
        read: gives the values of a model on the meta device.
        generator: of random inputs.
        check: the last comparison.
    """

    model: nn.Module
    graph: Graph
    masks: Mapping[str, Tensor]
    inputs: Inputs
    trace: Callable[[Inputs], Graph] | None
    batch_dim: int
    exact: bool
    read: Values | None
    generator: torch.Generator
    check: Check | None = None
    reference: Reference = field(init=False)

    def __post_init__(self) -> None:
        """Run the masked model.

        Raises:
            DummyInputError: it does not run on the dummy input.
            NonFiniteError: its outputs hold nan.
        """
        try:
            self.reference = Reference(self.graph, self._masked(self.graph), [self.inputs])
        except MaskpropError:
            raise
        except Exception as error:
            raise DummyInputError(
                f"the masked model does not run on the dummy input ({describe_inputs(self.inputs)}): "
                f"{type(error).__name__}: {error}. Check dtypes and devices with `model(*args, **kwargs)`."
            ) from error
        for tame in (False, True):
            try:
                self.reference.add(fresh_inputs(self.inputs, self.generator, tame))
                break
            except Exception as error:  # whatever a model raises for inputs that it is not made for
                log.info("the model does not take random inputs: %s: %s", type(error).__name__, error)

    def problem(self, edits: Edits, alignment: Alignment, generated: bool) -> VerifyError | None:
        """What is wrong with the rewritten model, if anything.

        Args:
            edits: what was done to the model.
            alignment: what left.
            generated: whether forwards were, so that another batch size has to show that they hold there.
        """
        problem = self._compare(self.reference, edits, alignment)
        if problem is None and generated:
            another = self._at_another_batch(edits)
            problem = None if another is None else self._compare(another, edits, alignment)
        return problem

    def _at_another_batch(self, edits: Edits) -> Reference | None:
        """The masked model at another batch size, if it takes one."""
        if self.read is not None or self.trace is None:
            return None
        inputs = another_batch(self.inputs, self.batch_dim)
        with edits.suspended():
            try:
                graph = self.trace(inputs)
                batch = fresh_inputs(inputs, self.generator)
                return Reference(graph, self._masked(graph), [batch])
            except Exception as error:  # whatever a model raises for inputs that it is not made for
                log.info("the model does not run at another batch size: %s: %s", type(error).__name__, error)
                return None

    def _compare(self, reference: Reference, edits: Edits, alignment: Alignment) -> VerifyError | None:
        compact = self._compact(alignment.plan)
        try:
            check = reference.compare(compact)
            if not check.passed and draws(self.graph):  # perhaps fewer numbers than before
                with edits.suspended():
                    still = Reference(self.graph, self._masked(self.graph), reference.batches, still=True)
                check = still.compare(compact)
            self.check = check
        except Exception as error:
            return VerifyError(
                f"after rewriting, the model fails with {type(error).__name__}: {error}. The model is "
                "unchanged. Please report it with the model."
            )
        if check.passed or not self.exact:
            return None
        return VerifyError(
            f"after rewriting, output '{check.output}' differs by {check.error:.1e} (tolerance "
            f"{check.tolerance:.1e}){self._where(edits, alignment)}. The model is unchanged. "
            "Please report it with the model; leave out the masks of that module, or pass verify=False if "
            "you know better."
        )

    def _where(self, edits: Edits, alignment: Alignment) -> str:
        """The first op that differs, in words."""
        compact, failed, _ = trace_partial(self.model, self.inputs, self.graph.concrete)
        if failed is not None or self.read is not None:
            return ""
        values = masked_values(self.graph, self.masks)
        with edits.suspended():
            held = {name: values(name) for name in self.graph.state}
        return first_difference(self.graph, held.__getitem__, alignment, compact, self.inputs)

    def _masked(self, graph: Graph) -> Callable[[Inputs], list[Tensor]]:
        """Runs the masked model; as a model where the graph holds the branches of one input only."""
        return masked_runner(graph, self.masks, self.model if graph.concrete and self.trace is not None else None)

    def _compact(self, plan: Plan) -> Callable[[Inputs], list[tuple[str, Tensor]]]:
        """Runs the compact model: on its own tensors, or on what the plan makes of those that are read."""
        if self.read is None:
            return partial(run_model, self.model)
        dense = self.read
        biases = {name: value.to(tensor_of(self.model, name).dtype) for name, value in plan.new_bias.items()}

        def read(name: str) -> Tensor:
            return biases[name] if name in biases else compact_tensor(plan, name, dense(name), self.masks)

        return partial(run_read, self.model, read)
