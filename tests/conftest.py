"""Every test: one thread, its own random generator, and the process as it found it."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from maskprop._torchvision import import_torchvision

import_torchvision()  # before timm and transformers, which import it on their own

torch.set_num_threads(1)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number that depends on the test's name alone, so that tests do not depend on their order."""
    return zlib.crc32(request.node.nodeid.encode())


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """The test's own random numbers."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, and give back what a test may have changed in the process."""
    python, numpy, dtype, grad = (
        random.getstate(),
        np.random.get_state(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
