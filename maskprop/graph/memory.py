"""What ``forward`` keeps in plain attributes and reads in its next call: one recorded call does not show it.

Buffers, and tensors that attributes hold from the start, are values of the graph; see :attr:`Graph.renewed`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from maskprop.graph.functional import Value
from maskprop.graph.record import Recorder
from maskprop.graph.structure import map_each_once, tensors_in
from maskprop.modules import TABLES, modules_by_path, of_torch

log = logging.getLogger(__name__)

_ABSENT = object()
_GROWING = (list, dict, deque)


class Memory:
    """The plain attributes of the author's modules before a call."""

    def __init__(self, model: nn.Module) -> None:
        modules = modules_by_path(model).items()
        self._before = [(path, vars(m), vars(m).copy()) for path, m in modules if not of_torch(type(m))]

    def kept(self, recorder: Recorder) -> dict[int, str]:
        """Attributes that hold tensors now which the recorded call made of its inputs, by the tensors' ids."""
        found = {id(t): (name, t) for name, t in self._held() if name not in recorder.graph.state}
        return {key: name for key, (name, t) in found.items() if _made_of_inputs(recorder.node_of(t))}

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        for path, now, before in self._before:
            for name, value in now.items():
                new = before.get(name, _ABSENT) is not value or isinstance(value, _GROWING)
                if new and name not in TABLES:
                    where = f"{path}.{name}".lstrip(".")
                    yield from ((where, tensor) for tensor in _tensors(value))


class _NextCall(Recorder):
    """Records the call after another one, and which of what that kept it reads."""

    def __init__(self, model: nn.Module, concrete: bool, kept: Mapping[int, str]) -> None:
        super().__init__(model, concrete)
        self.read: dict[str, None] = {}
        self._kept = kept

    def _adopt(self, tensor: Tensor) -> Value:
        if id(tensor) in self._kept:
            self.read[self._kept[id(tensor)]] = None
        return super()._adopt(tensor)


def remembered(memory: Memory, recorder: Recorder, model: nn.Module, inputs: Any) -> list[str]:
    """Attributes in which a call kept what the next one reads.

    Args:
        memory: made before the call.
        recorder: of the call, before it is finished.
        model: as the call left it; called again if it kept anything.
        inputs: positional and keyword arguments of the call.
    """
    kept = memory.kept(recorder)
    if not kept:
        return []
    following = _NextCall(model, recorder.graph.concrete, kept)
    args, kwargs = map_each_once(inputs, Tensor.clone)  # the inputs themselves may have been kept
    for i, (_, tensor) in enumerate(tensors_in((args, kwargs))):
        following.add_input(tensor, f"input_{i}")
    try:
        with following.module_paths(), following:
            model(*args, **kwargs)
    except Exception as error:  # all went well in the first call: what was kept does not fit the second
        log.info("the second call of forward fails (%s: %s): what the first kept matters", type(error).__name__, error)
        return sorted(set(kept.values()))
    return list(following.read)


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in an attribute; not to any depth, since authors' objects may refer to each other."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (tuple, *_GROWING)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part, depth - 1)
    elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name, None), depth - 1)


def _made_of_inputs(node: fx.Node | None) -> bool:
    """Whether a value depends on an input of the model."""
    seen, ahead = set[fx.Node](), [] if node is None else [node]
    while ahead:
        one = ahead.pop()
        if one.op == "placeholder":
            return True
        if one not in seen:
            seen.add(one)
            ahead += one.all_input_nodes
    return False
