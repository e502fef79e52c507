"""Random numbers that the caller does not notice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def generators_kept(seed: int | None = None) -> Iterator[None]:
    """Afterwards the global generators of torch, NumPy and Python are as they were, whatever drew from them inside.

    With a ``seed`` they start from it, so that two runs draw the same. Not to be entered under a mode that makes
    tensors fake: the state is a tensor.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
