"""Is a generated forward from a file safe to run? It is if all it can do is call torch functions on tensors.

Saved plans are data, except for generated forwards, which are Python source. What maskprop generates is straight-line
code: guards of arguments, assignments of calls, and a return. Everything else is refused here, and so is any name that
leads out of torch.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Iterable
from typing import Any

import torch

from maskprop.rewrite.generated import Imports, update_cache

_NODES = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.AnnAssign, ast.Expr, ast.Return,
    ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Constant, ast.Tuple, ast.List, ast.Dict,
    ast.Subscript, ast.Slice, ast.Starred, ast.UnaryOp, ast.BinOp, ast.Compare,
    ast.If, ast.Raise, ast.BoolOp, ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip
_BUILTINS = {
    "getattr",
    "len",
    "min",
    "max",
    "int",
    "float",
    "bool",
    "abs",
    "round",
    "sum",
    "slice",
    "tuple",
    "list",
    "range",
}
# Tensor methods that lead away from tensors.
_METHODS = {
    "numpy", "storage", "untyped_storage", "typed_storage", "share_memory_", "apply_", "map_", "map2_",
    "data_ptr", "backward", "register_hook", "register_post_accumulate_grad_hook", "module_load",
    "grad_fn", "data",
}  # fmt: skip
_NAMES = {"torch", "math", "operator", "inf", "nan", "device", "NoneType", "ValueError"}


def names_in(source: str) -> set[str]:
    """The names that a source reads; none if it is not Python."""
    try:
        return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    except SyntaxError:
        return set()


def vet(source: str, imports: Imports, children: Iterable[str] = ()) -> str | None:
    """What is wrong with a generated forward, or ``None``.

    Args:
        source: Python source that defines ``forward``.
        imports: the names in it, each with the module and attribute that it stands for.
        children: names of the submodules that it may call.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return f"is not Python ({error.msg})"
    names = set(_NAMES)
    for name, (module, attribute) in imports:
        if not _is_harmless(module, attribute):
            return f"uses {module}.{attribute}" if attribute else f"uses the module {module}"
        names.add(name)
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef) or tree.body[0].decorator_list:
        return "is more than one function"
    callable_names = (set(dir(torch.Tensor)) - _METHODS) | set(children)
    for node in ast.walk(tree):
        complaint = _complaint(node, names, callable_names)
        if complaint:
            return complaint
    return None


def _complaint(node: ast.AST, names: set[str], methods: set[str]) -> str | None:
    if not isinstance(node, _NODES):
        return f"holds a {type(node).__name__} (line {getattr(node, 'lineno', 1)})"
    if isinstance(node, ast.Attribute):
        if node.attr.startswith("__") or node.attr in _METHODS:
            return f"reads .{node.attr}"
        path = _dotted(node)
        if path is not None and path.split(".")[0] in ("torch", "math", "operator"):
            module, _, attribute = path.rpartition(".")
            return None if _is_harmless(module, attribute) else f"uses {path}"
    return _complaint_of_call(node, names, methods) if isinstance(node, ast.Call) else None


def _complaint_of_call(node: ast.Call, names: set[str], methods: set[str]) -> str | None:
    """Only functions of torch, methods of tensors, and submodules are called."""
    func = node.func
    if isinstance(func, ast.Call) and isinstance(func.func, ast.Name) and func.func.id == "getattr":
        return None  # what it may get is checked where it stands
    if isinstance(func, ast.Name):
        if func.id == "getattr":
            wanted = node.args[1] if len(node.args) > 1 else None
            if (
                not isinstance(wanted, ast.Constant)
                or wanted.value not in methods
                or str(wanted.value).startswith("__")
            ):
                return "uses getattr for something that is neither a tensor's nor a submodule"
            return None
        return None if func.id in names | _BUILTINS else f"calls {func.id}"
    if isinstance(func, ast.Attribute):
        path = _dotted(func)
        in_torch = path is not None and path.split(".")[0] in ("torch", "math", "operator")
        return None if in_torch or func.attr in methods else f"calls .{func.attr}"
    return "calls the result of an expression"


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


@functools.cache
def _is_harmless(module: str, attribute: str) -> bool:
    """Whether a global is a function of tensors or numbers, or a torch type or namespace on the way."""
    if module == "builtins":
        return attribute in _BUILTINS
    if module in ("math", "operator", "_operator"):
        space: Any = math if module == "math" else operator
        return attribute == "" or (
            hasattr(space, attribute)
            and attribute not in ("attrgetter", "methodcaller")
            and not attribute.startswith("__")
        )
    if (module, attribute) == (update_cache.__module__, update_cache.__name__):  # of the cache that a caller passes
        return True
    if module.split(".")[0] != "torch":
        return False
    if not attribute:
        return module in ("torch", "torch.nn.functional")
    path = [*module.split(".")[1:], attribute]
    if path[0] == "ops":
        return len(path) < 2 or path[1] in ("aten", "prims")
    value: Any = torch
    for part in path:
        value = getattr(value, part, None)
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)) or value in (
        torch.device,
        torch.Size,
        torch.finfo,
        torch.iinfo,
    ):
        return True
    if value in (
        torch.nn,
        torch.nn.functional,
        torch.functional,
        torch._C,
        torch._C._nn,
        torch.special,
        torch.linalg,
        torch.fft,
        torch.ops,
        torch.ops.aten,
    ):
        return True
    return callable(value) and id(value) in _tensor_functions()


@functools.cache
def _tensor_functions() -> set[int]:
    """The functions of torch that take tensors: those that can be overridden, and those that make tensors."""
    overridable = torch.overrides.get_overridable_functions()
    functions = [f for space in overridable.values() for f in space]
    makers = [
        getattr(torch, n)
        for n in (
            "arange",
            "zeros",
            "ones",
            "full",
            "empty",
            "tensor",
            "eye",
            "linspace",
            "scalar_tensor",
            "tril_indices",
            "triu_indices",
        )
    ]
    checks = [torch._assert, torch.nn.functional.scaled_dot_product_attention]
    return {id(f) for f in [*functions, *makers, *checks]}
