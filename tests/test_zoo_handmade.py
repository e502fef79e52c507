"""Every handmade model under every masking: equal to the masked model, smaller, and as small as by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import nn

from benchmarks.zoo.check import Result, check_specimen, count_parameters
from benchmarks.zoo.handmade import HANDMADE
from benchmarks.zoo.maskings import MASKINGS, make_masks
from benchmarks.zoo.randomise import randomise
from benchmarks.zoo.structure import Masks


def built(name: str) -> nn.Module:
    specimen = HANDMADE[name]
    torch.manual_seed(0)
    return randomise(specimen.build().eval(), specimen.inputs())


@lru_cache
def all_masks(name: str) -> dict[str, Masks]:
    return make_masks(built(name), HANDMADE[name].inputs(), full=True)


def checked(name: str, masks: Masks) -> Result:
    result = check_specimen(HANDMADE[name], built(name), masks, tolerance=1e-5)
    assert result.outcome == "exact", result.detail
    return result


# Where nothing can leave, and why.
NOTHING_LEAVES: dict[str, str] = {}


@pytest.mark.parametrize("name", HANDMADE)
@pytest.mark.parametrize("masking", MASKINGS)
def test_equals_the_masked_model(name: str, masking: str) -> None:
    masks = all_masks(name).get(masking)
    if masks is None:  # this model has no attention, say
        return
    result = checked(name, masks)
    assert result.variation is not None
    assert result.smaller or f"{name}/{masking}" in NOTHING_LEAVES


# --- parameter counts by hand -----------------------------------------------------------------------------


def linear(inp: int, out: int) -> int:
    return inp * out + out


def conv(inp: int, out: int, kernel: int, bias: bool = True) -> int:
    return inp * out * kernel * kernel + (out if bias else 0)


def conv_bn(inp: int, out: int, kernel: int = 3) -> int:
    return conv(inp, out, kernel, bias=False) + 2 * out


def res_net(w: int) -> int:
    def block(inp: int, out: int) -> int:
        down = conv_bn(inp, out, 1) if inp != out else 0
        return conv_bn(inp, out) + conv_bn(out, out) + down

    stages = 2 * block(w, w) + block(w, 2 * w) + block(2 * w, 2 * w)
    return conv_bn(3, w) + stages + linear(2 * w, 5)


def unet(w: int) -> int:
    down = conv_bn(3, w) + conv_bn(w, 2 * w) + conv_bn(2 * w, 4 * w)
    up = conv(4 * w, 2 * w, 2) + conv_bn(4 * w, 2 * w) + conv(2 * w, w, 2) + conv_bn(2 * w, w)
    return down + up + conv(w, 2, 1)


def inverted_residual(w: int) -> int:
    hidden = 3 * w
    depthwise = 9 * hidden + 2 * hidden
    return conv_bn(3, w) + conv_bn(w, hidden, 1) + depthwise + conv_bn(hidden, w, 1) + linear(w, 4)


def bert(inner: int, hidden: int, pooled: int = 24) -> int:
    layer = 3 * linear(24, inner) + linear(inner, 24) + linear(24, hidden) + linear(hidden, 24) + 4 * 24
    return 30 * 24 + 16 * 24 + 2 * 24 + 2 * layer + linear(24, pooled) + linear(pooled, 3)


def gpt2(inner: int, hidden: int) -> int:
    block = linear(24, 3 * inner) + linear(inner, 24) + linear(24, hidden) + linear(hidden, 24) + 4 * 24
    return 30 * 24 + 16 * 24 + 2 * block + 2 * 24  # the head is the embedding


def llama(q: int, kv: int, hidden: int) -> int:
    block = 32 * (2 * q + 2 * kv) + 32 * 3 * hidden + 2 * 32
    return 2 * 30 * 32 + 2 * block + 32


def vit(inner: int, hidden: int) -> int:
    block = linear(24, 3 * inner) + linear(inner, 24) + linear(24, hidden) + linear(hidden, 24) + 5 * 24
    return conv(3, 24, 4) + 24 + 5 * 24 + 2 * block + 2 * 24 + linear(24, 4)


def torch_encoder(inner: int, hidden: int) -> int:
    layer = linear(24, 3 * inner) + linear(inner, 24) + linear(24, hidden) + linear(hidden, 24) + 4 * 24
    return 2 * layer + linear(24, 3)


def swin(heads: int) -> int:
    return conv(3, 24, 1) + linear(24, 18 * heads) + linear(6 * heads, 24) + 2 * 24 + linear(24, 4) + 49 * heads


def self_attention(inner: int) -> int:
    return 3 * linear(24, inner) + linear(inner, 24)


def relative_bias(heads: int) -> int:
    return 4 * 24 * 8 * heads + 8 * heads


def multi_query(heads: int) -> int:
    return linear(24, 6 * heads) + linear(24, 12) + linear(6 * heads, 24)


# Model, masking, and what must remain: widths are halved, except where the comment says otherwise.
COUNTS: dict[tuple[str, str], int] = {
    ("mlp", "zeros"): linear(16, 12) + linear(12, 12) + linear(12, 5),
    ("mlp", "constants"): linear(16, 12) + linear(12, 12) + linear(12, 5),
    ("le_net", "zeros"): conv(1, 16, 3) + conv(16, 32, 3) + linear(32 * 144, 64) + linear(64, 10),
    ("le_net", "constants"): conv(1, 16, 3) + conv(16, 32, 3) + linear(32 * 144, 64) + linear(64, 10),
    ("hard_number", "zeros"): conv(1, 5, 5) + conv(5, 10, 5) + linear(160, 25) + linear(25, 10),
    ("vgg", "zeros"): conv(3, 4, 3) + 8 + conv(4, 8, 3) + 16 + linear(8 * 16, 10) + linear(10, 5),
    ("res_net", "zeros"): res_net(4),
    ("unet", "zeros"): unet(3),
    ("inverted_residual", "zeros"): inverted_residual(4),
    ("bert", "heads"): bert(12, 32),
    ("bert", "heads_out"): bert(12, 32),
    ("bert", "mlp"): bert(24, 16, pooled=12),
    ("bert", "mlp_out"): bert(24, 16, pooled=12),
    ("gpt2", "heads"): gpt2(12, 96),
    ("gpt2", "heads_out"): gpt2(12, 96),
    ("gpt2", "mlp"): gpt2(24, 48),
    ("gpt2", "mlp_out"): gpt2(24, 48),
    ("llama", "heads"): llama(16, 8, 40),  # whole groups
    ("llama", "heads_out"): llama(16, 16, 40),  # one query head of each group: keys and values stay
    ("llama", "mlp"): llama(32, 16, 20),
    ("llama", "mlp_out"): llama(32, 16, 20),
    ("vi_t", "heads"): vit(12, 96),
    ("vi_t", "heads_out"): vit(12, 96),
    ("vi_t", "mlp"): vit(24, 48),
    ("vi_t", "mlp_out"): vit(24, 48),
    ("torch_encoder", "heads"): torch_encoder(12, 32),
    ("torch_encoder", "heads_out"): torch_encoder(12, 32),
    ("torch_encoder", "mlp_out"): torch_encoder(24, 16),
    ("swin", "heads"): swin(2),
    ("swin", "heads_out"): swin(2),
    ("default_scale", "heads"): self_attention(12),
    ("default_scale", "heads_out"): self_attention(12),
    ("default_scale", "dims"): self_attention(16),  # two of six dims a head: they leave in pairs
    ("biased_values", "heads"): linear(24, 24) + linear(24, 12) + linear(12, 24),
    ("relative_bias", "heads"): relative_bias(2),
    ("relative_bias", "heads_out"): relative_bias(2),
    ("multi_query", "heads_out"): multi_query(2),
}


@pytest.mark.parametrize(("name", "masking"), COUNTS)
def test_leaves_what_remains_by_hand(name: str, masking: str) -> None:
    result = checked(name, all_masks(name)[masking])
    assert result.after == COUNTS[name, masking]


DENSE: dict[str, Callable[[], int]] = {
    "res_net": lambda: res_net(8),
    "unet": lambda: unet(6),
    "inverted_residual": lambda: inverted_residual(8),
    "bert": lambda: bert(24, 32),
    "gpt2": lambda: gpt2(24, 96),
    "llama": lambda: llama(32, 16, 40),
    "vi_t": lambda: vit(24, 96),
    "torch_encoder": lambda: torch_encoder(24, 32),
    "swin": lambda: swin(4),
    "default_scale": lambda: self_attention(24),
    "relative_bias": lambda: relative_bias(4),
    "multi_query": lambda: multi_query(4),
}


@pytest.mark.parametrize("name", DENSE)
def test_the_formulas_count_the_dense_models(name: str) -> None:
    assert DENSE[name]() == count_parameters(HANDMADE[name].build())
