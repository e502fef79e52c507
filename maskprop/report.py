"""What a speedup did."""

from __future__ import annotations

from dataclasses import dataclass, field

from maskprop.align.plan import Plan
from maskprop.rewrite.verify import Check


@dataclass
class Report:
    """Filled while a speedup runs."""

    seconds: dict[str, float] = field(default_factory=dict)
    plan: Plan | None = None
    check: Check | None = None
