"""What a model's modules hold, read from their tables: asked often, and torch's nested generators add up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

TABLES = frozenset(vars(nn.Module()))


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


def own_tensors(module: nn.Module, bare: bool = False) -> dict[str, Tensor]:
    """A module's own parameters and buffers, none of its children's; with ``bare`` other tensors it holds, too."""
    return dict(_own(module, bare))


def _own(module: nn.Module, bare: bool) -> Iterator[tuple[str, Tensor]]:
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                yield name, tensor
    if bare:
        for name, value in vars(module).items():
            if name not in TABLES and isinstance(value, Tensor):
                yield name, value


def named_tensors(modules: Mapping[str, nn.Module], bare: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The modules' own tensors, see :func:`own_tensors`, under names that begin with the modules' paths."""
    for path, module in modules.items():
        dot = path + "." if path else ""
        for name, tensor in _own(module, bare):
            yield dot + name, tensor


def of_torch(kind: type[nn.Module]) -> bool:
    """Whether a module's forward is torch's own."""
    return str(getattr(kind.forward, "__module__", None)).startswith("torch.nn.modules.")  # made by exec, it has none
