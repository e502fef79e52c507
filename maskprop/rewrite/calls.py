"""How modules were called, so that they can be called again with other sizes."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from maskprop.graph.graph import Graph
from maskprop.graph.shapes import QuickFakes, new_fake
from maskprop.graph.structure import map_tensors, tensors_in
from maskprop.graph.trace import Inputs, frozen_state, plain_kernels
from maskprop.rewrite.concolic import CannotTrace, bind_arguments, is_plain
from maskprop.rewrite.edits import Edits

log = logging.getLogger(__name__)


class Arguments:
    """Arguments of a module's recorded call, to be made again with other sizes.

    Args:
        nodes: by name, with graph nodes in place of tensors.
        opaque: copies of the arguments that are neither tensors nor plain (a key-value cache), as they were when the
            module was called.
        fake: the mode of the tensors that are made.
    """

    def __init__(self, nodes: dict[str, Any], opaque: dict[str, Any], fake: FakeTensorMode) -> None:
        self.nodes, self._opaque, self.fake = {**nodes, **opaque}, opaque, fake

    def beside(self, stand_ins: Mapping[str, Any]) -> Arguments:
        """The same, with some arguments replaced."""
        return Arguments(self.nodes, {**self._opaque, **stand_ins}, self.fake)

    def values(self, shape: Callable[[fx.Node], Sequence[int]]) -> dict[str, Any]:
        """Fresh arguments; ``shape`` tells the size of each tensor."""
        found = {name: self.blank(value, shape) for name, value in self.nodes.items()}
        return {**found, **{name: copy_state(value) for name, value in self._opaque.items()}}

    def blank(self, value: Any, shape: Callable[[fx.Node], Sequence[int]]) -> Any:
        """The same structure with fresh fake tensors in place of nodes, which lie in memory as the recorded ones."""

        def made(node: fx.Node) -> Tensor:
            meta = node.meta["tensor"]
            return new_fake(self.fake, tuple(shape(node)), meta.dtype, meta.device, meta.order)

        return map_tensors(value, made, fx.Node)


def recorded_calls(edits: Edits, graph: Graph, paths: Sequence[str], inputs: Inputs) -> dict[str, Arguments]:
    """The arguments of each module's first call in the dense model; modules without a plain signature are left out.

    Args:
        edits: the compact model and its undo log.
        graph: of the dense model.
        paths: of the modules.
        inputs: the dummy input.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    nodes: dict[str, dict[str, Any]] = {}
    with edits.suspended(), frozen_state(edits.model):
        for path in paths:
            try:
                if path in graph.calls:
                    nodes[path] = bind_arguments(edits.model.get_submodule(path), graph.calls[path])
            except CannotTrace as error:
                log.info("no forward can be changed in '%s': %s", path, error)
        opaque = _opaque_arguments(edits.model, nodes, inputs, fake, graph.concrete)
    return {path: Arguments(found, opaque.get(path, {}), fake) for path, found in nodes.items()}


def _opaque_arguments(
    model: nn.Module, nodes: Mapping[str, dict[str, Any]], inputs: Inputs, fake: FakeTensorMode, concrete: bool
) -> dict[str, dict[str, Any]]:
    """Copies of what modules are called with that is neither tensor nor plain, taken at the call of a dense run.

    That run is on fake tensors, unless the model reads its values.
    """
    wanted = {path: [n for n, value in arguments.items() if _is_opaque(value)] for path, arguments in nodes.items()}
    found: dict[str, dict[str, Any]] = {}
    handles = []
    for path, names in wanted.items():
        if names:
            hook = functools.partial(_take_copies, path=path, names=names, found=found)
            handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
    if handles:
        try:
            with frozen_state(model), torch.no_grad(), plain_kernels():
                if concrete:
                    args, kwargs = copy.deepcopy(inputs)
                    model(*args, **kwargs)
                else:
                    args, kwargs = map_tensors(inputs, fake.from_tensor)
                    with fake, QuickFakes():
                        model(*args, **kwargs)
        except Exception as error:  # then those modules cannot be traced either
            log.info("the dense model does not run again: %s: %s", type(error).__name__, error)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _take_copies(
    module: nn.Module,
    args: Any,
    kwargs: Any,
    *,
    path: str,
    names: Sequence[str],
    found: dict[str, dict[str, Any]],
) -> None:
    if path not in found:
        arguments = bind_arguments(module, (args, kwargs))
        found[path] = {name: copy_state(arguments[name]) for name in names}


def _is_opaque(value: Any) -> bool:
    if isinstance(value, dict):
        return False
    return not is_plain(value) and not any(True for _ in tensors_in(value, kind=fx.Node))


def copy_state(value: Any) -> Any:
    """A deep copy that shares its tensors."""
    memo: dict[int, Any] = {}
    _tensors_below(value, memo, set())
    return copy.deepcopy(value, memo)


def _tensors_below(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        memo[id(value)] = value
        return
    below = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple, set))
        else vars(value).values()
        if hasattr(value, "__dict__") and not isinstance(value, type)
        else ()
    )
    for one in below:
        _tensors_below(one, memo, seen)
