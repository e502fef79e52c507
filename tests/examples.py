"""How many examples the property tests draw: a few in CI, more with ``MASKPROP_EXAMPLES=20`` (times as many)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("MASKPROP_EXAMPLES", "1"))


def examples(count: int) -> settings:
    """Settings for ``count`` examples, the same ones every time in CI."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
