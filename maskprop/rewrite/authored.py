"""The author's functions as source: find an expression in one, and build a class in which expressions are changed.

A generated forward that is the author's own with a number changed keeps everything else that the author wrote: every
branch, every other argument, caches, decorators. What is changed is written down as :class:`Patch`, which is data: a
saved plan that holds patches holds no code.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import inspect
import linecache
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


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
        kind: ``"sizes"`` (the sizes of a call or a comparison are scaled), ``"argument"`` (one argument of a call is
            replaced), ``"parts"`` (an axis is split into parts of other sizes), ``"number"`` (the number that meets a
            tensor in an expression, or is an argument of a call, is replaced), ``"setting"`` (a number is read from a
            config, and another is wanted here), ``"root"`` (a root of a size stays that of another size), ``"kept"``
            (some units of an operand are taken) or ``"bounds"`` (of a slice in a subscript).
        at: sizes, argument and parts: how many arguments stand before; a name for a keyword argument, or of a setting;
            number: likewise, empty for what meets a tensor; kept: which operand, or the name of an argument; bounds:
            which of the indices.
        value: sizes: ``(axis, numerator, denominator)`` each; number: what comes in its place, and what it is now (the
            ratio holds for inputs of other sizes); root: ``(size, other size)`` each; kept:
            ``(axis, count, units)``; else what comes in its place.
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
            span = span_of(function, last)
            call = find(definition_of(function), span)
            names, sites = (*names, _called(call)), [*sites, span]
            function = resolve(cls, names)
            if identity(function.__code__) != identity(frame[0]):
                raise NoSource(f"{names[-1]} is not what is called there")
        last = frame
    return Place(names, tuple(sites), span_of(function, last), digest_of(cls, names))


def span_of(function: types.FunctionType, frame: tuple[types.CodeType, int]) -> Span:
    """Where in a function's source an instruction stands.

    Raises:
        NoSource: it does not tell.
    """
    code, instruction = frame
    if not hasattr(code, "co_positions"):
        raise NoSource("before Python 3.11 instructions do not tell where they stand")
    line = definition_of(function).lineno
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


def names_read(cls: type) -> frozenset[str]:
    """Names of attributes and globals in the methods of a class, but for its constructors."""
    methods = (plain_function(f) for kind in cls.__mro__ for name, f in vars(kind).items() if name != "__init__")
    codes = [method.__code__ for method in methods if method is not None]
    return frozenset(name for outer in codes for code in (outer, *_nested(outer)) for name in code.co_names)


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


def definition_of(function: types.FunctionType) -> ast.FunctionDef:
    """A function's source, parsed.

    Raises:
        NoSource: it cannot be found.
    """
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


def digest_of(cls: type, names: Sequence[str]) -> str:
    """Of the sources of a chain of functions: what a place was found in."""
    text = "".join(_text(resolve(cls, names[:n])) for n in range(1, len(names) + 1))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _text(function: types.FunctionType) -> str:
    definition = definition_of(function)
    lines = linecache.getlines(function.__code__.co_filename, function.__globals__)
    return "".join(lines[definition.lineno - 1 : definition.end_lineno])


def expression_at(cls: type, place: Place) -> ast.expr | ast.stmt:
    """The call, the arithmetic, the subscript or the setting that stands at a place.

    Raises:
        NoSource: neither stands there.
    """
    return find(definition_of(resolve(cls, place.function)), place.span)


def check_at(cls: type, place: Place) -> tuple[Place, ast.Compare] | None:
    """The comparison of sizes by which an author comes to raise what is made at a place, if that is how it is."""
    definition = definition_of(resolve(cls, place.function))
    made = find(definition, place.span)
    for node in ast.walk(definition):
        if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise) and node.body[0].exc is made:
            test = node.test
            if not isinstance(test, ast.Compare) or not isinstance(test.comparators[0], ast.Tuple):
                return None
            sized = ast.unparse(test.left).endswith((".size()", ".shape"))
            return (replace(place, span=_span(test, definition)), test) if sized else None
    return None


def _span(node: ast.expr, definition: ast.FunctionDef) -> Span:
    line = definition.lineno
    return node.lineno - line, node.col_offset, (node.end_lineno or 0) - line, node.end_col_offset or 0


def places_of_setting(cls: type, name: str) -> list[Place]:
    """Where a forward, and the methods that it calls, read a setting, such as ``config.heads``, of ``self``."""
    last = name.rpartition(".")[2]
    return [
        place
        for place, node in _expressions(cls)
        if isinstance(node, ast.Attribute) and node.attr == last and ast.unparse(node) == f"self.{name}"
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


@functools.lru_cache(maxsize=256)  # every layer of a model asks
def _expressions(cls: type) -> Sequence[tuple[Place, ast.expr]]:
    """The expressions of a forward, and of the methods that it calls, wherever they can be told apart."""

    def search(names: tuple[str, ...], sites: tuple[Span, ...]) -> Iterator[tuple[Place, ast.expr]]:
        try:
            definition = definition_of(resolve(cls, names))
        except NoSource:
            return  # what is called is no method
        digest = digest_of(cls, names)
        for node in ast.walk(definition):
            if isinstance(node, (ast.Attribute, ast.Call, ast.BinOp)):
                span = _span(node, definition)
                yield Place(names, sites, span, digest), node
                if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self.") and len(names) < 4:
                    yield from search((*names, ast.unparse(node.func)), (*sites, span))

    return list(search(("forward",), ()))


def find(definition: ast.FunctionDef, span: Span) -> ast.expr | ast.stmt:
    """The expression of a span.

    Raises:
        NoSource: there is none.
    """
    first, start, last, end = span
    exact: list[ast.expr | ast.stmt] = []
    for node in ast.walk(definition):
        if not isinstance(node, (ast.Call, ast.BinOp, ast.AugAssign, ast.Attribute, ast.Compare, ast.Subscript)):
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
