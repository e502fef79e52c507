"""Where a compact model first does something else than the plan expects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Mismatch:
    """The first op that is not what the plan expects.

    Attributes:
        index: progress: where the op stands among the dense ones.
        path: module path.
        op: the dense op, or ``None`` past the end.
        wanted, actual: shapes or scalar arguments.
        error: what ``forward`` raised there, if it did.
        got: the compact op, if there is one.
    """

    index: int
    path: str
    op: fx.Node | None
    wanted: Any
    actual: Any
    error: str = ""
    got: fx.Node | None = None

    def __str__(self) -> str:
        at = f"{self.op.target} in '{self.path}'" if self.op is not None else f"'{self.path}'"
        return f"{at}: expected {self.wanted}, got {self.actual}" + (f" ({self.error})" if self.error else "")
