"""Rules by family; importing this package fills the registry."""

from maskprop.infer.rules import contraction, joining, movement, norms, pointwise, reductions, spatial
from maskprop.infer.rules.registry import Rule, find_rule, register, register_rule, unregister_rule

__all__ = [
    "Rule", "contraction", "find_rule", "joining", "movement", "norms", "pointwise", "reductions", "register",
    "register_rule", "spatial", "unregister_rule",
]  # fmt: skip
