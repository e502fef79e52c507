"""Random numbers in a forward pass that is to be compared.

A compact model draws fewer numbers than the masked one, where units that are drawn for left: noise on a hidden value,
dropout that is on in evaluation. The two can be compared on draws that do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from maskprop.graph.graph import Graph
from maskprop.infer.op import signature

Arguments = dict[str, Any]

# A number that each distribution may give, none of them zero, by the arguments of the op.
_TYPICAL: dict[str, Callable[[Arguments], Any]] = {
    "bernoulli": lambda a: a.get("p", a["self"]),
    "rand": lambda a: 0.5,
    "rand_like": lambda a: 0.5,
    "randint": lambda a: (a.get("low", 0) + a["high"]) // 2,
    "randint_like": lambda a: (a.get("low", 0) + a["high"]) // 2,
    "uniform": lambda a: (a["from"] + a["to"]) / 2,
    "randn": lambda a: 1.0,
    "randn_like": lambda a: 1.0,
    "normal": lambda a: a["mean"] + a["std"],
    "exponential": lambda a: 1 / a["lambd"],
}


def draws(graph: Graph) -> bool:
    """Whether a recorded model draws random numbers."""
    return any(_is_random(n.target) for n in graph.ops)


class StillDraws(TorchDispatchMode):
    """Inside, each element that is drawn from a distribution is the same number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_random(func) and isinstance(result, Tensor):
            typical = _TYPICAL.get(func._schema.name.removeprefix("aten::").removesuffix("_functional").rstrip("_"))
            if typical is not None:
                names, defaults = signature(func)
                value = typical({**defaults, **dict(zip(names, args, strict=False)), **(kwargs or {})})
                result.copy_(value) if isinstance(value, Tensor) else result.fill_(value)
        return result


def _is_random(target: Any) -> bool:
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
