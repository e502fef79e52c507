"""A subclass of an author's class in which expressions are changed: see :class:`maskprop.rewrite.authored.Patch`."""

from __future__ import annotations
import __future__

import ast
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from maskprop.graph.record import inserted_ops
from maskprop.rewrite.authored import (
    Chain,
    NoSource,
    Patch,
    Span,
    definition_of,
    digest_of,
    find,
    plain_function,
    resolve,
)

# -- what patched code calls --------------------------------------------------------------------


def scaled(changes: tuple[tuple[int, int, int], ...], *sizes: Any) -> tuple[Any, ...]:
    """Sizes with those at some axes times a ratio; -1 stays."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    found = list(sizes)
    for axis, numerator, denominator in changes:
        if found[axis] != -1:
            found[axis] = found[axis] * numerator // denominator
    return tuple(found)


def instead(number: float, made: float, value: Any, rooted: bool = False) -> Any:
    """Where ``forward`` makes one number, another; what it makes at other sizes, in proportion. What is none stays.

    ``rooted``: roots of sizes are changed already, so that the number may be right.
    """
    if value is None:
        return number
    if not _is_number(value):
        return value
    if value == made or not made or (rooted and value == number):
        return number
    product = value * number
    return product // made if isinstance(product, int) and product % made == 0 else product / made


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def dense_size(sizes: tuple[tuple[int, int], ...], size: Any) -> Any:
    """What a size was before it shrank; whatever else stays."""
    return dict(sizes).get(size, size) if type(size) is int else size


def dense_scale(sizes: tuple[tuple[int, int], ...], query: Tensor) -> float:
    """What ``scaled_dot_product_attention`` multiplies its scores by."""
    return float(dense_size(sizes, query.shape[-1]) ** -0.5)


def kept(axis: int, count: int, units: tuple[int, ...], value: Any) -> Any:
    """Some of every ``count`` units along an axis of a tensor; what is no tensor, or repeats one unit, stays."""
    if not isinstance(value, Tensor) or value.ndim < -axis or value.shape[axis] == 1:
        return value
    with nullcontext() if torch.compiler.is_compiling() else inserted_ops():
        places = torch.tensor(units, device=value.device)
        if value.shape[axis] == count:
            return value.index_select(axis, places)
        axis %= value.ndim
        return value.unflatten(axis, (-1, count)).index_select(axis + 1, places).flatten(axis, axis + 1)


_HELPERS: dict[str, Callable[..., Any]] = {
    "maskprop_scaled": scaled,
    "maskprop_instead": instead,
    "maskprop_dense_size": dense_size,
    "maskprop_dense_scale": dense_scale,
    "maskprop_kept": kept,
}


# Calls that take their sizes as one argument, before the number that fills what they make.
FILLED = ("full", "new_full")


# -- building -----------------------------------------------------------------------------------


def patched_class(base: type, patches: tuple[Patch, ...]) -> type:
    """A subclass of the author's class in which some expressions are changed.

    Args:
        base: the author's class, or one made here, whose patches come first; a setting is changed once.
        patches: in order.

    Raises:
        NoSource: an expression is not where the patches were made for.
    """
    new = {(p.place, p.at) for p in patches if p.kind == "setting"}
    before = [p for p in getattr(base, "generated_patches", ()) if (p.place, p.at) not in new]
    return _build(getattr(base, "generated_from", base), (*before, *patches))


def patched_settings(cls: type) -> dict[str, Any]:
    """The settings that a patched class reads otherwise than its config says."""
    return {str(p.at): p.value for p in getattr(cls, "generated_patches", ()) if p.kind == "setting"}


@functools.cache
def _build(base: type, patches: tuple[Patch, ...]) -> type:
    by_chain: dict[Chain, list[Patch]] = {(("forward",), ()): []}
    for patch in patches:
        names, sites = patch.place.chain
        if patch.place.digest != digest_of(base, names):
            raise NoSource(f"{'.'.join(names)} of {base.__name__} is not what its patches were made for")
        for n in range(1, len(names)):  # whoever calls a changed function changes too
            by_chain.setdefault((names[:n], sites[: n - 1]), [])
        by_chain.setdefault((names, sites), []).append(patch)
    rooted = any(patch.kind == "root" for patch in patches)
    built: dict[Chain, Any] = {}
    sources: list[str] = []
    for names, sites in sorted(by_chain, key=lambda chain: len(chain[0]), reverse=True):
        called = {s[-1]: f for (n, s), f in built.items() if n[:-1] == names and s[:-1] == sites}
        built[names, sites], source = _compile(base, names, by_chain[names, sites], called, rooted)
        sources.append(source)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return rebuild_patched, (base, patches), self.__dict__.copy()

    members = {
        "__doc__": f"{base.__name__} with a forward in which maskprop changed numbers that the author wrote.",
        "__module__": base.__module__,
        "__reduce_ex__": __reduce_ex__,
        "forward": built[("forward",), ()],
        "generated_from": base,
        "generated_patches": patches,
        "generated_text": "\n\n".join(reversed(sources)),
    }
    return type(base.__name__, (base,), members)


def rebuild_patched(base: type, patches: tuple[Patch, ...]) -> nn.Module:
    """An empty module of a patched class, for ``pickle``."""
    module: Any = object.__new__(_build(base, patches))
    assert isinstance(module, nn.Module)
    return module


def _compile(
    base: type, names: tuple[str, ...], patches: Sequence[Patch], called: Mapping[Span, Any], rooted: bool
) -> tuple[Any, str]:
    """A function with its patches, and its source. What it calls in changed form becomes a closure's variable."""
    original = resolve(base, names)
    definition = definition_of(original)
    made = copy.deepcopy(definition)
    for patch in patches:
        made = ast.fix_missing_locations(_Rewrite(made, patch, rooted).visit(made))
    changed = {f"maskprop_{i}": function for i, function in enumerate(called.values())}
    for name, site in zip(changed, called, strict=True):
        _redirect(find(made, site), name)
    for argument in ast.walk(made.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    made.returns = None
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    owner = next((b for b in base.__mro__ if names[-1].removeprefix("self.") in vars(b)), base)
    scope: dict[str, Any] = (
        {n: c.cell_contents for n, c in cells.items()} | {"__class__": owner} | _HELPERS | {**changed}
    )
    factory = ast.parse(f"def factory({', '.join(scope)}):\n    return {made.name}").body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body.insert(0, made)
    module = ast.fix_missing_locations(ast.Module([factory], []))
    flags = original.__code__.co_flags & __future__.annotations.compiler_flag
    local: dict[str, Any] = {}
    code = compile(module, original.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    exec(code, original.__globals__, local)
    function = local["factory"](**scope)
    bare = plain_function(function)
    if bare is not None:
        bare.__annotations__, bare.__qualname__ = original.__annotations__, original.__qualname__
    return function, ast.unparse(made)


def _redirect(call: ast.AST, name: str) -> None:
    """Let a call mean a changed copy of what it called."""
    assert isinstance(call, ast.Call)
    if isinstance(call.func, ast.Attribute):
        call.args.insert(0, call.func.value)
    call.func = ast.copy_location(ast.Name(name, ast.Load()), call.func)


class _Rewrite(ast.NodeTransformer):
    """Changes the expression of one patch."""

    def __init__(self, definition: ast.FunctionDef, patch: Patch, rooted: bool) -> None:
        self.patch, self.rooted = patch, rooted
        self.target = find(definition, patch.place.span)

    def visit(self, node: ast.AST) -> Any:
        node = self.generic_visit(node)
        if node is not self.target:
            return node
        patch = self.patch
        if patch.kind == "setting":
            node = _constant(patch.value)
        elif patch.kind == "number":
            if patch.at != "":
                self._set_number(node)
            elif isinstance(node, ast.BinOp):
                node.left, node.right = self._instead(node.left), self._instead(node.right)
            elif isinstance(node, ast.AugAssign):
                node.value = self._instead(node.value)
            elif isinstance(node, ast.Call):
                node.args = [self._instead(a) for a in node.args]
        elif patch.kind == "root":
            self._set_root(node)
        elif patch.kind == "kept":
            self._set_operand(node)
        elif patch.kind == "bounds":
            self._set_bounds(node)
        elif isinstance(node, ast.Call) and patch.kind == "argument":
            self._set_argument(node)
        elif isinstance(node, ast.Call) and patch.kind == "parts":
            self._set_parts(node)
        elif isinstance(node, ast.Compare):
            node.comparators = self._scaled(node.comparators)
        elif isinstance(node, ast.Call) and isinstance(patch.at, int):
            end = patch.at + 1 if ast.unparse(node.func).rpartition(".")[2] in FILLED else len(node.args)
            node.args[patch.at : end] = self._scaled(node.args[patch.at : end])
        return ast.copy_location(node, self.target)

    def _scaled(self, sizes: list[ast.expr]) -> list[ast.expr]:
        literals = [sizes[axis] if axis < len(sizes) else None for axis, _, _ in self.patch.value]
        if all(isinstance(size, ast.Constant) for size in literals):
            for axis, numerator, denominator in self.patch.value:
                sizes[axis] = _constant(ast.literal_eval(sizes[axis]) * numerator // denominator)
            return sizes
        return [ast.Call(ast.Name("maskprop_scaled", ast.Load()), [_constant(self.patch.value), *sizes], [])]

    def _set_argument(self, call: ast.Call) -> None:
        at, value = self.patch.at, _constant(self.patch.value)
        if isinstance(at, int):
            call.args[at] = value
        else:
            call.keywords = [k for k in call.keywords if k.arg != at] + [ast.keyword(at, value)]

    def _set_operand(self, node: ast.AST) -> None:
        at: Any = self.patch.at

        def some(value: ast.expr) -> ast.expr:
            return ast.Call(ast.Name("maskprop_kept", ast.Load()), [*map(_constant, self.patch.value), value], [])

        if isinstance(node, ast.BinOp) and at == 0:
            node.left = some(node.left)
        elif isinstance(node, ast.BinOp):
            node.right = some(node.right)
        elif isinstance(node, ast.AugAssign) and at == 1:
            node.value = some(node.value)
        elif isinstance(node, ast.Call) and isinstance(at, str):
            for keyword in node.keywords:
                if keyword.arg == at:
                    keyword.value = some(keyword.value)
        elif isinstance(node, ast.Call) and at == -1 and isinstance(node.func, ast.Attribute):
            node.func.value = some(node.func.value)
        elif isinstance(node, ast.Call) and 0 <= at < len(node.args):
            node.args[at] = some(node.args[at])
        else:
            raise NoSource("that operand cannot be changed")

    def _set_root(self, node: ast.AST) -> None:
        sizes = _constant(self.patch.value)
        if isinstance(node, ast.BinOp):
            node.left = ast.Call(ast.Name("maskprop_dense_size", ast.Load()), [sizes, node.left], [])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("scaled_dot_product_attention"):
            scale = ast.Call(ast.Name("maskprop_dense_scale", ast.Load()), [sizes, copy.deepcopy(node.args[0])], [])
            node.keywords.append(ast.keyword("scale", scale))
        elif isinstance(node, ast.Call):
            node.args[0] = ast.Call(ast.Name("maskprop_dense_size", ast.Load()), [sizes, node.args[0]], [])

    def _set_bounds(self, node: ast.AST) -> None:
        indices = slices_of(node)
        if self.patch.at not in indices:
            raise NoSource("no slice stands there")
        indices[self.patch.at].lower, indices[self.patch.at].upper = map(_constant, self.patch.value)

    def _set_parts(self, call: ast.Call) -> None:
        """``chunk(3, dim)`` or ``split(4, dim)`` becomes ``split((4, 4, 2), dim)``."""
        assert isinstance(self.patch.at, int)
        if isinstance(call.func, ast.Attribute):
            call.func.attr = "split"
        first = len(call.args) > self.patch.at
        call.args[self.patch.at : self.patch.at + first] = [_constant(self.patch.value)]
        call.keywords = [k for k in call.keywords if k.arg in ("dim", "input", "tensor")]

    def _set_number(self, call: ast.AST) -> None:
        assert isinstance(call, ast.Call)
        for i, value in enumerate(call.args):
            if i == self.patch.at:
                call.args[i] = self._instead(value)
        for keyword in call.keywords:
            if keyword.arg == self.patch.at:
                keyword.value = self._instead(keyword.value)

    def _instead(self, value: ast.expr) -> ast.expr:
        numbers = [_constant(number) for number in self.patch.value]
        if isinstance(value, ast.Constant):
            return numbers[0] if value.value is None or _is_number(value.value) else value
        rooted = [ast.keyword("rooted", _constant(True))] if self.rooted else []
        return ast.Call(ast.Name("maskprop_instead", ast.Load()), [*numbers, value], rooted)


def slices_of(node: ast.AST) -> dict[int | str, ast.Slice]:
    """The slices among the indices of a subscript, by position."""
    index = node.slice if isinstance(node, ast.Subscript) else None
    indices = index.elts if isinstance(index, ast.Tuple) else [index]
    return {i: one for i, one in enumerate(indices) if isinstance(one, ast.Slice)}


def _constant(value: Any) -> ast.expr:
    return ast.parse(repr(value), mode="eval").body
