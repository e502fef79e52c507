"""Make the compact model's ``forward`` agree with the plan."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from maskprop.align.align import Alignment
from maskprop.errors import RewriteError
from maskprop.graph.graph import Graph
from maskprop.graph.trace import Inputs
from maskprop.infer.sweep import Inference
from maskprop.rewrite.apply import apply_plan
from maskprop.rewrite.edits import Edits
from maskprop.rewrite.replay import Replay


def repair(edits: Edits, graph: Graph, inference: Inference, alignment: Alignment, masks: Mapping[str, Tensor], inputs: Inputs) -> Alignment:
    apply_plan(edits, alignment.plan, masks)
    mismatch = Replay(graph, alignment).run(edits.model, inputs)
    if mismatch is not None:
        raise RewriteError(f"the compact model does not follow the plan at {mismatch}")
    return alignment
