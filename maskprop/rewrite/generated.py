"""Generated subclasses: they pickle, deep-copy, compile, export and train like the author's class."""

from __future__ import annotations

import functools
import importlib
import math
import operator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn


def generated_class(base: type, source: str, objects: dict[str, Any]) -> type:
    """A subclass of ``base`` whose ``forward`` is ``source``.

    Args:
        base: the author's class.
        source: Python source that defines ``forward``.
        objects: what the global names in the source refer to; modules and importable functions.
    """
    addresses = {name: _address(value) for name, value in objects.items()}
    imports = tuple(sorted((name, address) for name, address in addresses.items() if address is not None))
    return build_class(base, source, imports)


def update_cache(cache: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """``cache.update(keys, values, ...)``; without a cache, the keys and values themselves."""
    if cache is None:
        return keys, values
    found: tuple[Tensor, Tensor] = cache.update(keys, values, *args, **kwargs)
    return found


Imports = tuple[tuple[str, tuple[str, str]], ...]


def build_class(base: type, source: str, imports: Imports) -> type:
    """As :func:`generated_class`, from names and where each is imported from: what a pickle or a saved plan holds."""
    return _build(getattr(base, "generated_from", base), source, imports)


@functools.cache
def _build(base: type, source: str, imports: Imports) -> type:
    scope: dict[str, Any] = {
        "torch": torch,
        "math": math,
        "operator": operator,
        "inf": math.inf,
        "nan": math.nan,
        "device": torch.device,
    }
    for name, (module, attribute) in imports:
        scope[name] = _find(module, attribute)
    exec(compile(source, f"<maskprop: forward of {base.__name__}>", "exec"), scope)
    forward = scope["forward"]
    assert isinstance(forward, FunctionType)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (base, source, imports), self.__dict__.copy()

    members = {
        "__doc__": f"{base.__name__} with a forward that maskprop generated, because the author's holds "
        "sizes as numbers.",
        "__module__": base.__module__,
        "__reduce_ex__": __reduce_ex__,
        "forward": forward,
        "generated_from": base,
        "generated_source": source,
        "generated_imports": imports,
    }
    return type(base.__name__, (base,), members)


def _rebuild(base: type, source: str, imports: Imports) -> nn.Module:
    module: Any = object.__new__(_build(base, source, imports))
    assert isinstance(module, nn.Module)
    return module


def _address(value: Any) -> tuple[str, str] | None:
    """Module and qualified name by which an object can be imported again."""
    if type(value).__name__ == "module":
        return value.__name__, ""
    module, name = (
        getattr(value, "__module__", None),
        getattr(value, "__qualname__", getattr(value, "__name__", None)),
    )
    if value is None or not isinstance(module, str) or not isinstance(name, str):
        return _by_search(value)
    try:
        return (module, name) if _find(module, name) is value else _by_search(value)
    except (AttributeError, ImportError):
        return _by_search(value)


def _by_search(value: Any) -> tuple[str, str] | None:
    """Built-in functions do not say where they live; look in torch's public namespaces."""
    name = getattr(value, "__name__", None)
    for module in (
        "torch",
        "torch.nn.functional",
        "torch._C._nn",
        "torch._C._special",
        "operator",
        "math",
        "builtins",
    ):
        if isinstance(name, str) and getattr(_find(module, ""), name, None) is value:
            return module, name
    return None


def _find(module: str, name: str) -> Any:
    value: Any = (
        importlib.import_module(module)
        if module not in ("torch._C._nn", "torch._C._special")
        else functools.reduce(getattr, module.split(".")[1:], torch)
    )
    for part in name.split(".") if name else []:
        value = getattr(value, part)
    return value
