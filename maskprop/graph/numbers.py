"""Numbers that ``forward`` reads from the model's own tensors while it is recorded on fake inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import _disable_current_modes


def number_of(node: fx.Node, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> int | float | bool | complex:
    """The number in a recorded value that depends on the model's own tensors only.

    Args:
        node: of a value with one element.
        state: the model's tensors by name.
        masks: of some of them; the number is the masked model's.

    Raises:
        DataDependentOutputException: it depends on an input, or a tensor holds no values.
    """
    cache: dict[fx.Node, Any] = {}

    def value(n: fx.Node) -> Any:
        if n not in cache:
            if n.op == "get_attr":
                name = str(n.target)
                cache[n] = state[name] * masks[name].to(state[name]) if name in masks else state[name]
            elif n.op == "placeholder":
                raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)
            else:
                assert callable(n.target)
                kwargs = {k: _real(v) for k, v in fx.node.map_arg(n.kwargs, value).items()}
                cache[n] = n.target(*fx.node.map_arg(n.args, value), **kwargs)
        return cache[n]

    with _disable_current_modes():
        result = value(node)
        assert isinstance(result, Tensor)
        if result.is_meta:
            raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)
        return result.item()


def _real(value: Any) -> Any:
    """An argument; in place of the meta device, one that holds values."""
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value
