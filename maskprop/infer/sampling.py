"""Random inputs for one op, and running it on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, fx

from maskprop.graph.randomness import generators_kept
from maskprop.infer.facts import Fact
from maskprop.infer.op import Op
from maskprop.infer.rules.registry import EAGER_LIMIT

Point = list[Tensor]  # one value for each input of an op


class Sampler:
    """Draws random inputs.

    Args:
        count: how many at a time, at least two.
        generator: where they come from.
    """

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count = max(2, count)
        self._generator = generator

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Normal numbers, float64."""
        return torch.randn(tuple(shape), generator=self._generator, dtype=torch.float64)

    def points(self, op: Op, facts: Sequence[Fact]) -> list[Point]:
        """Inputs that agree with the facts.

        Free numbers come from small to large, and in pairs of a point and its negative: an activation that is off
        in one is on in the other. Every second pair is of one sign, which tells an extremum from a sum.
        """
        found: list[Point] = []
        for k in range(self.count):
            scale = 10.0 ** (2.0 * (k // 2) / max(1, (self.count - 1) // 2) - 1.0)
            point: dict[fx.Node, Tensor] = {}
            for i, (node, fact) in enumerate(zip(op.inputs, facts, strict=True)):
                if not is_float(node):
                    free = torch.randint(0, 2, op.shapes[i], generator=self._generator)
                elif k % 2:  # the mirror image: an activation that is off there is on here
                    free = -found[-1][i]
                else:
                    free = self.normal(op.shapes[i]) * scale
                    free = free.abs() if k // 2 % 2 else free
                value = free if fact.nothing else torch.where(fact.known, fact.value().to(free.dtype), free)
                point.setdefault(node, value if is_float(node) else value.to(node.meta["tensor"].dtype))
            found.append([point[n] for n in op.inputs])
        return found

    def subsets(self, size: int) -> Iterator[Tensor]:
        """Random index sets to keep, neither empty nor full; each second one is the complement of the one before."""
        while True:
            keep = torch.zeros(size, dtype=torch.bool)
            count = int(torch.randint(1, max(2, size), (), generator=self._generator))
            keep[torch.randperm(size, generator=self._generator)[:count]] = True
            yield keep
            if not bool(keep.all()):
                yield ~keep


class Runner:
    """Runs an op on other inputs, in float64 if it takes that."""

    def __init__(self, op: Op, point: Point) -> None:
        if torch.Tag.nondeterministic_seeded in op.target.tags:
            raise ValueError("it draws random numbers")
        if any(x.is_complex() for x in point):
            raise ValueError("it takes complex numbers")
        if any(x.numel() > EAGER_LIMIT for x in point):
            raise ValueError("its inputs are too large for running it many times")
        self._op = op
        self._dtypes: list[torch.dtype | None] = [None] * len(op.inputs)
        if self.attempt(point) is None:
            self._dtypes = [n.meta["tensor"].dtype for n in op.inputs]
        first, again = self(point), self(point)
        if not equal(first, again):
            raise ValueError("it gives other numbers at each call")

    def __call__(self, point: Point) -> Point:
        """The results on a point."""
        found = self._op.run(
            *(x if dtype is None else x.to(dtype) for x, dtype in zip(point, self._dtypes, strict=True))
        )
        results = list(found) if self._op.several else [found]
        if not all(isinstance(r, Tensor) for r in results):
            raise ValueError("it does not return tensors alone")
        return results

    def attempt(self, point: Point) -> Point | None:
        """``None`` if the op does not take these."""
        try:
            return self(point)
        except Exception:  # whatever an op raises for shapes that do not fit
            return None


@contextmanager
def aside() -> Iterator[None]:
    """Leave no trace in the caller's modes, random numbers and warnings."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(generators_kept())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def is_float(node: fx.Node) -> bool:
    """Whether a value is of floating point."""
    return bool(node.meta["tensor"].dtype.is_floating_point)


def equal(a: Point, b: Point) -> bool:
    """Whether two lists of tensors are equal up to rounding."""
    return all(x.shape == y.shape and bool(close(x, y).all()) for x, y in zip(a, b, strict=True))


def close(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise equality up to rounding."""
    if not a.is_floating_point():
        return a == b
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 3e-2)
    size = a.abs().nan_to_num(0.0, 0.0, 0.0).max() if a.numel() else 1.0
    return torch.isclose(a, b, rtol=tolerance, atol=float(tolerance * size), equal_nan=True)


def same(results: Sequence[Tensor]) -> Tensor:
    """Where all are finite and equal."""
    first = results[0]
    found = first.isfinite() if first.is_floating_point() else torch.ones_like(first, dtype=torch.bool)
    for other in results[1:]:
        found = found & (other == first)
    return found
