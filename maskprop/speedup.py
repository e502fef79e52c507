"""``ModelSpeedup``: masks in, the same model out, really smaller."""

from __future__ import annotations

import cmath
import logging
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from maskprop.align.align import Alignment, align
from maskprop.align.constants import constants_read
from maskprop.align.plan import Plan
from maskprop.errors import (
    MaskpropError,
    NonFiniteError,
    OptionError,
    StageError,
    UnverifiedWarning,
    VerifyError,
    WrappedModelError,
)
from maskprop.explain import Explainer
from maskprop.garbage import GARBAGE
from maskprop.graph.activations import insert_activation_masks
from maskprop.graph.graph import Graph
from maskprop.graph.resize import at_other_sizes
from maskprop.graph.trace import Inputs, Tracer, quiet, split_inputs, trace
from maskprop.infer.parts import leaving_a_rest, look_up
from maskprop.infer.sizes import lasting
from maskprop.infer.sweep import Facts, Inference
from maskprop.masks import Masks, MasksLike, load_masks, prune_masks_removed
from maskprop.modules import modules_by_path, named_tensors
from maskprop.reasons import Explanation
from maskprop.report import Report
from maskprop.rewrite.attempts import carry_out
from maskprop.rewrite.custom import Customs, LeafMasks, ReplaceFunction, Replacer, leaf_masks
from maskprop.rewrite.dead import DeadLayer, constants_held, find_dead
from maskprop.rewrite.edits import Edits, renew_gradients, tensor_of
from maskprop.rewrite.repair import Repair
from maskprop.rewrite.steps import RECORD, NewRecord, Snapshot
from maskprop.rewrite.verification import Verification
from maskprop.rewrite.verify import computes_as
from maskprop.wrappers import find_wrapper

log = logging.getLogger(__name__)

CONSTANTS = ("exact", "fold", "drop")
MODES = ("auto", "rules", "gradient")


class ModelSpeedup:
    """Make a masked model small: ``ModelSpeedup(model, dummy_input, masks).speedup_model()``.

    The stages are methods of their own with NNI's names: :meth:`initialize_speedup`, :meth:`infer_modules_masks`,
    :meth:`update_direct_sparsity`, :meth:`update_indirect_sparsity`, :meth:`replace_compressed_modules`.

    Args:
        model: changed in place by :meth:`speedup_model`; whatever fails leaves it as it was.
        dummy_input: a tensor; a tuple or list of positional arguments, whose last item may be a dict of keyword
            arguments; or a dict of keyword arguments.
        masks_file: a path or a dict of masks, 1 = keep (see :func:`maskprop.load_masks`); ``None`` takes the model's
            own ``torch.nn.utils.prune`` masks and makes them permanent.
        map_location: device for masks from a file.
        batch_dim: the axis of the inputs that is the batch: generated forwards are verified at another size of it.
        confidence: random points at which an op without a rule is probed.
        customized_replacers: objects with ``replace_modules(speedup)``, called before anything else is rewritten.
        customized_replace_func: module type (or class name) -> function of
            ``(module, (input_masks, output_mask, weight_masks))`` that returns the new module.
        constants: ``"exact"`` folds every constant that a pruned unit leaves, or keeps the unit; ``"fold"`` puts
            them into biases even where padded borders then differ; ``"drop"`` ignores them.
        inference: ``"auto"`` (rules, and probes where there is none), ``"rules"`` or ``"gradient"`` (probes only).
        channel_multiple: every axis that shrinks keeps a multiple of this many units.
        tracer: ``"auto"``, ``"fake"``, ``"concrete"``, ``"meta"`` or a function of ``(model, inputs)``.
        verify: compare with the masked model, on the dummy input and on a random one, before returning.
        read: for a model on the meta device, a function that gives the value of a tensor by its name. Constants are
            then folded and the result is verified as ever, and no more than a few tensors are held at a time.
        seed: of the random numbers that probes and verification draw.

    Attributes:
        graph: the recorded forward pass.
        facts: what the inference found.
        plan: what leaves, what is folded, what changes.
        report: the account of the speedup.

    Raises:
        MaskError: the masks do not fit the model (see the subclasses).
        WrappedModelError: the model is wrapped in ``DataParallel``, ``torch.compile`` or the like.
        OptionError: an option has a value that it does not take.
    """

    graph: Graph
    inference: Inference
    alignment: Alignment

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks_file: MasksLike = None,
        map_location: str | torch.device | None = None,
        batch_dim: int = 0,
        confidence: int = 8,
        customized_replacers: Sequence[Replacer] | None = None,
        customized_replace_func: Mapping[type | str, ReplaceFunction] | None = None,
        *,
        constants: str = "exact",
        inference: str = "auto",
        channel_multiple: int = 1,
        tracer: str | Tracer = "auto",
        verify: bool = True,
        read: Callable[[str], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, known in (("constants", constants, CONSTANTS), ("inference", inference, MODES)):
            if value not in known:
                raise OptionError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
        for name, number in (("channel_multiple", channel_multiple), ("confidence", confidence)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise OptionError(f"{name} is {number!r}; expected a whole number of at least 1.")
        wrapper = find_wrapper(model)
        if wrapper is not None:
            raise WrappedModelError(
                f"{wrapper[0]}, which keeps the sizes that it was made with. Pass the plain module "
                f"(`.{wrapper[1]}`), and wrap the result anew."
            )
        self.model = model
        self.inputs: Inputs = split_inputs(dummy_input)
        self.batch_dim, self.confidence = batch_dim, confidence
        self.constants, self.channel_multiple = constants, channel_multiple
        self.inference_mode, self.tracer, self.verify = inference, tracer, verify
        self.read = read
        self.generator = torch.Generator().manual_seed(seed)
        self.masks: Masks = load_masks(model, masks_file, map_location)
        self.report = Report()
        self._customs = Customs(customized_replacers or (), customized_replace_func or {})
        self._own_masks = masks_file is None
        self._edits: Edits | None = None

    # -- the stages -----------------------------------------------------------------------------

    def speedup_model(self) -> nn.Module:
        """Rewrite the model in place.

        Returns:
            The model that was given, smaller.

        Raises:
            MaskpropError: see the errors of the stages; the model is then as it was.
        """
        with GARBAGE.ignored(), prune_masks_removed(self.model) if self._own_masks else nullcontext():
            try:
                self._run_stages()
            except VerifyError as error:
                if not self._traced_another_way():
                    raise
                log.info("%s Fake tensors take another way through it: tracing the real input.", error)
                self.tracer = "concrete"
                self._run_stages()
        return self.model

    def _run_stages(self) -> None:
        self.initialize_speedup()
        self.infer_modules_masks()
        self.replace_compressed_modules()

    def _traced_another_way(self) -> bool:
        """Whether the graph, made on fake tensors, is not that of a run on real ones."""
        if self.tracer != "auto" or self.graph.concrete or self.read is not None or self.masks.activations:
            return False
        return not computes_as(self.graph, self.model, self.inference.masks, self.inputs)

    def initialize_speedup(self) -> None:
        """Trace the model and hand the masks to the inference.

        Raises:
            DummyInputError: the model does not run on the dummy input.
            TraceError: its calls could not be recorded.
            NonFiniteError: a masked parameter holds nan or infinity.
        """
        with self._stage("trace"):
            self.graph = self._trace(self.inputs)
            self.graph.read = self.read
            insert_activation_masks(self.graph, self.model, self.masks.activations)
        masks = {self.graph.aliases.get(k, k): v for k, v in self.masks.parameters.items()}
        for name in masks:
            tensor = self.graph.state[name] if name in self.graph.state else tensor_of(self.model, name)
            if tensor.is_meta and self.read is not None:
                tensor = self.read(name)
            if not tensor.is_meta and not _finite(tensor.detach()):
                raise NonFiniteError(
                    f"parameter '{name}' holds nan or infinity, so that a zero mask does not hide its "
                    "input. Repair the weights first; the model is unchanged."
                )
        self.inference = Inference(self.graph, masks, self.inference_mode, self.confidence, self.generator)

    def infer_modules_masks(self) -> None:
        """Both sweeps, to a fixed point. :attr:`facts` then holds what is known and needed of every value."""
        with self._stage("infer"):
            self._inferred().run()

    def update_direct_sparsity(self, node: fx.Node) -> None:
        """Derive what is known of one node's value from its inputs (nodes: ``speedup.graph.nodes``)."""
        self._inferred().update_direct(node)

    def update_indirect_sparsity(self, node: fx.Node) -> None:
        """Tell one node's inputs which of their elements its needed elements depend on."""
        self._inferred().update_indirect(node)

    def replace_compressed_modules(self) -> None:
        """Solve for what leaves, rewrite the modules, and verify.

        Raises:
            RewriteError: the model's forward cannot be made to follow any plan.
            VerifyError: the compact model computes something else.
        """
        inference = self._inferred()
        with self._stage("align"):
            spared = self._customs.matching(self.model)  # what users replace themselves they see as it is
            parts = leaving_a_rest(inference)
            dead, alignment = self._align(spared)
            used = constants_read(alignment.coupling) | constants_held(dead, inference)
            if not lasting(inference, used, parts, self._at_other_sizes()):
                dead, alignment = self._align(spared)
        verification = self._verification()
        before = Snapshot(self.model)
        self._edits = edits = Edits(self.model)
        repair = Repair(
            edits,
            self.graph,
            inference,
            inference.masks,
            self.inputs,
            self.constants,
            self.channel_multiple,
            self._customize,
            dead,
            spared,
        )
        try:
            self.alignment = carry_out(repair, alignment, verification, self._stage)
            changes = before.changes(self.model)
            if not self.plan.empty or repair.removed:
                edits.set_attribute(self.model, RECORD, NewRecord(self.model, before, changes, self.plan))
        except BaseException:
            edits.rollback()
            raise
        finally:
            self._edits = None
            self.report.check = None if verification is None else verification.check
        for name, tensor in named_tensors(modules_by_path(self.model)):
            if isinstance(tensor, nn.Parameter) and before.shapes.get(name) != tuple(tensor.shape):
                renew_gradients(tensor)
        self.explainer = Explainer(inference, self.alignment, inference.masks)
        repair.finish()
        self.report.fill(before, changes, self.model, self.explainer, repair)

    # -- what replacers may use -----------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        """What the inference found.

        Raises:
            StageError: the model was not traced yet.
        """
        return self._inferred().facts

    @property
    def plan(self) -> Plan:
        """The plan that is or was carried out.

        Raises:
            StageError: nothing was solved yet.
        """
        if not hasattr(self, "alignment"):
            raise StageError(
                "the plan was asked for before it was made. Call speedup_model() or replace_compressed_modules() first."
            )
        return self.alignment.plan

    def masks_of(self, path: str) -> LeafMasks:
        """``(input_masks, output_mask, weight_masks)`` of a module: full 0/1 floats, 0 where a unit leaves."""
        return leaf_masks(self.graph, self.alignment, path)

    def replace_module(self, path: str, module: nn.Module) -> None:
        """Put a user's module at ``path``; nothing below it is rewritten otherwise. For replacers.

        Raises:
            StageError: called outside a replacer.
        """
        if self._edits is None:
            raise StageError("replace_module was called outside a replacer. Call it from replace_modules(speedup).")
        self._edits.set_module(path, module)
        self._customs.taken.append(path)

    # -- inside ---------------------------------------------------------------------------------

    def _inferred(self) -> Inference:
        if not hasattr(self, "inference"):
            raise StageError(
                "the model was not traced yet. Call initialize_speedup() first, or speedup_model() for everything."
            )
        return self.inference

    def _trace(self, inputs: Inputs) -> Graph:
        return trace(self.model, inputs, self.tracer, self.masks.parameters)

    def _align(self, spared: Collection[str]) -> tuple[list[DeadLayer], Alignment]:
        """The layers that leave as a whole, and the plan for the rest."""
        dead = find_dead(self.model, self.graph, self.inference, self.inputs, spared)
        return dead, align(self.inference, self.constants, self.channel_multiple)

    def _at_other_sizes(self) -> Iterator[Inference]:
        """The model at other sizes than the dummy input's: for each pass, what is known there."""
        return at_other_sizes(self.inputs, self._try_sizes)

    def _try_sizes(self, inputs: Inputs) -> Inference | None:
        """A pass on other inputs, on such tensors as the first one; ``None`` where the model refuses them."""
        tracer = self.tracer if callable(self.tracer) or not self.graph.concrete else "concrete"
        try:
            with quiet():
                graph = trace(self.model, inputs, "fake" if tracer == "auto" else tracer, self.masks.parameters)
            graph.read = self.read
            insert_activation_masks(graph, self.model, self.masks.activations)
            other = Inference(graph, self.inference.masks, self.inference_mode, self.confidence, self.generator)
            other.forward()
            look_up(other)
        except (MaskpropError, IndexError, RuntimeError) as error:
            log.info("the model does not run at other sizes: %s", error)
            return None
        return other

    def _customize(self, alignment: Alignment) -> tuple[Plan, list[str]]:
        assert self._edits is not None
        self.alignment = alignment
        return self._customs.apply(self, self._edits, self.graph, alignment), list(self._customs.taken)

    def _verification(self) -> Verification | None:
        """What the result is held against; ``None`` where that was not asked for or nothing can be computed."""
        if not self.verify or (self.read is None and any(p.is_meta for p in self.model.parameters())):
            return None
        retrace = None if self.masks.activations else self._trace
        with self._stage("verify"):
            found = Verification(
                self.model,
                self.graph,
                self.inference.masks,
                self.inputs,
                retrace,
                self.batch_dim,
                self.constants == "exact",
                self.read,
                self.generator,
            )
        for name in found.reference.constant_outputs():
            warnings.warn(
                f"{name} of the masked model does not vary with the input (is a last layer zero?), so "
                "comparing it proves nothing.",
                UnverifiedWarning,
                stacklevel=4,
            )
        return found

    def explain(self, name: str, axis: int = 0) -> Explanation:
        """Why each unit of a parameter left or stayed.

        Args:
            name: of a parameter, or of a module (its weight is then meant).
            axis: of the parameter; 0 holds the outputs of most layers.

        Raises:
            OptionError: the model has no such parameter or axis.
            StageError: nothing has been sped up yet.
        """
        if self.report.plan is None:
            raise StageError("explain was called before speedup_model. Call speedup_model first.")
        return self.explainer.explain(name, axis)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[name] = self.report.seconds.get(name, 0.0) + time.perf_counter() - start


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are; their sum tells, except where it overflows."""
    return cmath.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
