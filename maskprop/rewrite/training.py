"""Let what only training runs follow: auxiliary heads, which read units that left the evaluated model.

Their modules have no part in the trace of evaluation. A second trace, with the author's modules in training mode and
torch's own layers as in evaluation, ties their tensors to those of which is known what left.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from maskprop.align.align import Alignment, align_alike
from maskprop.graph.graph import Graph
from maskprop.graph.paths import within
from maskprop.graph.trace import Inputs, trace_partial
from maskprop.infer.sweep import Inference
from maskprop.modules import modules_by_path
from maskprop.rewrite.apply import apply_plan
from maskprop.rewrite.edits import Edits
from maskprop.rewrite.replay import Replay

log = logging.getLogger(__name__)


def idle_modules(model: nn.Module, graph: Graph) -> Iterator[str]:
    """Paths of the outermost modules that have parameters of which the trace used none."""
    uncalled = [(path, module) for path, module in modules_by_path(model).items() if path and path not in graph.calls]
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"} if uncalled else set()
    found: set[str] = set()
    for path, module in uncalled:
        if within(path, found):
            continue
        own = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if own and read.isdisjoint(graph.aliases.get(name, name) for name in own):
            found.add(path)
            yield path


@dataclass
class TrainingPass:
    """A pass that runs modules which evaluation does not.

    Attributes:
        inference: of it, after its sweeps.
        modules: paths of those modules.
    """

    inference: Inference
    modules: list[str]


def training_pass(model: nn.Module, inference: Inference, inputs: Inputs) -> TrainingPass | None:
    """Trace a dense model with the author's modules in training mode, if that runs what evaluation leaves out.

    Args:
        model: dense.
        inference: of its pass in evaluation.
        inputs: the dummy input.
    """
    graph, error, _ = trace_partial(model, inputs, concrete=False, training=True)
    read = {str(n.target) for n in graph.fx.nodes if n.op == "get_attr"}
    run = [path for path in idle_modules(model, inference.graph) if any(within(name, [path]) for name in read)]
    if error is not None or not run:
        log.info("what only training runs keeps its sizes: %s", error or "it did not run there either")
        return None
    masks = {graph.aliases.get(name, name): mask for name, mask in inference.masks.items()}
    found = Inference(graph, masks, inference.mode, inference.confidence, inference.generator)
    found.run()
    return TrainingPass(found, run)


def follow_training(
    edits: Edits, inference: Inference, inputs: Inputs, alignment: Alignment, replaced: Sequence[str]
) -> tuple[Alignment, list[str]]:
    """Cut the tensors of modules that only training runs to the units that stay.

    What they read of units that left is gone, unless it was a constant that a bias takes: evaluation did not need it.

    Args:
        edits: the model, compact by now, and its undo log.
        inference: of the dense model in evaluation.
        inputs: the dummy input.
        alignment: what left.
        replaced: see :class:`~maskprop.rewrite.replay.Replay`.

    Returns:
        The alignment, its plan with those tensors too, and the paths of the modules that follow.
    """
    if inference.graph.concrete or not any(idle_modules(edits.model, inference.graph)):
        return alignment, []
    with edits.suspended():
        training = training_pass(edits.model, inference, inputs)
        if training is None:
            return alignment, []
        alike = align_alike(training.inference, alignment, inference.left.keys())
    if alike is None:
        log.info("what only training runs keeps its sizes: it ties units that left to others")
        return alignment, []
    mark = edits.mark()
    apply_plan(edits, alike.plan.only(lambda name: within(name, training.modules)), {})
    mismatch = Replay(training.inference.graph, alike, replaced).run(edits.model, inputs)
    if mismatch is not None:
        log.info("what only training runs keeps its sizes: %s", mismatch)
        edits.rollback(mark)
        return alignment, []
    return replace(alignment, plan=alike.plan), training.modules
