"""Paths of modules, such as ``layer1.0.conv2``."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def lineage(path: str) -> Sequence[str]:
    """The module and its ancestors, the nearest first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def within(path: str, modules: Collection[str]) -> bool:
    """Whether a module or tensor is one of these modules, or inside one of them."""
    return bool(modules) and any(outer in modules for outer in lineage(path))
