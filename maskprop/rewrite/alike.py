"""Calls of modules that do what an earlier call did: of a model's like blocks it is enough to follow one.

Two are alike if the dense model's calls made the same ops of the same sizes, of which the same change, and if nothing
in the compact modules can tell them apart.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook

from maskprop.graph.graph import TensorMeta
from maskprop.graph.record import CALL
from maskprop.graph.structure import tensors_in
from maskprop.modules import TABLES, own_tensors

if TYPE_CHECKING:
    from maskprop.rewrite.replay import Replay

# What is equal says the same.
_PLAIN = (int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """A call of a compact module.

    Attributes:
        module, path: which it is.
        given: what it is called with, with the dense model's nodes in place of tensors.
        ops: those of the dense model's call.
    """

    module: nn.Module
    path: str
    given: Any
    ops: Sequence[fx.Node]


def are_alike(one: Call, other: Call, replay: Replay) -> bool:
    """Whether the ``other`` call will do in the compact model what ``one`` did there."""
    pairs = _Pairs(one, other, replay)
    return pairs.given_alike() and pairs.ops_alike() and _modules_alike(one.module, other.module, pairs.changed)


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward and no more."""
    hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not (hooks or _has_any_global_hook())


@dataclass
class _Pairs:
    """Which nodes of the dense model's two calls correspond.

    Attributes:
        changed: the dense and compact sizes where those differ.
    """

    one: Call
    other: Call
    replay: Replay
    changed: set[int] = field(default_factory=set)
    _mates: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def given_alike(self) -> bool:
        """Whether both are called with the same, but for tensors, which are of the same sizes."""
        a, b = ([n for _, n in tensors_in(call.given, kind=fx.Node)] for call in (self.one, self.other))
        self._mates.update(zip(a, b, strict=False))
        apart = len(set(a)) == len(set(b)) == len(set(zip(a, b, strict=False)))  # a tensor given twice is so in both
        return apart and all(map(self._sizes_alike, a, b)) and self._same(self.one.given, self.other.given)

    def ops_alike(self) -> bool:
        """Whether the ops are the same, of the same dense and compact sizes, on what corresponds."""
        cut = {name for name, *_ in self.replay.alignment.coupling.cuts}
        if len(self.one.ops) != len(self.other.ops) or not cut.isdisjoint(n.name for n in self.one.ops):
            return False
        for a, b in zip(self.one.ops, self.other.ops, strict=True):
            same = a.target is b.target and self._same(a.args, b.args) and self._same(a.kwargs, b.kwargs)
            if not same or b.name in cut or not self._sizes_alike(a, b) or not self._planned_alike(a, b):
                return False
            self._mates[a] = b
        return True

    def _planned_alike(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether the plan expects the same besides sizes."""
        numbers = self.replay.alignment.numbers
        return self.replay.start(a) == self.replay.start(b) and numbers.get(a) == numbers.get(b)

    def _same(self, a: Any, b: Any) -> bool:
        """Whether two arguments correspond, all the way down."""
        return _equal(a, b, self._correspond)

    def _correspond(self, a: Any, b: Any) -> bool:
        if not isinstance(a, fx.Node):
            return a is b
        if a not in self._mates:
            parts = a.target is b.target is operator.getitem and self._same(a.args, b.args)
            if not parts and not self._own_alike(a, b):
                return False
            self._mates[a] = b
        return self._mates[a] is b

    def _own_alike(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two of the model's tensors are the same one, or each module's own."""
        if not a.op == b.op == "get_attr" or "lifted" in a.meta or "lifted" in b.meta:
            return False
        names = (str(a.target).removeprefix(self.one.path), str(b.target).removeprefix(self.other.path))
        return (a is b or names[0] == names[1] != str(b.target)) and self._sizes_alike(a, b)

    def _sizes_alike(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two values are of the same dense and compact sizes, and lie in memory in the same order."""
        mine, its, compact = a.meta["tensor"], b.meta["tensor"], self.replay.expected(a)
        if mine != its or compact != self.replay.expected(b):
            return False
        for meta, other, shape in zip(*map(_each, (mine, its)), compact, strict=True):
            if meta is not None and meta.order != other.order:
                return False
            if shape is not None and meta.shape != shape:
                self.changed.update(n for pair in zip(meta.shape, shape, strict=True) if len({*pair}) > 1 for n in pair)
        return True


def _each(meta: Any) -> tuple[TensorMeta | None, ...]:
    return meta if isinstance(meta, tuple) else (meta,)


def _modules_alike(a: nn.Module, b: nn.Module, changed: set[int]) -> bool:
    """Whether two compact modules hold the same, but for the values of tensors, and for numbers that are no size."""
    if a is b:
        return True
    if type(a) is not type(b) or not is_untouched(a) or not is_untouched(b):
        return False
    tensors = [{name: (t.shape, t.dtype) for name, t in own_tensors(module, bare=True).items()} for module in (a, b)]
    if tensors[0] != tensors[1] or vars(a).keys() != vars(b).keys() or a._modules.keys() != b._modules.keys():
        return False
    skipped = TABLES | {CALL} | tensors[0].keys()

    def alike(x: Any, y: Any) -> bool:
        if type(x) is type(y) is int and x != y:
            return changed.isdisjoint((x, y))  # the number of a layer, say, and no size that was not set
        return (isinstance(x, nn.Module) and isinstance(y, nn.Module) and _modules_alike(x, y, changed)) or _equal(x, y)

    return all(alike(value, vars(b)[name]) for name, value in vars(a).items() if name not in skipped) and all(
        map(alike, a._modules.values(), b._modules.values())
    )


def _equal(a: Any, b: Any, equal: Callable[[Any, Any], bool] = operator.is_) -> bool:
    """Whether two values are the same where they are plain, all the way down; ``equal`` decides over the rest."""
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return bool(a == b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b, itertools.repeat(equal)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(map(_equal, a.values(), map(b.get, a), itertools.repeat(equal)))
    return equal(a, b)
