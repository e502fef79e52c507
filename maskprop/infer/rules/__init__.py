"""Rules by family; importing this package fills the registry."""

from maskprop.infer.rules import (
    convolution,
    draws,
    gated,
    grouped,
    joining,
    lookup,
    matmul,
    movement,
    norms,
    pointwise,
    reductions,
    scatter,
    spatial,
    spectral,
)
from maskprop.infer.rules.registry import (
    Rule,
    find_rule,
    register,
    register_rule,
    registered,
    unregister_rule,
)

__all__ = [
    "Rule", "convolution", "draws", "find_rule", "gated", "grouped", "joining", "lookup", "matmul", "movement", "norms",
    "pointwise", "reductions", "register", "register_rule", "registered", "scatter", "spatial", "spectral",
    "unregister_rule",
]  # fmt: skip
