"""Seconds, bytes and clock rates of a call, on the CPU and on a GPU, and what it spends them on."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .machine import peak_memory

# ATen ops that FLOPs are counted of.
_PRODUCTS = re.compile("conv|mm|linear|scaled_dot_product|flash|attention")


def clocked(run: Callable[[], Any], device: str, seconds: float) -> float:
    """Seconds of a call, over about ``seconds`` of calls."""
    once = _elapsed(run, device, 1)
    return once if once >= seconds else _elapsed(run, device, max(1, min(1000, round(seconds / max(once, 1e-6)))))


def _elapsed(run: Callable[[], Any], device: str, times: int) -> float:
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - start) / times
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(times):
        run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / times


def memory_of(run: Callable[[], Any], device: str) -> int | None:
    """Bytes that one call takes at most on top of the model."""
    if device != "cuda":
        return peak_memory(run)[1]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def clocks() -> str | None:
    """Clocks of the GPU as they are now."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def share_of_products(run: Callable[[], Any], device: str) -> float:
    """Which part of a call's time goes into convolutions and matrix products, those ops that FLOPs are counted of."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    start = time.perf_counter()
    with profile(activities=activities) as profiled:
        while time.perf_counter() - start < 0.1:
            run()
    part = whole = 0.0
    for event in profiled.key_averages():
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        whole += spent
        part += spent if _PRODUCTS.search(event.key) else 0.0
    return part / whole
