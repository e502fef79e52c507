"""Compact models, the same built natively thin, and whether both make the same calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .subjects import Subject

RATIO = 0.5


def compact(subject: Subject, multiple: int) -> nn.Module:
    """The model with half of its units gone, in multiples of ``multiple``."""
    from maskprop import ModelSpeedup
    from maskprop.pruning import L1NormPruner

    model = subject.build()
    inputs = subject.inputs()
    masks = L1NormPruner(model, RATIO, dummy_input=inputs, ignore=_heads(model), channel_multiple=multiple).update()
    return ModelSpeedup(model, inputs, masks, channel_multiple=multiple, verify=False).speedup_model()


def _heads(model: nn.Module) -> list[str]:
    """The last layer, whose rows are the classes."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]


def natively_thin(model: nn.Module) -> nn.Module:
    """The same architecture out of new modules of the compact sizes, with the same values."""
    thin = copy.deepcopy(model)
    thin.__dict__.pop("_maskprop_record", None)
    for name, module in list(thin.named_modules()):
        build = next((_BUILD[t] for t in type(module).__mro__ if t in _BUILD and type(module) is t), None)
        if build is None or not name:
            continue
        new = build(module).to(next(module.parameters()))
        new.load_state_dict(module.state_dict())
        parent, _, key = name.rpartition(".")
        setattr(thin.get_submodule(parent), key, new.train(module.training))
    return thin


def _conv(m: Any) -> nn.Module:
    return type(m)(
        m.in_channels,
        m.out_channels,
        m.kernel_size,
        m.stride,
        m.padding,
        dilation=m.dilation,
        groups=m.groups,
        bias=m.bias is not None,
        padding_mode=m.padding_mode,
    )


_BUILD: dict[type, Callable[[Any], nn.Module]] = {
    nn.Linear: lambda m: nn.Linear(m.in_features, m.out_features, m.bias is not None),
    nn.Conv2d: _conv,
    nn.BatchNorm2d: lambda m: nn.BatchNorm2d(m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats),
    nn.LayerNorm: lambda m: nn.LayerNorm(m.normalized_shape, m.eps, m.elementwise_affine, m.bias is not None),
    nn.Embedding: lambda m: nn.Embedding(m.num_embeddings, m.embedding_dim, m.padding_idx),
}


class _Calls(TorchDispatchMode):
    """Notes every ATen call: the op, and its arguments; of tensors shape, strides, dtype and alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments, _ = tree_flatten((args, kwargs or {}))
        self.made.append((str(func), [_seen(a) for a in arguments]))
        return func(*args, **(kwargs or {}))


def _seen(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return tuple(value.shape), value.stride(), value.dtype, value.data_ptr() % 64


def calls(run: Callable[[], Any]) -> list[tuple[str, list[Any]]]:
    """The ATen calls of one forward pass: where two models make the same ones, a clock cannot tell them apart."""
    with torch.no_grad(), _Calls() as noted:
        run()
    return noted.made
