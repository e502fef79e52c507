"""The models that are timed, and masks under which about half of each leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from maskprop._torchvision import import_torchvision

Masks = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A model to be timed.

    Attributes:
        build: makes it, in eval mode.
        inputs: one sample.
        masks: what is pruned, by ``"module.parameter"``; each mask broadcasts, so that it stays small.
        heads: where it has attention heads, which Torch-Pruning has to be told.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    masks: Callable[[nn.Module], Masks]
    heads: Heads | None = None


def image() -> torch.Tensor:
    """One image of ImageNet's size."""
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def text() -> dict[str, torch.Tensor]:
    """128 tokens."""
    return {"input_ids": torch.randint(1000, (1, 128), generator=torch.Generator().manual_seed(0))}


# --- masks ------------------------------------------------------------------------------------------------


def half(count: int) -> torch.Tensor:
    """1 for a random half of ``count`` units, the same for equal counts, so that layers that are added agree."""
    mask = torch.ones(count)
    mask[torch.randperm(count, generator=torch.Generator().manual_seed(count))[: count // 2]] = 0
    return mask


def channels(model: nn.Module) -> Masks:
    """Half of the rows and biases of every layer but the last; batch norms leave constants behind."""
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    masks: Masks = {}
    for name, module in layers[:-1]:
        masks.update(rows(name, module, half(module.weight.shape[0])))
    return masks


def rows(name: str, module: nn.Module, mask: torch.Tensor) -> Masks:
    """Masks of a layer's outputs; GPT-2's linear layer has them in the columns of its weight."""
    columns = type(module).__name__ == "Conv1D"
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    found = {f"{name}.weight": mask if columns else mask.reshape(-1, *[1] * (weight.ndim - 1))}
    if getattr(module, "bias", None) is not None:
        found[f"{name}.bias"] = mask
    return found


@dataclass(frozen=True)
class Heads:
    """Where a model has attention heads.

    Attributes:
        layers: pattern of the layers whose rows are heads.
        parts: 3 where a layer holds query, key and value.
        count: heads to halve in each; by default what the attention module says. For grouped queries, the number of
            key-value heads: whole groups leave.
    """

    layers: str
    parts: int = 1
    count: int | None = None

    def of(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
        """Path, layer and number of heads."""
        for name, module in model.named_modules():
            if re.search(self.layers, name):
                around = model.get_submodule(name.rpartition(".")[0])
                yield name, module, self.count or _said(module, around)

    def by_layer(self, model: nn.Module) -> dict[nn.Module, int]:
        """Heads of every layer: of grouped queries, more of the queries than of the keys."""
        found = [(layer, _width(layer) // self.parts, count) for _, layer, count in self.of(model)]
        dims = min(width // count for _, width, count in found)
        return {layer: width // dims for layer, width, _ in found}


def _said(*modules: nn.Module) -> int:
    """The number of heads that a module holds."""
    for module in modules:
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(getattr(module, name, None), int):
                return int(getattr(module, name))
    raise AttributeError(f"no number of heads in {type(modules[0]).__name__}")


def blocks(heads: Heads | None, mlp: str) -> Callable[[nn.Module], Masks]:
    """Half of the heads, and half of the units between two linear layers (``mlp``: pattern of those that widen)."""

    def make(model: nn.Module) -> Masks:
        masks: Masks = {}
        for name, module in model.named_modules():
            if re.search(mlp, name):
                masks.update(rows(name, module, half(_width(module))))
        for name, module, count in heads.of(model) if heads is not None else ():
            if isinstance(module, nn.MultiheadAttention):
                mask = half(count).repeat_interleave(module.head_dim).repeat(3)
                masks |= {f"{name}.in_proj_weight": mask[:, None], f"{name}.in_proj_bias": mask}
            else:
                dims = _width(module) // (count * heads.parts)  # type: ignore[union-attr]
                mask = half(count).repeat_interleave(dims).repeat(heads.parts)  # type: ignore[union-attr]
                masks.update(rows(name, module, mask))
        return masks

    return make


def _width(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[1 if type(layer).__name__ == "Conv1D" else 0]


# --- the models -------------------------------------------------------------------------------------------


def vision(name: str) -> Callable[[], nn.Module]:
    """A torchvision model with random weights."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = getattr(import_torchvision().models, name)(weights=None).eval()
        if name == "vit_b_16":  # its head is zero at first
            nn.init.normal_(model.heads.head.weight, std=0.02)  # type: ignore[union-attr, arg-type]
        return model

    return build


def bert() -> nn.Module:
    import_torchvision()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig()).eval()


def gpt2() -> nn.Module:
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(use_cache=False)).eval()


def llama(width: int, layers: int, heads: int, kv_heads: int, hidden: int, vocabulary: int) -> nn.Module:
    """A Llama with random weights in bfloat16, on torch's default device."""
    import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=hidden,
        vocab_size=vocabulary,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


LLAMA_1B = {"width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "hidden": 8192, "vocabulary": 32000}
LLAMA_70B = {"width": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "hidden": 28672, "vocabulary": 128256}
LLAMA_HEADS = Heads(r"self_attn\.[qkv]_proj$", count=8)
llama_masks = blocks(LLAMA_HEADS, r"mlp\.(gate|up)_proj$")


def _subjects() -> Iterator[tuple[str, Subject]]:
    for title, name in (
        ("ResNet-18", "resnet18"),
        ("ResNet-50", "resnet50"),
        ("ResNet-152", "resnet152"),
        ("VGG-16-BN", "vgg16_bn"),
        ("MobileNetV2", "mobilenet_v2"),
        ("DenseNet-121", "densenet121"),
        ("DenseNet-201", "densenet201"),
        ("EfficientNet-B0", "efficientnet_b0"),
    ):
        yield title, Subject(vision(name), image, channels)
    mlp = r"\.mlp\.0$"
    yield "ViT-B/16", Subject(vision("vit_b_16"), image, blocks(Heads(r"self_attention$", 3), mlp))
    swin = Heads(r"attn\.qkv$", 3)
    yield "Swin-T", Subject(vision("swin_t"), image, blocks(swin, mlp), swin)
    yield "ConvNeXt-T", Subject(vision("convnext_tiny"), image, blocks(None, r"block\.3$"))
    base = Heads(r"self\.(query|key|value)$")
    yield "BERT-base", Subject(bert, text, blocks(base, r"intermediate\.dense$"), base)
    yield "GPT-2", Subject(gpt2, text, blocks(Heads(r"attn\.c_attn$", 3), r"mlp\.c_fc$"))
    yield "Llama-1B", Subject(lambda: llama(**LLAMA_1B), text, llama_masks, LLAMA_HEADS)


SUBJECTS: dict[str, Subject] = dict(_subjects())
