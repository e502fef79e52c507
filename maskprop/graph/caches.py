"""Functions that remember their results, ``functools.lru_cache``, where a model's own code finds them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CellType
from typing import Any

from torch import nn

from maskprop.modules import modules_by_path

_Cached = type(functools.lru_cache(lambda: None))


@contextmanager
def caches_emptied(model: nn.Module) -> Iterator[None]:
    """Afterwards no cache holds what was computed inside, which may be fake tensors.

    Caches in which nothing was put keep what they had.
    """
    caches = {id(c): (c, c.cache_info().misses) for c in _caches(model)}
    try:
        yield
    finally:
        for cache, misses in caches.values():
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _caches(model: nn.Module) -> Iterator[Any]:
    """Those in the classes of a model's modules, and in the files that define the classes; decorated or not."""
    classes = {c for kind in set(map(type, modules_by_path(model).values())) for c in kind.__mro__}
    own = [c for c in classes if c.__module__.partition(".")[0] not in ("torch", "builtins")]
    files = {c.__module__: sys.modules[c.__module__] for c in own if c.__module__ in sys.modules}
    for home in (*own, *files.values()):
        for value in vars(home).values():
            found = getattr(value, "__func__", value) if isinstance(value, (staticmethod, classmethod)) else value
            around = [cell.cell_contents for cell in getattr(found, "__closure__", None) or () if _filled(cell)]
            yield from (one for one in (found, *around) if isinstance(one, _Cached))


def _filled(cell: CellType) -> bool:
    """Whether the variable has a value by now."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
