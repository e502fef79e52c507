"""Python's garbage collection, while a speedup runs and after it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class Garbage:
    """When to look for garbage.

    A trace makes many small objects; collections in between walk the whole process and take most of its time. So
    does the one that would follow at once: what was made counts as old instead. Python forgets to count what came to
    be old so, and would never collect it: that is counted here, and as in Python, a quarter more objects are enough.
    """

    share = 0.25

    def __init__(self) -> None:
        self.due = False
        self._made = 0
        self._limit = 0.0
        self._collected = _full_collections()

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """No collection inside."""
        enabled = gc.isenabled()
        if enabled and self.due and self._collected == _full_collections():
            gc.collect()
        if self._collected != _full_collections():  # by this, or by the caller since
            self.due, self._made, self._collected = False, 0, _full_collections()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                if not gc.get_freeze_count():  # what a caller froze stays frozen
                    self._made += gc.get_count()[0]
                    gc.freeze()
                    if self._made > self._limit:  # counting takes as long as a small model's trace
                        self._limit = self.share * gc.get_freeze_count()
                        self.due = self._made > self._limit
                    gc.unfreeze()
                gc.enable()


def _full_collections() -> int:
    """How many there have been in this process."""
    return int(gc.get_stats()[-1]["collections"])


GARBAGE = Garbage()
