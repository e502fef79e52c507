"""Functions of torch in whose place others stand for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

Function = Callable[..., Any]

# Methods that give Python what a tensor holds, and call no op for it.
_READERS = ("tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "storage")


@contextmanager
def wrapped(home: Any, name: str, wrap: Callable[[Function], Function]) -> Iterator[None]:
    """Another function in the place of a module's or class's; one that a class inherits is hidden meanwhile."""
    own = vars(home).get(name)
    setattr(home, name, wrap(getattr(home, name)))
    try:
        yield
    finally:
        delattr(home, name) if own is None else setattr(home, name, own)


@contextmanager
def noting_readers(note: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell which tensors Python reads where no op shows it."""

    def noting(method: Function) -> Function:
        @functools.wraps(method)
        def reader(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            note(tensor)
            return method(tensor, *args, **kwargs)

        return reader

    with ExitStack() as stack:
        for name in _READERS:
            stack.enter_context(wrapped(Tensor, name, noting))
        yield
