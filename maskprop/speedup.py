"""``ModelSpeedup``: masks in, the same model out, really smaller."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from maskprop.align.align import Alignment, align
from maskprop.errors import MaskpropError, OptionError, StageError, VerifyError
from maskprop.graph.graph import Graph
from maskprop.graph.trace import Inputs, Tracer, split_inputs, trace
from maskprop.infer.sweep import Inference
from maskprop.masks import MasksLike, load_masks
from maskprop.report import Report
from maskprop.rewrite.edits import Edits
from maskprop.rewrite.reference import masked_state
from maskprop.rewrite.repair import Repair
from maskprop.rewrite.verify import Reference, fresh_inputs

log = logging.getLogger(__name__)


class ModelSpeedup:
    """Make a masked model small: ``ModelSpeedup(model, dummy_input, masks).speedup_model()``."""

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks_file: MasksLike = None,
        map_location: str | torch.device | None = None,
        batch_dim: int = 0,
        confidence: int = 8,
        customized_replacers: list[Any] | None = None,
        customized_replace_func: dict[Any, Any] | None = None,
        *,
        constants: str = "exact",
        inference: str = "auto",
        channel_multiple: int = 1,
        tracer: str | Tracer = "auto",
        verify: bool = True,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.inputs: Inputs = split_inputs(dummy_input)
        self.constants = constants
        self.inference_mode = inference
        self.channel_multiple = channel_multiple
        self.tracer = tracer
        self.verify = verify
        self.generator = torch.Generator().manual_seed(seed)
        self.masks = load_masks(model, masks_file, map_location)
        self.report = Report()

    def speedup_model(self) -> nn.Module:
        """Rewrite the model in place and return it."""
        with self._stage("trace"):
            graph = trace(self.model, self.inputs, self.tracer)
        masks = {graph.aliases.get(k, k): v for k, v in self.masks.parameters.items()}
        masks = {k: v for k, v in masks.items()}
        with self._stage("infer"):
            inference = Inference(graph, masks, self.inference_mode)
            inference.run()
        with self._stage("align"):
            alignment = align(inference, self.constants, self.channel_multiple)
        reference = None
        if self.verify:
            with self._stage("verify"):
                batches = [self.inputs, fresh_inputs(self.inputs, self.generator)]
                reference = Reference(graph, masked_state(graph, masks), batches)
        edits = Edits(self.model)
        try:
            with self._stage("rewrite"):
                repair = Repair(edits, graph, inference, masks, self.inputs, self.constants, self.channel_multiple)
                alignment = repair.run(alignment)
                self.report.repair = repair
            if reference is not None:
                with self._stage("verify"):
                    check = reference.compare(self.model)
                    if not check.passed and self.constants == "exact":
                        raise VerifyError(f"after rewriting, output '{check.output}' differs by {check.error:.1e} (tolerance {check.tolerance:.1e}). The model is unchanged.")
                    self.report.check = check
        except BaseException:
            edits.rollback()
            raise
        self.report.plan = alignment.plan
        self.alignment = alignment
        return self.model

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[name] = self.report.seconds.get(name, 0.0) + time.perf_counter() - start
