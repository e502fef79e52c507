"""Functions that remember their results, ``functools.lru_cache``, where a model's own code finds them."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CellType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_Cached = type(functools.lru_cache(lambda: None))


@contextmanager
def caches_emptied(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No cache tells tensors inside, which a trace has to see made; afterwards none holds those, which may be fake.

    Caches of anything else in which nothing was put keep what they had.
    """
    caches = {id(c): c for c in _caches(modules)}
    for cache in caches.values():
        if cache.cache_info().currsize and _holds_tensors(cache):
            cache.cache_clear()
    misses = {key: cache.cache_info().misses for key, cache in caches.items()}
    try:
        yield
    finally:
        for key, cache in caches.items():
            if cache.cache_info().misses != misses[key]:
                cache.cache_clear()


def _holds_tensors(cache: Any) -> bool:
    """Whether a cache remembers tensors; what it holds is known to the garbage collector alone."""
    held = gc.get_referents(cache)
    held += [value for table in held if type(table) is dict for value in table.values()]
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(held))


def _caches(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """Those in the classes of modules, and in the files that define the classes; decorated or not."""
    classes = {c for kind in set(map(type, modules)) for c in kind.__mro__}
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
