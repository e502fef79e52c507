"""The author's functions as source: find an expression in one, and build a class in which expressions are changed.

A generated forward that is the author's own with a number changed keeps everything else that the author wrote: every
branch, every other argument, caches, decorators. What is changed is written down as :class:`Patch`, which is data: a
saved plan that holds patches holds no code.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import hashlib
import inspect
import linecache
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn


class NoSource(Exception):
    """A function's source cannot be found, or cannot be changed."""


Span = tuple[int, int, int, int]
Chain = tuple[tuple[str, ...], tuple[Span, ...]]


@dataclass(frozen=True)
class Place:
    """An expression in a forward, or in a function that is called from there.

    Attributes:
        function: ``forward``, then the functions that lead from it to the one meant: ``self.name`` is a method.
        sites: where each of them calls the next: their spans.
        span: of the expression: first line, column, last line, column; lines are counted from the function's first.
        digest: of the functions' sources.
    """

    function: tuple[str, ...]
    sites: tuple[Span, ...]
    span: Span
    digest: str

    @property
    def chain(self) -> Chain:
        """The function as it is called there, and not elsewhere."""
        return self.function, self.sites


@dataclass(frozen=True)
class Patch:
    """One expression, changed.

    Attributes:
        place: where.
        kind: ``"sizes"`` (a call's sizes are scaled), ``"argument"`` (one argument of a call is replaced),
            ``"parts"`` (an axis is split into parts of other sizes), ``"number"`` (the number that meets a tensor in
            an expression is replaced), ``"setting"`` (a number is read from a config, and another is wanted here) or
            ``"root"`` (a root of a size stays that of another size).
        at: sizes, argument and parts: how many arguments stand before; a name for a keyword argument, or of a setting.
        value: sizes: ``(axis, numerator, denominator)`` each; root: ``(size, other size)`` each; else what comes in its
            place.
    """

    place: Place
    kind: str
    at: int | str
    value: Any

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Patch:
        """The reverse of :meth:`to_dict`."""
        place = data["place"]
        sites = _tuples(place["sites"])
        where = Place(tuple(place["function"]), sites, _tuples(place["span"]), place["digest"])
        return cls(where, data["kind"], data["at"], _tuples(data["value"]))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


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


def instead(number: float, value: Any) -> Any:
    """A tensor stays; a number becomes another."""
    return value if isinstance(value, Tensor) else number


def dense_size(sizes: tuple[tuple[int, int], ...], size: Any) -> Any:
    """What a size was before it shrank; whatever else stays."""
    return dict(sizes).get(size, size) if type(size) is int else size


def dense_scale(sizes: tuple[tuple[int, int], ...], query: Tensor) -> float:
    """What ``scaled_dot_product_attention`` multiplies its scores by."""
    return float(dense_size(sizes, query.shape[-1]) ** -0.5)


_HELPERS: dict[str, Callable[..., Any]] = {
    "maskprop_scaled": scaled,
    "maskprop_instead": instead,
    "maskprop_dense_size": dense_size,
    "maskprop_dense_scale": dense_scale,
}


# -- finding ------------------------------------------------------------------------------------


def identity(code: types.CodeType) -> tuple[str, int, str]:
    """What a function and its patched copies have in common."""
    return code.co_filename, code.co_firstlineno, code.co_name


def plain_function(value: Any) -> types.FunctionType | None:
    """The function below decorators and bindings."""
    value = inspect.unwrap(value.__func__ if isinstance(value, (staticmethod, classmethod)) else value)
    return value if isinstance(value, types.FunctionType) else None


def place_of(cls: type, frames: Sequence[tuple[types.CodeType, int]]) -> Place:
    """Where the instruction stands that a stack of calls ends in.

    Args:
        cls: of the module whose forward is the outermost frame.
        frames: code and last instruction, the innermost first.

    Raises:
        NoSource: the instruction stands in a function that ``cls`` does not reach by names.
    """
    names: tuple[str, ...] = ("forward",)
    sites: list[Span] = []
    function = resolve(cls, names)
    last = frames[-1]
    for frame in frames[-2::-1]:  # inwards
        inside = any(identity(frame[0]) == identity(code) for code in _nested(function.__code__))
        if not inside:
            span = _span(function, last)
            call = _find(_definition(function), span)
            names, sites = (*names, _called(call)), [*sites, span]
            function = resolve(cls, names)
            if identity(function.__code__) != identity(frame[0]):
                raise NoSource(f"{names[-1]} is not what is called there")
        last = frame
    return Place(names, tuple(sites), _span(function, last), _digest(cls, names))


def _span(function: types.FunctionType, frame: tuple[types.CodeType, int]) -> Span:
    """Where in a function's source an instruction stands."""
    code, instruction = frame
    if not hasattr(code, "co_positions"):
        raise NoSource("before Python 3.11 instructions do not tell where they stand")
    line = _definition(function).lineno
    first, last, start, end = list(code.co_positions())[instruction // 2]
    if first is None or last is None or start is None or end is None:
        raise NoSource(f"{code.co_name} does not tell where its instructions stand")
    return first - line, start, last - line, end


def _called(call: ast.AST) -> str:
    """The name of the author's function that a call means."""
    func = call.func if isinstance(call, ast.Call) else None
    if isinstance(func, ast.Name):
        return func.id
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == "self":
        return f"self.{func.attr}"
    raise NoSource("a function is called in a way that is not understood")


def _nested(code: types.CodeType) -> Iterable[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _nested(constant)


def resolve(cls: type, names: Sequence[str]) -> types.FunctionType:
    """The author's function that a chain of names means.

    Raises:
        NoSource: there is none.
    """
    author = getattr(cls, "generated_from", cls)
    found: types.FunctionType | None = None
    for i, name in enumerate(names):
        if i == 0 or name.startswith("self."):
            value = inspect.getattr_static(author, name.removeprefix("self."), None)
            bound = not isinstance(value, (staticmethod, classmethod, property))
            found = plain_function(value) if bound and callable(value) else None
        else:
            found = None if found is None else plain_function(found.__globals__.get(name))
    if found is None:
        raise NoSource(f"{author.__name__} has no function {'.'.join(names)}")
    return found


def _definition(function: types.FunctionType) -> ast.FunctionDef:
    filename, line, name = identity(function.__code__)
    text = "".join(linecache.getlines(filename, function.__globals__))
    for definition in _definitions(text):
        if definition.name == name and min([definition.lineno, *(d.lineno for d in definition.decorator_list)]) == line:
            return definition
    raise NoSource(f"the source of {name} cannot be found")


@functools.lru_cache(maxsize=64)
def _definitions(text: str) -> list[ast.FunctionDef]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    return [_Unroll().visit(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


# Columns between the copies of an unrolled expression.
_APART = 10_000


class _Unroll(ast.NodeTransformer):
    """``q, k, v = (f(t) for t in (q, k, v))`` becomes a tuple, so that each element has a place of its own."""

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        loop, target = node.value, node.targets[0]
        if not isinstance(loop, (ast.GeneratorExp, ast.ListComp)) or not isinstance(target, (ast.Tuple, ast.List)):
            return node
        one, *others = loop.generators
        items = one.iter.elts if isinstance(one.iter, (ast.Tuple, ast.List)) else []
        plain = all(isinstance(item, (ast.Name, ast.Attribute)) for item in items)
        if not items or not plain or others or one.ifs or one.is_async or not isinstance(one.target, ast.Name):
            return node
        copies = []
        for i, item in enumerate(items):
            element: ast.expr = _Substitute(one.target.id, item).visit(copy.deepcopy(loop.elt))
            for part in ast.walk(element):
                if isinstance(part, (ast.expr, ast.keyword)):
                    part.col_offset += i * _APART
                    part.end_col_offset = (part.end_col_offset or 0) + i * _APART
            copies.append(element)
        node.value = ast.copy_location(ast.Tuple(copies, ast.Load()), loop)
        return node


class _Substitute(ast.NodeTransformer):
    """Another expression in place of a variable."""

    def __init__(self, name: str, value: ast.expr) -> None:
        self.name, self.value = name, value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.copy_location(copy.deepcopy(self.value), node) if node.id == self.name else node


def _digest(cls: type, names: Sequence[str]) -> str:
    text = "".join(_text(resolve(cls, names[:n])) for n in range(1, len(names) + 1))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _text(function: types.FunctionType) -> str:
    definition = _definition(function)
    lines = linecache.getlines(function.__code__.co_filename, function.__globals__)
    return "".join(lines[definition.lineno - 1 : definition.end_lineno])


def expression_at(cls: type, place: Place) -> ast.expr | ast.stmt:
    """The call, the arithmetic or the setting that stands at a place.

    Raises:
        NoSource: neither stands there.
    """
    return _find(_definition(resolve(cls, place.function)), place.span)


def places_of_setting(cls: type, name: str) -> list[Place]:
    """Where a forward, and the methods that it calls, read a setting, such as ``config.heads``, of ``self``."""
    return [
        p for p, node in _expressions(cls) if isinstance(node, ast.Attribute) and ast.unparse(node) == f"self.{name}"
    ]


def roots_in(cls: type) -> list[Place]:
    """Where a forward, and the methods that it calls, take the root of a size, or leave that to torch's attention."""
    return [place for place, node in _expressions(cls) if _is_root(node)]


def _is_root(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Pow) and _may_be_size(node.left)
    if not isinstance(node, ast.Call) or not node.args:
        return False
    name = ast.unparse(node.func).rpartition(".")[2]
    if name == "scaled_dot_product_attention":
        scaled = len(node.args) > 6 or any(keyword.arg in ("scale", None) for keyword in node.keywords)
        return not scaled and isinstance(node.args[0], (ast.Name, ast.Attribute))
    return name in ("sqrt", "rsqrt") and _may_be_size(node.args[0])


def _may_be_size(node: ast.expr) -> bool:
    """``self.dims``, ``dims``, ``x.shape[-1]`` or ``x.size(-1)``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr == "size"
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
    return isinstance(node, (ast.Name, ast.Attribute))


def _expressions(cls: type) -> Iterator[tuple[Place, ast.expr]]:
    """The expressions of a forward, and of the methods that it calls, wherever they can be told apart."""

    def search(names: tuple[str, ...], sites: tuple[Span, ...]) -> Iterator[tuple[Place, ast.expr]]:
        try:
            definition = _definition(resolve(cls, names))
        except NoSource:
            return  # what is called is no method
        for node in ast.walk(definition):
            if isinstance(node, (ast.Attribute, ast.Call, ast.BinOp)):
                line = definition.lineno
                span = node.lineno - line, node.col_offset, (node.end_lineno or 0) - line, node.end_col_offset or 0
                yield Place(names, sites, span, _digest(cls, names)), node
                if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self.") and len(names) < 4:
                    yield from search((*names, ast.unparse(node.func)), (*sites, span))

    yield from search(("forward",), ())


def settings_of(cls: type) -> dict[str, Any]:
    """The settings that a patched class reads otherwise than its config says."""
    return {str(p.at): p.value for p in getattr(cls, "generated_patches", ()) if p.kind == "setting"}


def _find(definition: ast.FunctionDef, span: Span) -> ast.expr | ast.stmt:
    first, start, last, end = span
    exact: list[ast.expr | ast.stmt] = []
    for node in ast.walk(definition):
        if not isinstance(node, (ast.Call, ast.BinOp, ast.AugAssign, ast.Attribute)):
            continue
        if (node.end_lineno or 0) - definition.lineno != last or node.end_col_offset != end:
            continue
        # a call of a method over several lines is said to start at the method's name
        if (node.lineno - definition.lineno, node.col_offset) == (first, start):
            return node
        if isinstance(node, ast.Call):
            exact.append(node)
    if len(exact) != 1:
        raise NoSource(f"no call stands at line {first} of {definition.name}")
    return exact[0]


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


@functools.cache
def _build(base: type, patches: tuple[Patch, ...]) -> type:
    by_chain: dict[Chain, list[Patch]] = {(("forward",), ()): []}
    for patch in patches:
        names, sites = patch.place.chain
        if patch.place.digest != _digest(base, names):
            raise NoSource(f"{'.'.join(names)} of {base.__name__} is not what its patches were made for")
        for n in range(1, len(names)):  # whoever calls a changed function changes too
            by_chain.setdefault((names[:n], sites[: n - 1]), [])
        by_chain.setdefault((names, sites), []).append(patch)
    built: dict[Chain, Any] = {}
    sources: list[str] = []
    for names, sites in sorted(by_chain, key=lambda chain: len(chain[0]), reverse=True):
        called = {s[-1]: f for (n, s), f in built.items() if n[:-1] == names and s[:-1] == sites}
        built[names, sites], source = _compile(base, names, by_chain[names, sites], called)
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
    base: type, names: tuple[str, ...], patches: Sequence[Patch], called: Mapping[Span, Any]
) -> tuple[Any, str]:
    """A function with its patches, and its source. What it calls in changed form becomes a closure's variable."""
    original = resolve(base, names)
    definition = _definition(original)
    made = copy.deepcopy(definition)
    for patch in patches:
        made = ast.fix_missing_locations(_Rewrite(made, patch).visit(made))
    changed = {f"maskprop_{i}": function for i, function in enumerate(called.values())}
    for name, site in zip(changed, called, strict=True):
        _redirect(_find(made, site), name)
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

    def __init__(self, definition: ast.FunctionDef, patch: Patch) -> None:
        self.patch = patch
        self.target = _find(definition, patch.place.span)

    def visit(self, node: ast.AST) -> Any:
        node = self.generic_visit(node)
        if node is not self.target:
            return node
        patch = self.patch
        if patch.kind == "setting":
            node = _constant(patch.value)
        elif patch.kind == "number":
            if isinstance(node, ast.BinOp):
                node.left, node.right = self._instead(node.left), self._instead(node.right)
            elif isinstance(node, ast.AugAssign):
                node.value = self._instead(node.value)
            elif isinstance(node, ast.Call):
                node.args = [self._instead(a) for a in node.args]
        elif patch.kind == "root":
            self._set_root(node)
        elif isinstance(node, ast.Call) and patch.kind == "argument":
            self._set_argument(node)
        elif isinstance(node, ast.Call) and patch.kind == "parts":
            self._set_parts(node)
        elif isinstance(node, ast.Call) and isinstance(patch.at, int):
            node.args[patch.at :] = self._scaled(node.args[patch.at :])
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

    def _set_root(self, node: ast.expr) -> None:
        sizes = _constant(self.patch.value)
        if isinstance(node, ast.BinOp):
            node.left = ast.Call(ast.Name("maskprop_dense_size", ast.Load()), [sizes, node.left], [])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("scaled_dot_product_attention"):
            scale = ast.Call(ast.Name("maskprop_dense_scale", ast.Load()), [sizes, copy.deepcopy(node.args[0])], [])
            node.keywords.append(ast.keyword("scale", scale))
        elif isinstance(node, ast.Call):
            node.args[0] = ast.Call(ast.Name("maskprop_dense_size", ast.Load()), [sizes, node.args[0]], [])

    def _set_parts(self, call: ast.Call) -> None:
        """``chunk(3, dim)`` or ``split(4, dim)`` becomes ``split((4, 4, 2), dim)``."""
        assert isinstance(self.patch.at, int)
        if isinstance(call.func, ast.Attribute):
            call.func.attr = "split"
        first = len(call.args) > self.patch.at
        call.args[self.patch.at : self.patch.at + first] = [_constant(self.patch.value)]
        call.keywords = [k for k in call.keywords if k.arg in ("dim", "input", "tensor")]

    def _instead(self, value: ast.expr) -> ast.expr:
        number = _constant(self.patch.value)
        if isinstance(value, ast.Constant):
            return number
        return ast.Call(ast.Name("maskprop_instead", ast.Load()), [number, value], [])


def _constant(value: Any) -> ast.expr:
    return ast.parse(repr(value), mode="eval").body
