"""Trace one module's forward with ``torch.fx``, children as leaves, beside a run on fake tensors.

Every traced value has a concrete companion from the dense module, so that unpacking a shape, ``len`` and branches on
sizes work; sizes themselves stay symbolic in the graph, and the batch size stays free.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from maskprop.graph.trace import plain_kernels
from maskprop.rewrite.generated import update_cache

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class CannotTrace(Exception):
    """This module's forward cannot be traced."""


class _Companioned:
    """What a proxy can tell by its companion."""

    def __len__(self) -> int:
        return len(self.tracer.companion(self.node))  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[Any]:
        return self.tracer.iter(self)  # type: ignore[attr-defined, no-any-return]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})  # type: ignore[attr-defined]


class _Proxy(_Companioned, fx.Proxy):
    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)


class _Attribute(_Companioned, fx.proxy.Attribute):
    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)


class _Tracer(fx.Tracer):
    """``torch.fx`` with companions; see the module's docstring."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self._module, self._arguments = module, arguments
        self._variadic = variadic_name(module)
        self._values: dict[fx.Node, Any] = {}

    def companion(self, node: fx.Node) -> Any:
        return self._values[node]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        proxy: Any = obj
        return iter([proxy[i] for i in range(len(self._values[obj.node]))])

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = self._values[obj.node]
        if isinstance(value, Tensor):
            raise CannotTrace("it branches on a tensor's value")
        return bool(value)

    def keys(self, obj: fx.Proxy) -> Any:
        return list(self._values[obj.node].keys())

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        given: dict[str, Any] = {}
        for name, value in self._arguments.items():
            if name == self._variadic:
                whole: Any = None
                for key, one in value.items():
                    if is_plain(one):
                        given[key] = one
                        continue
                    whole = self.create_proxy("placeholder", name, (), {}) if whole is None else whole
                    given[key] = whole[key]
            else:
                given[name] = value if is_plain(value) else self.create_proxy("placeholder", name, (), {})
        return functools.partial(author_forward(self._module), **given), [self.root]

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        if kind == "call_method" and target == "update" and args[0].op == "placeholder":
            kind, target = "call_function", update_cache
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind == "placeholder":
            self._values[node] = self._arguments[target]
        elif kind != "output":
            self._values[node] = self._run(kind, target, args, kwargs)
        return node

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.node.map_arg((args, kwargs), self._values.__getitem__)
        if kind not in ("call_module", "get_attr"):
            return run_node(self._module, kind, target, args, kwargs)
        with _untraced():
            return run_node(self._module, kind, target, args, kwargs)


def run_node(module: nn.Module, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
    """What one fx node computes."""
    if kind == "call_module":
        return module.get_submodule(target)(*args, **kwargs)
    if kind == "call_function":
        return target(*args, **kwargs)
    if kind == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


class _untraced:
    """``torch.fx`` patches module calls and attribute look-ups while it traces; companions run without."""

    def __enter__(self) -> None:
        self._patched = nn.Module.__call__, nn.Module.__getattr__
        nn.Module.__call__, nn.Module.__getattr__ = _CALL, _GETATTR  # type: ignore[method-assign]

    def __exit__(self, *_: Any) -> None:
        nn.Module.__call__, nn.Module.__getattr__ = self._patched  # type: ignore[method-assign]


_CALL, _GETATTR = nn.Module.__call__, nn.Module.__getattr__


def is_plain(value: Any) -> bool:
    """A value that can stand in source code as it is, or a tuple of such."""
    if isinstance(value, tuple) and type(value) is tuple:
        return all(is_plain(v) for v in value)
    return isinstance(value, PLAIN)


def author_forward(module: nn.Module) -> Callable[..., Any]:
    """The function behind ``module.forward``: the class's, or a method that the author put on the object.

    Raises:
        CannotTrace: something else was put there.
    """
    own = vars(module).get("forward")
    if own is None:
        return type(module).forward
    if isinstance(own, MethodType) and own.__self__ is module and isinstance(own.__func__, FunctionType):
        return own.__func__
    raise CannotTrace(f"its forward was replaced by a {type(own).__name__}")


def variadic_name(module: nn.Module) -> str | None:
    """What the author calls ``**kwargs``, if the forward takes any."""
    parameters = inspect.signature(author_forward(module)).parameters.values()
    return next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)


def bind_arguments(module: nn.Module, call: tuple[Any, dict[str, Any]]) -> dict[str, Any]:
    """The arguments of a recorded call by the names of the author's signature, defaults included.

    Raises:
        CannotTrace: extra positional arguments were given, or there is no signature.
    """
    signature = inspect.signature(author_forward(module))
    bound = signature.bind(module, *call[0], **call[1])
    bound.apply_defaults()
    found = dict(list(bound.arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL and found.pop(name):
            raise CannotTrace(f"it is called with extra positional arguments {name}")
    return found


def trace_module(module: nn.Module, arguments: Mapping[str, Any]) -> fx.Graph:
    """Trace a dense module beside a run on fake tensors (under a ``FakeTensorMode`` of the caller's).

    Args:
        module: in its dense state.
        arguments: by name, with fake tensors.

    Raises:
        CannotTrace: its forward does something that cannot be written down.
    """
    before = set(vars(module))
    try:
        with torch.no_grad(), plain_kernels(), _symbolic_finfo(), _nothing_wrapped():
            graph = _Tracer(module, arguments).trace(module)
    finally:
        constants = [name for name in vars(module) if name not in before]
        for name in constants:  # fx leaves computed tensors on the module
            del module.__dict__[name]
    if constants:
        raise CannotTrace("it computes a tensor from values that are not traced")
    for node in reversed(graph.nodes):  # extra keyword arguments that nothing reads
        if node.target is operator.getitem and not node.users and node.args[0].op == "placeholder":
            graph.erase_node(node)
    return graph


@contextmanager
def _nothing_wrapped() -> Iterator[None]:
    """Trace through functions that their authors declared as leaves of any fx trace: sizes stand in them too."""
    wrapped = torch.fx._symbolic_trace._wrapped_fns_to_patch
    before = dict(wrapped)
    wrapped.clear()
    try:
        yield
    finally:
        wrapped.update(before)


@contextmanager
def _symbolic_finfo() -> Iterator[None]:
    """``torch.finfo(x.dtype)`` of a traced dtype becomes a node."""
    finfo = torch.finfo

    def symbolic(dtype: Any) -> Any:
        if isinstance(dtype, fx.Proxy):
            return dtype.tracer.create_proxy("call_function", finfo, (dtype,), {})
        return finfo(dtype)

    torch.finfo = symbolic  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.finfo = finfo  # type: ignore[misc]


def header(module: nn.Module, arguments: Mapping[str, Any]) -> str:
    """The ``def`` line of the author's signature, and a check of the arguments that the trace took for fixed."""
    parameters, checks = ["self"], []
    for name, parameter in list(inspect.signature(author_forward(module)).parameters.items())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            parameters.append(f"*{name}")
            checks.append((name, f"not {name}", "nothing"))
        elif parameter.kind is parameter.VAR_KEYWORD:
            parameters.append(f"**{name}")
            if not arguments[name]:
                checks.append((name, f"not {name}", "nothing"))
        else:
            if parameter.kind is parameter.KEYWORD_ONLY and not any(p.startswith("*") for p in parameters):
                parameters.append("*")
            default = parameter.default
            plain = isinstance(default, (bool, int, float, str, type(None)))
            parameters.append(name if default is parameter.empty or not plain else f"{name}={default!r}")
            value = arguments[name]
            if is_plain(value):
                test = f"{name} is {value!r}" if value is None or isinstance(value, bool) else f"{name} == {value!r}"
                checks.append((name, test, repr(value)))
            elif default is None and not hasattr(value, "update"):  # another branch of the author's may serve None
                checks.append((name, f"{name} is not None", "a tensor"))
    lines = [f"def forward({', '.join(parameters)}):"]
    for name, test, wanted in checks:
        lines.append(f"    if not ({test}):")
        lines.append(
            f"        raise ValueError('this forward was generated by maskprop for {name} = ' + {wanted!r} "
            "+ '; speed the model up with the value you need')"
        )
    return "\n".join(lines)
