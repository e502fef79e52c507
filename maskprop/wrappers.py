"""Models inside of others: what wraps a model for several devices, or compiles it, keeps the sizes that it saw."""

from __future__ import annotations

from torch import nn

from maskprop.modules import modules_by_path

# Under these attributes the wrappers hold the plain model. By name, since importing them all takes seconds.
_PLAIN = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def find_wrapper(model: nn.Module) -> tuple[str, str] | None:
    """The first wrapped module in a model.

    Returns:
        Where it is (in words), in what it is wrapped and where the plain module is; ``None`` if there is none.
    """
    for path, module in modules_by_path(model).items():
        for cls in type(module).__mro__:
            if cls.__name__ in _PLAIN:
                where = f"'{path}'" if path else "the model"
                return f"{where} is wrapped in {cls.__name__}", _PLAIN[cls.__name__]
    return None
