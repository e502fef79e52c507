"""Turn a PyTorch model with pruning masks into the same model, smaller.

`ModelSpeedup(model, dummy_input, masks).speedup_model()` returns the same module with the pruned units gone;
its outputs are those of the masked model. Everything but the version is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskprop.errors import MaskpropError, MaskpropWarning
    from maskprop.infer.rules import Rule, register_rule
    from maskprop.masks import Masks, load_masks, make_prune_permanent
    from maskprop.report import Report
    from maskprop.speedup import ModelSpeedup
    from maskprop.storage import load, save

__version__ = "0.1.0"

__all__ = [
    "MaskpropError",
    "MaskpropWarning",
    "Masks",
    "ModelSpeedup",
    "Report",
    "Rule",
    "__version__",
    "load",
    "load_masks",
    "make_prune_permanent",
    "register_rule",
    "save",
]

_HOME = {
    "Masks": "maskprop.masks",
    "MaskpropError": "maskprop.errors",
    "MaskpropWarning": "maskprop.errors",
    "ModelSpeedup": "maskprop.speedup",
    "Report": "maskprop.report",
    "Rule": "maskprop.infer.rules",
    "load": "maskprop.storage",
    "load_masks": "maskprop.masks",
    "make_prune_permanent": "maskprop.masks",
    "register_rule": "maskprop.infer.rules",
    "save": "maskprop.storage",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
