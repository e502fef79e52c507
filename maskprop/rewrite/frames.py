"""Where in an author's code an op was called: the calls that were under way, and their variables."""

from __future__ import annotations

import ast
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

import maskprop
from maskprop.graph.record import Recorder
from maskprop.rewrite.authored import NoSource, definition_of, find, identity, plain_function, span_of

_NOT_AUTHORS = tuple(os.path.dirname(m.__file__ or "") + os.sep for m in (torch, maskprop))


def has_author(module: nn.Module) -> bool:
    """Whether the forward is not torch's own."""
    forward = plain_function(type(module).forward)
    return forward is not None and not forward.__code__.co_filename.startswith(_NOT_AUTHORS)


@dataclass(frozen=True)
class Frame:
    """A call of an author's function: which instruction of which code it is at, with the variables of that moment."""

    code: types.CodeType
    instruction: int
    frame: types.FrameType

    def evaluate(self, sizes: Sequence[ast.expr]) -> list[int]:
        """Sizes that stand in the code, as numbers."""
        if any(isinstance(part, (ast.Yield, ast.Await, ast.NamedExpr)) for size in sizes for part in ast.walk(size)):
            raise NoSource("its sizes cannot be evaluated twice")
        expression = ast.fix_missing_locations(ast.Expression(ast.Tuple([*sizes], ast.Load())))
        code = compile(expression, "<sizes>", "eval")
        value = eval(code, self.frame.f_globals, self.frame.f_locals)
        return list(value[0] if len(value) == 1 and isinstance(value[0], (tuple, list)) else value)

    def operand(self, position: int) -> Any:
        """The variable that is an operand of the arithmetic under way."""
        expression = self._expression()
        operands = [expression.left, expression.right] if isinstance(expression, ast.BinOp) else []
        names = [operand.id if isinstance(operand, ast.Name) else "" for operand in operands]
        if position >= len(names) or names[position] not in self.frame.f_locals:
            raise NoSource("the operand is no variable")
        return self.frame.f_locals[names[position]]

    def argument(self, value: Any) -> int | str | None:
        """Position or keyword of a variable among the arguments of the call under way."""
        call = self._expression()
        if not isinstance(call, ast.Call):
            return None
        for at, given in [*enumerate(call.args), *((k.arg, k.value) for k in call.keywords)]:
            if isinstance(given, ast.Name) and at is not None and self.frame.f_locals.get(given.id) is value:
                return at
        return None

    def _expression(self) -> ast.AST:
        function = types.FunctionType(self.code, self.frame.f_globals, closure=_cells(self.code))
        return find(definition_of(function), span_of(function, (self.code, self.instruction)))


Frames = list[Frame]


class PlaceRecorder(Recorder):
    """A recorder that notes where in the author's code each op was called."""

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        super().__init__(model, concrete=False)
        forward = plain_function(type(module).forward)
        if forward is None:
            raise NoSource("its forward is no function")
        self._forward = identity(forward.__code__)
        self.frames: dict[fx.Node, Frames] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        last = next(iter(reversed(self.graph.fx.nodes)), None)
        result = super().__torch_dispatch__(op, types, args, kwargs)
        frames: Frames | None = None
        for node in reversed(self.graph.fx.nodes):
            if node is last:
                break
            frames = self._running() if frames is None else frames
            self.frames[node] = frames
        return result

    def _running(self) -> Frames:
        """The author's calls that are under way."""
        found = []
        frame: types.FrameType | None = sys._getframe(2)
        while frame is not None:
            found.append(Frame(frame.f_code, frame.f_lasti, frame))
            frame = None if identity(frame.f_code) == self._forward else frame.f_back
        return self._authors(found)

    def raised_at(self, error: Exception) -> Frames:
        """The author's calls that an exception came out of."""
        found = []
        step = error.__traceback__
        while step is not None:
            found.append(Frame(step.tb_frame.f_code, step.tb_lasti, step.tb_frame))
            step = step.tb_next
        return self._authors(found[::-1])

    def _authors(self, frames: Frames) -> Frames:
        """From the innermost call that is the author's to the module's forward; empty if that is not running."""
        found: Frames = []
        for frame in frames:
            if found or not frame.code.co_filename.startswith(_NOT_AUTHORS):
                found.append(frame)
            if identity(frame.code) == self._forward:
                return found
        return []


def _cells(code: types.CodeType) -> tuple[types.CellType, ...]:
    return tuple(types.CellType() for _ in code.co_freevars)
