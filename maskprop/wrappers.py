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
    modules = modules_by_path(model)
    wrappers = {kind: cls.__name__ for kind in set(map(type, modules.values())) for cls in kind.__mro__
                if cls.__name__ in _PLAIN}  # fmt: skip
    for path, module in modules.items() if wrappers else ():
        name = wrappers.get(type(module))
        if name is not None:
            where = f"'{path}'" if path else "the model"
            return f"{where} is wrapped in {name}", _PLAIN[name]
    return None
