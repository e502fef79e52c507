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

SECONDS = 60  # of processor time, after which it is taken not to end


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
    import torch_pruning as tp

    original, numbered = copy.deepcopy(model), _numbered(model)
    with _deadline():
        pruner = tp.pruner.MetaPruner(
            model,
            dummy,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            ignored_layers=_ignored(model, dummy, layer_norms),
            num_heads=_heads(model),
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=ratio if heads else 0.0,
            output_transform=_differentiable,
        )
        pruner.step()
    history = pruner.pruning_history()
    graph = tp.DependencyGraph().build_dependency(
        numbered,
        dummy.double() if isinstance(dummy, Tensor) else dummy,
        output_transform=_differentiable,
    )
    graph.load_pruning_history(history)
    _count_heads(model, pruner.num_heads)
    reference = masked_reference(original, _masks(original, numbered))
    with torch.no_grad():
        error = relative_error(call(model, dummy), call(reference, dummy))
    return sum(p.numel() for p in model.parameters()), error


def _numbered(model: nn.Module) -> nn.Module:
    """A twin whose parameters hold the position of each of their elements, which pruning carries along."""
    twin = copy.deepcopy(model).double()
    for parameter in twin.parameters():
        parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
    return twin


def _masks(original: nn.Module, numbered: nn.Module) -> dict[str, Tensor]:
    kept = dict(numbered.named_parameters())
    masks = {}
    for name, parameter in original.named_parameters():
        if kept[name].shape != parameter.shape:
            mask = torch.zeros(parameter.numel())
            mask[kept[name].detach().reshape(-1).long()] = 1
            masks[name] = mask.reshape(parameter.shape)
    return masks


def _ignored(model: nn.Module, dummy: Inputs, layer_norms: bool) -> list[nn.Module]:
    """The last layer; and, if their axes stay, the layer norms, which keep their whole groups."""
    with torch.no_grad():
        width = tensors(call(model, dummy))[0].shape[-1]
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    ignored: list[nn.Module] = [last] if last.out_features == width else []
    return ignored if layer_norms else ignored + [m for m in model.modules() if isinstance(m, nn.LayerNorm)]


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
def _deadline() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"no end in {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
