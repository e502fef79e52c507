"""Change the numbers in an author's forward that no longer fit.

A module is run alone, on fake tensors of the planned sizes, beside what the plan expects of its ops. At the first op
that differs, the expression that made it is looked up in the author's source (:mod:`maskprop.rewrite.authored`), and
its sizes or its number are changed; until the module follows the plan.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import logging
import math
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from maskprop.graph.structure import tensors_in
from maskprop.graph.trace import frozen_state, plain_kernels, quiet
from maskprop.infer.op import Op
from maskprop.rewrite.arguments import number_arguments
from maskprop.rewrite.authored import (
    NoSource,
    Patch,
    Place,
    check_at,
    expression_at,
    place_of,
    resolve,
)
from maskprop.rewrite.calls import Arguments
from maskprop.rewrite.edits import Edits
from maskprop.rewrite.frames import Frame, Frames, PlaceRecorder, has_author
from maskprop.rewrite.generate import attention_scale
from maskprop.rewrite.mismatch import Mismatch
from maskprop.rewrite.patched import FILLED, patched_class, slices_of
from maskprop.rewrite.replay import Replay

log = logging.getLogger(__name__)

aten = torch.ops.aten

# How many expressions of one forward may be changed.
MAX_PATCHES = 16
# How many numbers of a constant may be written into a forward.
MAX_NUMBERS = 256
# Calls that make a tensor of the numbers in their first argument.
_MAKE_CONSTANTS = ("tensor", "as_tensor", "FloatTensor", "LongTensor")
# Bounds and step of a slice that says nothing.
_ALL = (0, sys.maxsize, 1)
# Names of calls that take sizes, and how many arguments stand before those: of a method, of a function.
_SIZED = {
    "view": (0, None), "reshape": (0, 1), "expand": (0, None), "broadcast_to": (0, 1), "unflatten": (1, 2),
    "new_zeros": (0, None), "new_ones": (0, None), "new_empty": (0, None), "zeros": (None, 0), "ones": (None, 0),
    "empty": (None, 0), "full": (None, 0), "new_full": (0, None),
}  # fmt: skip
# What reads a number and computes nothing.
_PLAIN = (ast.Constant, ast.Name, ast.Attribute, ast.expr_context)


def patch_forwards(edits: Edits, replay: Replay, calls: Mapping[str, Arguments]) -> list[str]:
    """Change numbers in modules' forwards until they follow the plan, where that is possible.

    Args:
        edits: the compact model and its undo log.
        replay: what the plan expects.
        calls: the modules to treat, and how they were called.

    Returns:
        Paths of the modules whose forward was changed and follows the plan now.
    """
    done = []
    found: dict[type, type] = {}  # what became of the last module of a class
    for path, arguments in calls.items():
        module = edits.model.get_submodule(path)
        kind = type(module)
        if not has_author(module):
            continue
        mark = edits.mark()
        try:
            if _Patcher(edits, path, replay, arguments).run(found.get(kind)):
                done.append(path)
                if _is_shared(type(module)):
                    found[kind] = type(module)
            else:
                edits.rollback(mark)
        except Exception as error:  # whatever the author's code raises: this module is left as it is
            log.info("no number could be changed in '%s': %s: %s", path, type(error).__name__, error)
            edits.rollback(mark)
    return done


def _is_shared(cls: type) -> bool:
    """Whether the replay sees all that a patched class does: which units of a table stay is each module's own."""
    return all(patch.kind != "kept" for patch in getattr(cls, "generated_patches", ()))


class _Patcher:
    """Patches one module."""

    def __init__(self, edits: Edits, path: str, replay: Replay, arguments: Arguments) -> None:
        self.edits, self.path, self.replay, self.arguments = edits, path, replay, arguments
        self.module = edits.model.get_submodule(path)
        self.dense = replay.first_call(path)

    def run(self, like: type | None = None) -> bool:
        """Patch until the module follows the plan; whether anything was patched.

        Args:
            like: the patched class that another module of this class follows the plan with, tried before others.

        Raises:
            NoSource: an op differs whose expression cannot be changed.
        """
        if like is not None and self._follows(like):
            return True
        before = -1
        self.edits.set_class(self.module, patched_class(type(self.module), ()))  # with a place for each expression
        for count in range(MAX_PATCHES):
            mismatch, frames = self._replay()
            try:
                if mismatch is None:
                    return count > 0
                if mismatch.op is None or mismatch.path != self.path or mismatch.index < before:
                    raise NoSource(f"{mismatch} is not mended here")
                before = mismatch.index
                patch = self._patch(mismatch, frames)
            finally:
                frames.clear()  # they hold their callers, this one among them
            log.debug("in '%s': %s", self.path, patch)
            self.edits.set_class(self.module, patched_class(type(self.module), (patch,)))
        raise NoSource(f"{MAX_PATCHES} changes did not make it follow")

    def _follows(self, cls: type) -> bool:
        """Make the module one of a class, if it then follows the plan."""
        mark = self.edits.mark()
        self.edits.set_class(self.module, cls)
        if self._replay()[0] is None:
            return True
        self.edits.rollback(mark)
        return False

    def _replay(self) -> tuple[Mismatch | None, Frames]:
        """Run the module alone and compare; where in the author's code the first mismatch arose.

        Where a constant differs, that is where the constant was made.
        """
        error = None
        args, kwargs = _call_arguments(self.module, self.arguments.values(self.replay.alignment.expected_shape))
        with (
            frozen_state(self.edits.model),
            torch.no_grad(),
            plain_kernels(),
            quiet(),
            self.arguments.fake,
        ):
            recorder = PlaceRecorder(self.edits.model, self.module)
            for i, (_, tensor) in enumerate(tensors_in((args, kwargs))):
                recorder.add_input(tensor, f"x{i}")
            try:
                with recorder.module_paths(), recorder:
                    self.module(*args, **kwargs)
            except Exception as raised:  # compared below
                error = raised
        if error is None:
            recorder.drop_unread()
        else:
            recorder.mark_unread()
        try:
            mismatch = self.replay.compare(recorder.graph, error, recorder.last_path, self.dense, self.path)
            if mismatch is not None and mismatch.got is not None:
                constant = self.replay.maker(mismatch.got, mismatch.actual)
                return mismatch, recorder.frames.get(constant or mismatch.got, [])
            return mismatch, [] if error is None else recorder.raised_at(error)
        finally:  # both hold frames, which hold their callers, this one among them
            recorder.frames, error = {}, None

    def _patch(self, mismatch: Mismatch, frames: Frames) -> Patch:
        """What to change for a mismatch."""
        want, cls = mismatch.op, type(self.module)
        assert want is not None
        if not frames:
            raise NoSource(f"{mismatch} does not arise in its forward")
        made_anew = isinstance(mismatch.wanted, Tensor)
        for cut in () if made_anew else self.replay.alignment.cuts_at(want):
            patch = self._cut(want, cut, frames)
            if patch not in getattr(cls, "generated_patches", ()):
                return patch
        place = place_of(cls, [(frame.code, frame.instruction) for frame in frames])
        expression = expression_at(cls, place)
        shapes = self.replay.shapes[want]
        name = _name(expression)
        if made_anew:
            return self._constant(place, expression, mismatch.wanted)
        check = None if mismatch.got is not None else check_at(cls, place)
        if check is not None:  # the author's own, of sizes that are as planned
            place, test = check
            sizes, planned = (frames[0].evaluate([part]) for part in (test.comparators[0], test.left))
            return Patch(place, "sizes", 0, self._ratios(ast.unparse(test), sizes, planned))
        if name == "scaled_dot_product_attention":
            ops = self.dense[self.dense.index(want) :]
            return Patch(place, "argument", "scale", attention_scale(ops))
        if name in _SIZED and isinstance(expression, ast.Call) and not isinstance(mismatch.wanted, (int, float)):
            method, function = _SIZED[name]
            before = function if self._is_function(place, expression) else method
            if before is None or any(k.arg in ("size", "shape", "sizes") for k in expression.keywords):
                raise NoSource(f"sizes of {name} cannot be changed")
            if mismatch.got is not None:
                sizes = _sizes_of(mismatch.got)
            else:
                sizes = frames[0].evaluate(_sizes_in(expression, before))
                shapes = self.replay.shapes[self._raised(want, sizes)]
            return Patch(place, "sizes", before, self._ratios(name, sizes, shapes[0] or ()))
        if name in ("split", "split_with_sizes", "tensor_split", "chunk") and isinstance(expression, ast.Call):
            return self._split(place, expression, want, shapes)
        if name == "arange" and isinstance(expression, ast.Call) and len(expression.args) == 1 and shapes[0]:
            return Patch(place, "argument", 0, shapes[0][0])
        if isinstance(expression, ast.Subscript) and mismatch.got is not None:
            return self._bounds(place, expression, want, mismatch.got, frames[0])
        scalars = self.replay.numbers(want)
        if len(scalars) == 1 and mismatch.got is not None and want.target is mismatch.got.target:
            names = [name for _, name, _ in number_arguments(want.target)]
            given = expression.keywords if isinstance(expression, ast.Call) else []
            named = next((k.arg for k in given if k.arg in names), None)
            return Patch(place, "number", named or "", (*scalars, *self.replay.numbers(mismatch.got)))
        if isinstance(mismatch.wanted, (int, float)) and isinstance(expression, ast.Call):
            at = _argument(expression, frames[0], mismatch.actual)
            return Patch(place, "number", at, (mismatch.wanted, mismatch.actual))
        raise NoSource(f"'{ast.unparse(expression)}' does not make {mismatch.wanted} of {want.target}")

    def _raised(self, want: fx.Node, sizes: Sequence[int]) -> fx.Node:
        """The dense op of a call that raised: the one that was compared next, or a reshape before it that did nothing.

        Sizes that do not change tell which: those are given already.
        """
        return next((op for op in (want, *self._idle(want)) if _agree(sizes, *self.replay.around(op)[0])), want)

    def _idle(self, want: fx.Node) -> Iterator[fx.Node]:
        """The dense ops right before one that do nothing in the compact model, the last first."""
        at, compared = self.dense.index(want), set(self.replay.dense(strict=True))
        return itertools.takewhile(lambda op: op not in compared, reversed(self.dense[:at]))

    def _cut(self, want: fx.Node, cut: tuple[int, int, int, tuple[int, ...]], frames: Frames) -> Patch:
        """Take the units of an operand that stay: in the expression of the op, or in the call that hands it on."""
        cls, (position, *value) = type(self.module), cut
        try:
            place = place_of(cls, [(frame.code, frame.instruction) for frame in frames])
        except NoSource:  # in a function that the forward does not name
            operand = frames[0].operand(position)
            for depth in range(1, len(frames)):
                outer = frames[depth:]
                at = outer[0].argument(operand)
                if at is not None:
                    place = place_of(cls, [(frame.code, frame.instruction) for frame in outer])
                    return Patch(place, "kept", at, tuple(value))
            raise
        expression = expression_at(cls, place)
        if _name(expression) == "scaled_dot_product_attention" and isinstance(expression, ast.Call):
            return Patch(place, "kept", 3 if len(expression.args) > 3 else "attn_mask", tuple(value))  # its only table
        if isinstance(expression, ast.Call) and not self._is_function(place, expression):
            position -= 1  # the first operand is the receiver
        return Patch(place, "kept", position, tuple(value))

    @staticmethod
    def _ratios(name: str, sizes: Sequence[int], planned: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        """Where a call's own sizes differ from the planned ones, and by which ratio."""
        if name == "unflatten":  # it reshapes, and its sizes stand inside those of the result
            raise NoSource("unflatten is not understood yet")
        if len(sizes) != len(planned):
            raise NoSource(f"{name} has {len(sizes)} sizes where {len(planned)} were expected")
        ratios = []
        for axis, (size, wanted) in enumerate(zip(sizes, planned, strict=True)):
            if size not in (wanted, -1, 0):
                common = math.gcd(wanted, size)
                ratios.append((axis, wanted // common, size // common))
        if not ratios:
            raise NoSource(f"the sizes of {name} are as planned")
        return tuple(ratios)

    def _split(
        self, place: Place, expression: ast.Call, want: fx.Node, shapes: Sequence[tuple[int, ...] | None]
    ) -> Patch:
        metas = want.meta["tensor"]
        dense = [m.shape for m in metas if m is not None]
        planned = [s for s in shapes if s is not None]
        axes = [i for i in range(len(dense[0])) if any(d[i] != p[i] for d, p in zip(dense, planned, strict=False))]
        if len(axes) != 1 or len(planned) != len(metas):
            raise NoSource("parts that nothing reads")
        sizes = tuple(s[axes[0]] for s in planned)
        before = 1 if self._is_function(place, expression) else 0
        return Patch(place, "parts", before, sizes)

    def _bounds(self, place: Place, expression: ast.Subscript, want: fx.Node, got: fx.Node, frame: Frame) -> Patch:
        """The planned bounds of a slice; those that count from the end, or say nothing, go on doing so."""
        whole = got.target is aten.alias.default  # so torch calls a slice that takes all there is
        if want.target is not aten.slice.Tensor:  # which it should do
            want = next((op for op in self._idle(want) if op.target is aten.slice.Tensor), want)
        if want.target is not aten.slice.Tensor or not (whole or got.target is want.target):
            raise NoSource(f"'{ast.unparse(expression)}' is no slice")

        def bounds(one: ast.Slice) -> tuple[int, ...]:
            written = zip((one.lower, one.upper, one.step), _ALL, strict=True)
            return tuple(default if part is None else frame.evaluate([part])[0] for part, default in written)

        slices = {at: bounds(one) for at, one in slices_of(expression).items()}
        given = tuple(Op(got).arg(name) for name in ("start", "end", "step"))
        found = [at for at, one in slices.items() if (one != _ALL if whole else one == given)]
        start, (shape,), source = self.replay.start(want), self.replay.shapes[want], self.replay.input_shape(want)
        if len(found) != 1 or start is None or shape is None or source is None or slices[found[0]][2] != 1:
            raise NoSource(f"'{ast.unparse(expression)}' does not tell which of its slices is at fault")
        axis = Op(want).arg("dim")
        size, stop = source[axis], start + shape[axis]
        first, last, _ = slices[found[0]]
        lower = start - size if first < 0 else start
        upper = (stop - size or None) if last < 0 else stop if last < sys.maxsize else None
        return Patch(place, "bounds", found[0], (lower, upper))

    @staticmethod
    def _constant(place: Place, expression: ast.expr | ast.stmt, wanted: Tensor) -> Patch:
        """Write what stays of a constant over the numbers that it is made of."""
        if _name(expression) not in _MAKE_CONSTANTS or not isinstance(expression, ast.Call) or not expression.args:
            raise NoSource(f"'{ast.unparse(expression)}' makes a constant in a way that is not understood")
        if wanted.numel() > MAX_NUMBERS or wanted.is_complex() or not bool(wanted.isfinite().all()):
            raise NoSource(f"a constant of shape {tuple(wanted.shape)} is not written down")
        return Patch(place, "argument", 0, _as_tuples(wanted.tolist()))

    def _is_function(self, place: Place, call: ast.Call) -> bool:
        """Whether a call's receiver is a module such as ``torch``, not a tensor."""
        receiver = call.func.value if isinstance(call.func, ast.Attribute) else call.func
        while isinstance(receiver, ast.Attribute):
            receiver = receiver.value
        if not isinstance(receiver, ast.Name):
            return False
        space = resolve(type(self.module), place.function).__globals__
        return isinstance(space.get(receiver.id), types.ModuleType) or not isinstance(call.func, ast.Attribute)


def _argument(call: ast.Call, frame: Frame, number: float) -> int | str:
    """The one argument of a call that is a number: its position, or its name.

    Raises:
        NoSource: none is, or several are.
    """
    given: list[tuple[int | str, ast.expr]] = [*enumerate(call.args), *((k.arg or "", k.value) for k in call.keywords)]
    plain = [(key, e) for key, e in given if key != "" and all(isinstance(n, _PLAIN) for n in ast.walk(e))]
    values = [(key, frame.evaluate([expression])) for key, expression in plain]
    found = [key for key, (value, *rest) in values if not rest and type(value) in (int, float) and value == number]
    if len(found) != 1:
        raise NoSource(f"{len(found)} arguments of '{ast.unparse(call)}' are {number}")
    return found[0]


def _sizes_in(call: ast.Call, before: int) -> list[ast.expr]:
    """The sizes among the arguments of a call, from a position on: a number that fills what is made follows them."""
    return call.args[before : before + 1] if _name(call) in FILLED else call.args[before:]


def _sizes_of(op: fx.Node) -> list[int]:
    """The sizes that a recorded call was given."""
    found = [a for a in op.args if isinstance(a, (list, tuple))]
    if not found:
        raise NoSource(f"{op.target} has no sizes")
    return [int(str(n)) for n in found[0]]


def _agree(sizes: Sequence[int], dense: Sequence[int] | None, planned: Sequence[int] | None) -> bool:
    """Whether sizes, of which -1 is any, are those of a shape wherever it stays as it is."""
    shapes = list(zip(sizes, dense or (), planned or (), strict=False))
    return len(sizes) == len(shapes) == len(dense or ()) and all(n in (m, -1) for n, m, p in shapes if m == p)


def _call_arguments(module: nn.Module, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, from values by name."""
    bound = inspect.signature(type(module).forward).bind_partial(module)
    bound.arguments.update(values)
    return bound.args[1:], bound.kwargs


def _as_tuples(value: Any) -> Any:
    """Nested lists as tuples, which cannot be changed."""
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list) else value


def _name(expression: ast.expr | ast.stmt) -> str:
    """The name of what a call calls."""
    if not isinstance(expression, ast.Call):
        return ""
    func = expression.func
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
