"""What a benchmark ran on, and how much memory something takes."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

#: Small blocks are mapped and handed back one by one, so that the resident size says what is in use.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}

#: Freed memory stays with the process: large blocks come from the heap, too, and the heap is not handed back.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}


def describe() -> dict[str, Any]:
    """Processor, cores, memory and versions; the load says whether the machine was quiet."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(_memory() / 2**30, 1),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def sentence(machine: dict[str, Any]) -> str:
    """One line for a page."""
    busy = (machine["load"] or 0) > 0.5 * (machine["cores"] or 1)
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB; {machine['threads']} threads; "
        f"torch {machine['torch']}, Python {machine['python']}, {machine['system']}; {machine['date']}, load average "
        f"{machine['load']} at the start"
        + ("; others kept the machine busy, so only ratios mean something." if busy else ".")
    )


def version_of(distribution: str) -> str | None:
    """Version of an installed package, or ``None``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def peak_memory(run: Callable[..., T], *args: Any) -> tuple[T, int | None]:
    """Call ``run(*args)`` and say by how many bytes the resident memory rose at most.

    Only Linux can tell (``None`` elsewhere). Exact only in a process that was started with :data:`EXACT_MEMORY`.
    """
    if not Path("/proc/self/clear_refs").exists():
        return run(*args), None
    gc.collect()  # what earlier runs left would be handed back meanwhile
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    result = run(*args)
    return result, max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
