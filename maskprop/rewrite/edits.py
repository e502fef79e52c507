"""Every change to the model goes through here, so that all of them can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT: Any = object()


class Edits:
    """An undo log over a model.

    Each entry is a *toggle*: called once it takes the change back, called again it makes it again. Parameters keep
    their identity (an optimiser or a tensor hook that holds one still does): only their data change.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._toggles: list[Callable[[], None]] = []

    def mark(self) -> int:
        """A point to come back to."""
        return len(self._toggles)

    def rollback(self, mark: int = 0) -> None:
        """Take back everything since ``mark``, the newest first."""
        while len(self._toggles) > mark:
            self._toggles.pop()()

    def commit(self) -> None:
        """Let go of what the model was before."""
        self._toggles.clear()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model as it was before any change, for a while."""
        for toggle in reversed(self._toggles):
            toggle()
        try:
            yield
        finally:
            for toggle in self._toggles:
                toggle()

    def set_data(self, tensor: Tensor, data: Tensor) -> None:
        """Give a parameter, buffer or tensor attribute other data; its gradient is dropped."""
        other: list[Any] = [data, None]

        def toggle() -> None:
            before = [tensor.data, tensor.grad]
            tensor.grad = None
            tensor.data, tensor.grad = other
            other[:] = before

        toggle()
        self._toggles.append(toggle)

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set a plain attribute of a module."""
        self._swap(module.__dict__, name, value)

    def set_parameter(self, module: nn.Module, name: str, value: nn.Parameter) -> None:
        """Register a parameter where there was none (a bias)."""
        self._swap(module._parameters, name, value)

    def drop_tensor(self, module: nn.Module, name: str) -> None:
        """Leave ``None`` in the place of a parameter or buffer."""
        self._swap(module._parameters if name in module._parameters else module._buffers, name, None)

    def set_module(self, path: str, module: nn.Module) -> None:
        """Put another module at ``path``, and wherever else the old one is registered."""
        old = self.model.get_submodule(path)
        for parent in list(self.model.modules()):
            for key, child in list(parent._modules.items()):
                if child is old:
                    self._swap(parent._modules, key, module)

    def set_class(self, module: nn.Module, cls: type) -> None:
        """Turn a module into one of another class; a forward on the object would hide the new one's."""
        other = [cls]
        if "forward" in vars(module):
            self._swap(module.__dict__, "forward", _ABSENT)

        def toggle() -> None:
            module.__class__, other[0] = other[0], module.__class__

        toggle()
        self._toggles.append(toggle)

    def _swap(self, table: dict[str, Any], name: str, value: Any) -> None:
        other = [value]

        def toggle() -> None:
            before = table.get(name, _ABSENT)
            if other[0] is _ABSENT:
                del table[name]
            else:
                table[name] = other[0]
            other[0] = before

        toggle()
        self._toggles.append(toggle)


def renew_gradients(parameter: Tensor) -> None:
    """Make autograd forget a parameter's old shape.

    Outputs from before, as long as they live, hold the node that accumulates its gradient, and that knows the shape
    that it had then. Torch makes a new node after a change of dtype.
    """
    data = parameter.data
    parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    parameter.data = data


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
