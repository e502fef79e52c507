"""Users' own replacers (hyper-modules) and replace functions (leaves), with NNI's signatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx, nn

from maskprop.align.align import Alignment
from maskprop.align.plan import Plan
from maskprop.errors import ReplaceError
from maskprop.graph.graph import Graph, shape_of
from maskprop.graph.paths import within
from maskprop.infer.facts import everywhere
from maskprop.modules import modules_by_path
from maskprop.rewrite.edits import Edits

if TYPE_CHECKING:
    from maskprop.speedup import ModelSpeedup

LeafMasks = tuple[list[Tensor], Any, dict[str, Tensor]]
ReplaceFunction = Callable[[nn.Module, LeafMasks], nn.Module]


class Replacer(Protocol):
    """Rewrites hyper-modules: calls ``speedup.replace_module(path, module)`` for each that it takes over."""

    def replace_modules(self, speedup: ModelSpeedup) -> None:
        """Look at ``speedup.model``, ``speedup.plan`` and ``speedup.masks_of(path)``; replace what you know."""


class Customs:
    """Applies the users' replacements of one speedup.

    Args:
        replacers: called first, in order.
        functions: replace functions by module type, or by its class name as in NNI.
    """

    def __init__(self, replacers: Sequence[Replacer], functions: Mapping[type | str, ReplaceFunction]) -> None:
        self.replacers, self.functions = tuple(replacers), dict(functions)
        self.taken: list[str] = []

    def matching(self, model: nn.Module) -> set[str]:
        """Paths of the modules for which there is a replace function."""
        return {path for path, _, _ in self._served(model)}

    def apply(self, speedup: ModelSpeedup, edits: Edits, graph: Graph, alignment: Alignment) -> Plan:
        """Run replacers, then replace functions; the plan without the modules that they took over.

        Raises:
            ReplaceError: one of them failed, or returned something that is no module.
        """
        self.taken.clear()
        for replacer in self.replacers:
            try:
                replacer.replace_modules(speedup)
            except Exception as error:
                raise ReplaceError(
                    f"the replacer {type(replacer).__name__} failed with {type(error).__name__}: {error}. "
                    "The model is unchanged."
                ) from error
        for path, module, function in self._served(edits.model):
            if within(path, self.taken) or not _shrinks(alignment.plan, path):
                continue
            try:
                new = function(module, leaf_masks(graph, alignment, path))
            except Exception as error:
                raise ReplaceError(
                    f"the replace function for {type(module).__name__} failed on '{path}' with "
                    f"{type(error).__name__}: {error}. The model is unchanged."
                ) from error
            if not isinstance(new, nn.Module):
                raise ReplaceError(
                    f"the replace function for {type(module).__name__} returned {type(new).__name__} for "
                    f"'{path}'; expected a torch.nn.Module. The model is unchanged."
                )
            edits.set_module(path, new)
            self.taken.append(path)
        return alignment.plan.only(lambda name: not within(name, self.taken)) if self.taken else alignment.plan

    def _served(self, model: nn.Module) -> list[tuple[str, nn.Module, ReplaceFunction]]:
        """Paths and modules for which there is a replace function, and which."""
        modules = modules_by_path(model) if self.functions else {}
        found = ((path, module, self._function(module)) for path, module in modules.items())
        return [(path, module, function) for path, module, function in found if function is not None]

    def _function(self, module: nn.Module) -> ReplaceFunction | None:
        for kind in type(module).__mro__:
            if kind in self.functions:
                return self.functions[kind]
        return self.functions.get(type(module).__name__)


def _shrinks(plan: Plan, path: str) -> bool:
    return any(name.rpartition(".")[0] == path for name in plan.keep)


def leaf_masks(graph: Graph, alignment: Alignment, path: str) -> LeafMasks:
    """``(input_masks, output_mask, weight_masks)`` of a leaf: 0/1 floats of the full shapes, 0 where a unit leaves."""
    ops = [n for n in graph.ops if n.meta["path"] == path]
    inside = set(ops)
    outside = [
        s
        for n in ops
        for s in n.all_input_nodes
        if s.op != "get_attr" and s not in inside and s.meta.get("path") != path
    ]
    inputs = [kept_mask(alignment, n) for n in dict.fromkeys(outside)]
    results = [n for n in ops if any(u not in inside for u in n.users)]
    last = results[-1] if results else None
    if last is not None and isinstance(last.meta["tensor"], tuple):  # the first of several results
        last = next((u for u in last.users if u.args[1] == 0), None)
    output = None if last is None else kept_mask(alignment, last)
    dot = path + "." if path else ""
    weights = {
        name.removeprefix(dot): kept_mask(alignment, node)
        for name, node in alignment.states.items()
        if name.rpartition(".")[0] == path
    }
    return inputs, output, weights


def kept_mask(alignment: Alignment, node: fx.Node) -> Tensor:
    """1.0 where an element of a recorded value stays."""
    mask = everywhere(True, len(shape_of(node)))
    for labels in alignment.coupling.labels_of(node):
        if labels is not None:
            mask = mask & ~torch.from_numpy(alignment.solution.leaves(labels))
    return mask.expand(shape_of(node)).float()
