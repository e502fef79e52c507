"""What a model's modules hold, read from their tables: asked often, and torch's nested generators add up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_TABLES = frozenset(vars(nn.Module()))


def modules_by_path(model: nn.Module, aliases: bool = False) -> dict[str, nn.Module]:
    """Every module under the first of its paths, in torch's order; with ``aliases`` under all of them."""
    found = {"": model}
    seen = {model}

    def visit(module: nn.Module, dot: str) -> None:
        for key, child in module._modules.items():
            if child is not None and (aliases or child not in seen):
                seen.add(child)
                found[dot + key] = child
                if child._modules:
                    visit(child, f"{dot}{key}.")

    visit(model, "")
    return found


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What was set on a module beside torch's own tables."""
    return {name: value for name, value in vars(module).items() if name not in _TABLES}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, none of its children's."""
    return {name: t for table in (module._parameters, module._buffers) for name, t in table.items() if t is not None}


def named_tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of all modules, under names that begin with the modules' paths."""
    for path, module in modules.items():
        dot = path + "." if path else ""
        for name, tensor in own_tensors(module).items():
            yield dot + name, tensor
