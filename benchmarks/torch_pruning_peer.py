"""Torch-Pruning on one model, and whether what it leaves computes what the masked model does."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .zoo.check import masked_reference, relative_error, tensors
from .zoo.specimen import Inputs, call
from .zoo.structure import Masks

#: What Torch-Pruning did: module, whether its outputs were pruned, which of them.
History = list[tuple[str, bool, list[int]]]


def prune_by_torch_pruning(
    model: nn.Module, dummy: Inputs, ratio: float, *, heads: bool, layer_norms: bool
) -> tuple[int, float]:
    """Prune a model with Torch-Pruning by L1 norm.

    It is told what it cannot find: the number of heads, and which layer is the last.

    Args:
        model: is changed.
        dummy: its inputs.
        ratio: of every group.
        heads: prune whole heads by the same ratio, and set the attributes that count them, as Torch-Pruning's
            examples do; else heads stay.
        layer_norms: prune axes that a layer norm normalises over.

    Returns:
        Parameters that are left, and the relative L2 distance of the outputs to those of the masked model: the
        original with every parameter element that left set to zero.
    """
    original = copy.deepcopy(model)
    history = prune_told(model, dummy, ratio, heads=heads, layer_norms=layer_norms)
    reference = masked_reference(original, masks_of(original, dummy, history))
    with torch.no_grad():
        error = relative_error(call(model, dummy), call(reference, dummy))
    return sum(p.numel() for p in model.parameters()), error


def prune_told(
    model: nn.Module, dummy: Inputs, ratio: float, *, heads: bool, layer_norms: bool, seconds: float = 60
) -> History:
    """Prunes a model in place, as :func:`prune_by_torch_pruning` says, within seconds of processor time."""
    ignored = _last(model, dummy)
    if not layer_norms:  # they keep their whole groups
        ignored += [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    options = {"num_heads": _heads(model), "prune_num_heads": True, "prune_head_dims": False}
    options["head_pruning_ratio"] = ratio if heads else 0.0
    pruner = _prune(model, dummy, ratio, seconds, ignored_layers=ignored, **options)
    _count_heads(model, pruner.num_heads)
    history: History = pruner.pruning_history()
    return history


def prune_by_default(model: nn.Module, dummy: Inputs, ratio: float, *, seconds: float = 60) -> History:
    """Prunes a model in place, told of nothing but its last layer, within seconds of processor time."""
    history: History = _prune(model, dummy, ratio, seconds, ignored_layers=_last(model, dummy)).pruning_history()
    return history


def _prune(model: nn.Module, dummy: Inputs, ratio: float, seconds: float, **options: Any) -> Any:
    import torch_pruning as tp

    with _deadline(seconds):
        pruner = tp.pruner.MetaPruner(
            model,
            dummy,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            output_transform=_differentiable,
            **options,
        )
        pruner.step()
    return pruner


def masks_of(original: nn.Module, dummy: Inputs, history: History) -> Masks:
    """Which parameter elements of a model Torch-Pruning removed, from its history: 1 = left.

    The history is repeated on a twin whose parameters hold the position of each of their elements.
    """
    import torch_pruning as tp

    twin = copy.deepcopy(original).double()
    for parameter in twin.parameters():
        parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
    dummy = dummy.double() if isinstance(dummy, Tensor) and dummy.is_floating_point() else dummy
    graph = tp.DependencyGraph().build_dependency(twin, dummy, output_transform=_differentiable)
    graph.load_pruning_history(history)
    kept = dict(twin.named_parameters())
    masks = {}
    for name, parameter in original.named_parameters():
        if kept[name].shape != parameter.shape:
            mask = torch.zeros(parameter.numel())
            mask[kept[name].detach().reshape(-1).long()] = 1
            masks[name] = mask.reshape(parameter.shape)
    return masks


def _last(model: nn.Module, dummy: Inputs) -> list[nn.Module]:
    """The last linear or convolutional layer, where it makes the output."""
    with torch.no_grad():
        shape = tensors(call(model, dummy))[0].shape
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)][-1:]
    return [
        m for m in last if (m.out_features == shape[-1] if isinstance(m, nn.Linear) else m.out_channels == shape[1])
    ]


def has_heads(model: nn.Module) -> bool:
    """Whether there are heads to tell of."""
    return bool(_heads(model))


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Heads by the layers that make queries, keys and values."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        config = getattr(module, "config", None) if "Attention" in type(module).__name__ else None
        queries = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
        queries = queries if isinstance(queries, int) else getattr(config, "num_attention_heads", None)
        keys = getattr(config, "num_key_value_heads", None) or queries
        if queries is not None:
            for path, child in module.named_children():
                if isinstance(child, nn.Linear) and path in ("qkv", "query", "q_proj"):
                    found[child] = queries
                if isinstance(child, nn.Linear) and path in ("key", "value", "k_proj", "v_proj"):
                    found[child] = keys
    return found


def _count_heads(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """The attributes of timm's attention that hold the number of heads, and their width."""
    for module in model.modules():
        qkv = getattr(module, "qkv", None)
        if qkv in heads:
            module.num_heads, module.attn_dim = heads[qkv], qkv.out_features // 3


def _differentiable(output: Any) -> list[Tensor]:
    """The outputs that Torch-Pruning can trace back."""
    return [t for t in tensors(output) if t.requires_grad]


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"no end in {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
