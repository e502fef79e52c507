"""Every change to the model goes through here, so that all of them can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()


class Edits:
    """An undo log over a model.

    Parameters keep their identity (an optimiser or a tensor hook that holds one still does): only their data change.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._undo: list[Callable[[], None]] = []

    def mark(self) -> int:
        """A point to come back to."""
        return len(self._undo)

    def rollback(self, mark: int = 0) -> None:
        """Take back everything since ``mark``, the newest first."""
        while len(self._undo) > mark:
            self._undo.pop()()

    def set_data(self, tensor: Tensor, data: Tensor) -> None:
        """Give a parameter, buffer or tensor attribute other data; its gradient is dropped."""
        before, grad = tensor.data, tensor.grad

        def undo() -> None:
            tensor.grad = None
            tensor.data = before
            tensor.grad = grad

        self._undo.append(undo)
        tensor.grad = None
        tensor.data = data

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set a plain attribute of a module."""
        table = module.__dict__
        before = table.get(name, _ABSENT)

        def undo() -> None:
            if before is _ABSENT:
                table.pop(name, None)
            else:
                table[name] = before

        self._undo.append(undo)
        table[name] = value

    def set_parameter(self, module: nn.Module, name: str, value: nn.Parameter) -> None:
        """Register a parameter where there was none (a bias)."""
        before = module._parameters.get(name, _ABSENT)

        def undo() -> None:
            if before is _ABSENT:
                del module._parameters[name]
            else:
                module._parameters[name] = before  # type: ignore[assignment]

        self._undo.append(undo)
        module._parameters[name] = value

    def set_module(self, path: str, module: nn.Module) -> None:
        """Put another module at ``path``, and wherever else the old one is registered."""
        old = self.model.get_submodule(path)
        for parent in self.model.modules():
            for key, child in list(parent._modules.items()):
                if child is old:
                    self._undo.append(lambda p=parent, k=key: p._modules.__setitem__(k, old))  # type: ignore[misc]
                    parent._modules[key] = module

    def set_class(self, module: nn.Module, cls: type) -> None:
        """Turn a module into a generated subclass of its class."""
        before = module.__class__

        def undo() -> None:
            module.__class__ = before

        self._undo.append(undo)
        module.__class__ = cls

    def note(self, undo: Callable[[], None]) -> None:
        """Register a hand-made inverse."""
        self._undo.append(undo)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Module and key of a dotted tensor name."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter, buffer or tensor attribute by its dotted name."""
    module, key = owner_of(model, name)
    found = getattr(module, key)
    assert isinstance(found, torch.Tensor)
    return found
