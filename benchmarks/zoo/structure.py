"""What the maskings need to know about a model, found by running it, not by its name.

A *layer* is a leaf that owns a weight with output units. One forward pass with hooks records the calls of
the layers and which norm reads which layer. Which rows belong to a head, or to a unit of an MLP, is found by
gradients: the rows that reach the removed features of a consumer's input, and none of the others. That works
for separate and fused q/k/v in any layout, grouped queries, gated units and tied layers alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .randomise import is_layer, is_transposed_linear
from .specimen import Inputs, call

Masks = dict[str, torch.Tensor]

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_q_heads")
_HEAD_DIMS = ("head_dim", "head_size", "attention_head_size", "dim_head", "key_dim")


def path(module: str, parameter: str) -> str:
    """``module.parameter``; the root module is ``""``."""
    return f"{module}.{parameter}" if module else parameter


@dataclass(frozen=True)
class Layer:
    """A leaf with a weight whose units can be masked."""

    name: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, nn.modules.conv._ConvTransposeNd)

    @property
    def parameter(self) -> str | None:
        """The parameter whose masked rows make zero rows of the weight; None where there is none."""
        if "weight" in self.module._parameters:
            return "weight"
        for name in ("original0", "original"):  # weight norm's magnitudes; any other parametrisation's input
            full = f"parametrizations.weight.{name}"
            parameter = dict(self.module.named_parameters()).get(full)
            if parameter is not None and parameter.shape[0] == self.width:
                return full
        return None

    @property
    def weight(self) -> torch.Tensor:
        return self.module.get_parameter(self.parameter or "weight")

    @property
    def width(self) -> int:
        """The number of output units."""
        if self.transposed:
            return self.module.out_channels
        return self.module.weight.shape[self._row_axis]

    @property
    def inputs(self) -> int:
        """The number of input units."""
        weight = self.module.weight
        if self.transposed or is_transposed_linear(self.module):
            return weight.shape[0]
        return weight.shape[1] * getattr(self.module, "groups", 1)

    @property
    def feature_axis(self) -> int:
        """Where the units lie in the layer's output and input."""
        return 1 if isinstance(self.module, nn.modules.conv._ConvNd) else -1

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product at each position."""
        if isinstance(self.module, nn.modules.conv._ConvNd):
            single = all(size == 1 for size in self.module.kernel_size)
            return single and self.module.groups == 1 and not self.transposed
        return not isinstance(self.module, nn.Embedding | nn.EmbeddingBag | nn.Bilinear)

    @property
    def _row_axis(self) -> int:
        embedding = isinstance(self.module, nn.Embedding | nn.EmbeddingBag)
        return 1 if embedding or is_transposed_linear(self.module) else 0

    def rows(self, removed: torch.Tensor, bias: bool = True) -> Masks:
        """Masks that prune output units, with or without their biases."""
        if self.parameter is None:
            return {}
        masks = {path(self.name, self.parameter): keep(self._rows_of(removed))}
        parameter = self.module._parameters.get("bias")
        if bias and parameter is not None and parameter.shape == removed.shape:
            masks[path(self.name, "bias")] = keep(removed)
        return masks

    def columns(self, removed: torch.Tensor) -> Masks:
        """Masks that prune what the layer reads of input units."""
        if self.parameter != "weight":
            return {}
        axis = 0 if self.transposed or is_transposed_linear(self.module) else 1
        shape = [1] * self.weight.ndim
        shape[axis] = -1
        return {path(self.name, "weight"): keep(removed.view(shape))}

    def _rows_of(self, removed: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if self.transposed:  # (in, out / groups, *kernel)
            groups = self.module.groups
            rows = removed.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
            return rows.view(*rows.shape, *[1] * (weight.ndim - 2))
        shape = [1] * weight.ndim
        shape[self._row_axis] = -1
        return removed.view(shape)


def keep(removed: torch.Tensor) -> torch.Tensor:
    """The mask that removes what is True."""
    return (~removed).float()


@dataclass(frozen=True)
class Call:
    """One call of a layer."""

    layer: Layer
    input: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class Site:
    """A consumer by its call's index, and how its input divides: into ``heads`` blocks, or units (0)."""

    index: int
    heads: int = 0

    @property
    def window(self) -> int:
        """How many layer calls back from the consumer its producers may lie."""
        return 8 if self.heads else 3


class Structure:
    """The layers of a model, the norms behind them, its attention sites and its MLP sites.

    Args:
        model: the model; run once, with gradients.
        inputs: what it is run with.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        self.layers = [Layer(name, module) for name, module in model.named_modules() if _has_units(module)]
        self.norms: dict[str, str] = {}
        self.calls = self._record(inputs)
        self.last = self.calls[-1].layer.name if self.calls else ""
        self.attention = list(self._attention_sites())
        consumers = {site.index for site in self.attention}
        self.mlps = [
            Site(index)
            for index, call in enumerate(self.calls)
            if index not in consumers and call.layer.pointwise and self._is_mlp(index)
        ]

    def _record(self, inputs: Inputs) -> list[Call]:
        """The last call of each layer, in order; fills ``norms``."""
        calls: dict[str, Call] = {}
        source: WeakIdKeyDictionary = WeakIdKeyDictionary()

        by_weight = {id(layer.module._parameters.get("weight")): layer for layer in self.layers}

        def note(layer: Layer, x: torch.Tensor, output: torch.Tensor) -> None:
            calls.pop(layer.name, None)
            calls[layer.name] = Call(layer, x, output)
            source[output] = layer

        def record(layer: Layer) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if args and isinstance(output, torch.Tensor):
                    note(layer, args[0], output)

            return hook

        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            """``F.linear``; some models apply a layer's weight without calling the layer."""
            output = plain_linear(x, weight, bias)
            if id(weight) in by_weight:
                note(by_weight[id(weight)], x, output)
            return output

        def pair(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                layer = source.get(args[0]) if args and isinstance(args[0], torch.Tensor) else None
                if layer is not None and layer.width == module.weight.numel():
                    self.norms[layer.name] = name

            return hook

        plain_linear = F.linear
        with ExitStack() as stack, torch.enable_grad(), mock.patch.object(F, "linear", linear):
            for layer in self.layers:
                stack.callback(layer.module.register_forward_hook(record(layer)).remove)
            for name, module in self.model.named_modules():
                weight = module._parameters.get("weight")
                if weight is not None and weight.ndim == 1 and not isinstance(module, nn.PReLU):
                    stack.callback(module.register_forward_pre_hook(pair(name)).remove)
            call(self.model, inputs)
        return list(calls.values())

    def _attention_sites(self) -> Iterator[Site]:
        position = {call.layer.name: index for index, call in enumerate(self.calls)}
        taken: set[int] = set()
        for container, module in self.model.named_modules():
            inside = [position[name] for name in position if container == "" or name.startswith(container + ".")]
            if not inside or not _names_heads(module):
                continue
            if any(_names_heads(child) for child in module.modules() if child is not module):
                continue
            best, most = None, 0.0
            for index in (*sorted(inside), max(inside) + 1):  # the projection may be the module's neighbour
                consumer = self.calls[index].layer if index < len(self.calls) else None
                heads = _count_heads(module, consumer) if consumer is not None and consumer.pointwise else 0
                site = Site(index, heads)
                if heads < 2 or index in taken:
                    continue
                rows = self.producers(site, self.first_heads(site, heads // 2))
                # Queries, keys and values serve heads: more rows than an MLP has for as many features.
                share = sum(int(row.sum()) for row in rows.values()) / self.consumer(site).inputs
                if share > most:
                    best, most = site, share
            if best is not None:
                taken.add(best.index)
                yield best

    def _is_mlp(self, index: int) -> bool:
        removed = torch.zeros(self.calls[index].layer.inputs, dtype=torch.bool)
        removed[::2] = True
        return bool(self.producers(Site(index), removed))

    def producers(self, site: Site, removed: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows that matter to removed features of a consumer's input alone.

        Args:
            site: the consumer.
            removed: bool, one entry a feature of the consumer's input.

        Returns:
            Layer name -> bool, one entry an output unit; layers without any such row are left out.
        """
        reached = self.reached(site, [removed, ~removed])
        return {name: gone & ~kept for name, (gone, kept) in reached.items() if (gone & ~kept).any()}

    def reached(self, site: Site, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Which rows of the layers before a consumer reach which parts of its input.

        Args:
            site: the consumer.
            parts: bool tensors, one entry a feature of the consumer's input.

        Returns:
            Layer name -> bool, (parts, output units).
        """
        consumer = self.calls[site.index]
        first = max(0, site.index - site.window)
        before = [c for c in self.calls[first : site.index] if c.output.requires_grad]
        features = consumer.input.movedim(consumer.layer.feature_axis, -1)
        if not before or not features.requires_grad or features.shape[-1] != parts[0].numel():
            return {}
        features = features * torch.rand(features.shape, generator=torch.Generator().manual_seed(0)).add(0.5)
        outputs = [c.output for c in before]
        try:
            gradients = [
                torch.autograd.grad(features[..., part].sum(), outputs, retain_graph=True, allow_unused=True)
                for part in parts
            ]
        except RuntimeError:  # reentrant checkpoints forbid it
            return {}
        return {
            c.layer.name: torch.stack([_reached(c, gradient) for gradient in row])
            for c, *row in zip(before, *gradients, strict=True)
            if c.output.shape[c.layer.feature_axis] == c.layer.width
        }

    def first_heads(self, site: Site, count: int) -> torch.Tensor:
        """The input features of a consumer's first heads."""
        return (torch.arange(site.heads) < count).repeat_interleave(self.consumer(site).inputs // site.heads)

    def consumer(self, site: Site) -> Layer:
        """The layer that reads a site."""
        return self.calls[site.index].layer

    def layer(self, name: str) -> Layer:
        """The layer of a name."""
        return next(layer for layer in self.layers if layer.name == name)


def _reached(call: Call, gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        return torch.zeros(call.layer.width, dtype=torch.bool)
    return gradient.movedim(call.layer.feature_axis, -1).flatten(0, -2).ne(0).any(0)


def _has_units(module: nn.Module) -> bool:
    kinds = nn.Embedding | nn.EmbeddingBag | nn.Bilinear
    return (is_layer(module) or isinstance(module, kinds)) and not isinstance(module, torch.jit.ScriptModule)


def _names_heads(module: nn.Module) -> bool:
    names = (*_HEAD_COUNTS, *_HEAD_DIMS)
    return any(isinstance(module.__dict__.get(name), int) for name in names)


def _count_heads(module: nn.Module, consumer: Layer) -> int:
    """The number of heads that a consumer reads, by an attribute of the attention module; 0 if unknown."""
    for name in _HEAD_COUNTS:
        heads = module.__dict__.get(name)
        if isinstance(heads, int) and heads > 0 and consumer.inputs % heads == 0:
            return heads
    for name in _HEAD_DIMS:
        dims = module.__dict__.get(name)
        if isinstance(dims, int) and dims > 0 and consumer.inputs % dims == 0:
            return consumer.inputs // dims
    return 0
