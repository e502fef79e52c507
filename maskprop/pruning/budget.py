"""Prune until the model costs no more than it may: the ratios are scaled until the forecast fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from maskprop.errors import RatioError
from maskprop.pruning.structure import Cost

_STEPS = 16  # of bisection: the scale is exact to a 65,536th of its range


@dataclass(frozen=True)
class Budget:
    """What may be left at most, as a share of the dense model (a float up to 1) or as a number (an int).

    Attributes:
        parameters: parameter elements.
        flops: of a forward pass on the dummy input.
    """

    parameters: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("parameters", self.parameters), ("flops", self.flops)):
            fits = value is None or (0 < value <= 1 if isinstance(value, float) else value > 0)
            if not fits:
                raise RatioError(
                    f"{name} is {value!r}: what is left must be a float in (0, 1], a share of the dense model, or a "
                    "positive int, a number."
                )

    def allowed(self, dense: Cost, progress: float = 1.0) -> Cost:
        """The largest cost; with ``progress`` below 1, that far on the way from the dense model."""

        def of(limit: float | None, whole: int) -> int:
            if limit is None:
                return whole
            target = math.floor(limit * whole) if isinstance(limit, float) else limit
            return math.floor(whole - progress * (whole - min(target, whole)))

        return Cost(of(self.parameters, dense.parameters), of(self.flops, dense.flops))


def fit(
    allowed: Cost,
    choice: Callable[[float], Mapping[str, Tensor]],
    forecast: Callable[[Mapping[str, Tensor]], Cost],
    largest: float,
) -> Mapping[str, Tensor]:
    """The choice with the smallest scale of the ratios that costs no more than allowed.

    Args:
        allowed: the largest cost.
        choice: units to prune at a scale.
        forecast: what they would leave.
        largest: the largest scale.

    Raises:
        RatioError: not even the largest scale is enough.
    """

    def fits(chosen: Mapping[str, Tensor]) -> bool:
        cost = forecast(chosen)
        return cost.parameters <= allowed.parameters and cost.flops <= allowed.flops

    best = choice(largest)
    if not fits(best):
        least = forecast(best)
        raise RatioError(
            f"the budget of {allowed.parameters:,} parameters and {allowed.flops:,} FLOPs is out of reach: without all "
            f"that may be pruned, {least.parameters:,} and {least.flops:,} stay. Allow more, or prune more groups."
        )
    low, high = 0.0, largest
    for _ in range(_STEPS):
        middle = (low + high) / 2
        chosen = choice(middle)
        if fits(chosen):
            best, high = chosen, middle
        else:
            low = middle
    return best
