"""Every handmade model under every masking: equal to the masked model, smaller, and as small as by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks.zoo.check import Result, check_specimen, count_parameters
from benchmarks.zoo.handmade import HANDMADE
from benchmarks.zoo.maskings import make_masks
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


# Where nothing has to leave, by reason.
NOTHING_LEAVES = {
    "what the head reads is a sum, and others read all of it": (
        *("res_net/mlp", "res_net/mlp_out", "pre_activation/mlp", "pre_activation/mlp_out"),
        *("swin/mlp", "swin/mlp_out", "padded_shortcut/mlp", "padded_shortcut/mlp_out"),
        *("nested_outputs/mlp_out", "beit/mlp", "beit/mlp_out"),
        *("split_by_attributes/mlp",),
    ),
    "fused q, k and v have one head size, and other dims are masked in each head": (
        *("gpt2/dims_out", "vi_t/dims_out", "swin/dims_out", "multi_query/dims_out"),
        *("torch_encoder/dims_out", "torch_attention/dims_out", "beit/dims_out", "split_by_attributes/dims_out"),
    ),
    "one of the heads or groups has no masked unit, and all keep equally many": (
        *("default_scale/zeros", "default_scale/constants", "biased_values/constants"),
        *("biased_values/conflicts", "swin/constants", "swin/conflicts"),
        *("channel_shuffle_module/zeros", "channel_shuffle_module/constants"),
        *("channel_shuffle/constants", "channel_shuffle/conflicts"),
        *("group_norm/zeros", "group_norm/constants", "group_norm/conflicts"),
    ),
    "one of the four rows of each shuffled channel is not masked": (
        *("pixel_shuffle/zeros", "pixel_shuffle/constants", "pixel_shuffle/conflicts"),
    ),
    "every channel counts in what the others become": (
        *("group_norm_single/zeros", "group_norm_single/constants", "group_norm_single/conflicts"),
        *("layer_norm/zeros", "layer_norm/constants", "layer_norm/conflicts"),
        *("rms_norm/constants", "rms_norm/conflicts"),  # not zero
        *("softmax2d/zeros", "softmax2d/constants", "softmax2d/conflicts"),
        *("local_response_norm/zeros", "local_response_norm/constants", "local_response_norm/conflicts"),
    ),
    "a query of zeros attends evenly; keys and values serve the other heads too": (
        *("multi_query/heads", "multi_query/constants"),
    ),
    "one bias cannot hold the constants of three calls; others read what the last call does not": (
        *("shared_module/constants", "shared_module/mlp", "shared_module/mlp_out"),
    ),
    "what is left of a unit differs from place to place": (
        *("split_by_attributes/constants", "split_by_attributes/conflicts"),
    ),
    "of two blocks that share a module, one alone is masked": (
        *("shared_positions/heads_out", "shared_positions/dims", "shared_positions/dims_out"),
        *("shared_positions/mlp", "shared_positions/mlp_out"),
    ),
    "the weight is computed from rows and columns together": (
        *("parametrised/zeros", "parametrised/constants", "parametrised/conflicts"),
        *("parametrised/mlp", "parametrised/mlp_out"),
    ),
    "how many channels are padded is a number in forward": (
        *("padded_shortcut/zeros", "padded_shortcut/constants", "padded_shortcut/conflicts"),
    ),
    "the masked axes meet no whole unit": ("raw_parameters/conflicts",),
    "padded with a number and then with zeros, constants are no longer in proportion": (
        *("pad_constant/constants", "pad_constant/conflicts"),
    ),
}
KEPT = {case for cases in NOTHING_LEAVES.values() for case in cases}


@pytest.mark.parametrize("name", HANDMADE)
def test_equals_the_masked_model_and_is_smaller(name: str) -> None:
    wrong = {}
    for masking, masks in all_masks(name).items():
        result = check_specimen(HANDMADE[name], built(name), masks, tolerance=1e-5)
        if result.outcome != "exact":
            wrong[masking] = f"{result.outcome}: {result.detail}"
        elif not result.smaller and f"{name}/{masking}" not in KEPT:
            wrong[masking] = f"nothing left: {result.detail}"
    assert not wrong


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


def conv3(*widths: int) -> int:
    return sum(conv(inp, out, 3) for inp, out in pairwise(widths))


def recurrent(hidden: int, gates: int, layers: int = 1, ways: int = 1, bias: int = 2) -> int:
    embed, heads = linear(12, 5), linear(ways * hidden, 4) + linear(hidden, 3)
    total = embed + heads
    for layer in range(layers):
        inp = ways * hidden if layer else 5
        total += ways * gates * hidden * (inp + hidden + bias)
    return total


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
    **{
        (f"conv_{kind}", "zeros"): conv3(3, 4, 6, 4)
        for kind in ["valid", "padded", "same", "strided", "dilated", "reflect", "replicate", "circular"]
    },
    **{(name, "zeros"): conv3(3, 4, 6, 4) for name in ("transposed", "transposed_strided")},
    **{
        (name, "zeros"): conv3(3, 4, 4)
        for name in (
            *("max_pool", "avg_pool_padded", "avg_pool_uncounted", "adaptive_max_pool", "lp_pool", "dropout"),
            *("upsample_nearest", "upsample_bilinear", "upsample_bicubic", "pad_zero", "pad_reflect"),
            *("pad_circular", "fold_unfold"),
        )
    },
    ("conv_valid", "constants"): conv3(3, 4, 6, 4) - conv(6, 4, 3) + conv(7, 4, 3) + 4 * 9 + 1,  # a carrier
    ("conv1d", "zeros"): (9 * 4 + 4) + (4 * 6 * 5 + 6 + 12) + linear(6, 4),
    ("concat", "zeros"): conv3(3, 3) + conv3(3, 5) + conv3(8, 5) + linear(5, 4),
    ("multiply", "zeros"): 2 * conv3(3, 4) + conv3(4, 5) + linear(5, 4),
    ("rnn", "zeros"): recurrent(7, 1),
    ("gru", "zeros"): recurrent(7, 3, layers=2),
    ("lstm", "zeros"): recurrent(7, 4),
    ("lstm_stacked", "zeros"): recurrent(7, 4, layers=2, ways=2),
    ("lstm_unbiased", "zeros"): recurrent(7, 4, bias=0),
    ("checkpointed", "zeros"): linear(12, 8) + 2 * (linear(8, 12) + linear(12, 8)) + linear(8, 4),
    ("nested_inputs", "zeros"): 2 * linear(12, 8) + linear(8, 4),
    ("custom_function", "zeros"): linear(12, 8) + linear(8, 5) + linear(5, 4),
    ("tied_head", "zeros"): 20 * 12 + linear(12, 8) + linear(8, 12) + 20,  # the embedding is called last
    ("conv_ne_xt_block", "mlp_out"): conv(3, 12, 2) + 12 * 50 + 24 + linear(12, 24) + linear(24, 12) + 12 + 52,
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


# What whole units look like where they are not rows: parameter -> what is pruned of it, and what must remain.
Index = tuple[slice | int | list[int], ...]
ALL = slice(None)
WHOLE_UNITS: dict[str, tuple[dict[str, Index], int]] = {
    # four rows of the convolution make one channel of the shuffled image
    "super_resolution": (
        {"conv2.weight": (slice(12),), "conv2.bias": (slice(12),)},
        conv3(3, 6, 12) + conv3(3, 3),
    ),
    "pixel_shuffle": (
        {"producer.weight": (slice(4),), "producer.bias": (slice(4),)},
        conv3(3, 4) + conv3(1, 4),
    ),
    # an embedding that is the head: its columns and the rows of what comes before the head
    "tied_head": (
        {"embed.weight": (ALL, slice(6)), "down.weight": (slice(6),), "down.bias": (slice(6),)},
        20 * 6 + linear(6, 16) + linear(16, 6) + 20,
    ),
    # heads that are an axis of their own
    "einsum_attention": (
        {name: (ALL, slice(2)) for name in ("wq", "wk", "wv")},
        3 * 24 * 12 + 12 * 24,
    ),
    "raw_parameters": ({"weight": (slice(4),), "shift": (slice(4),)}, 4 * 27 + 4 + 4 + 4 * 4),
    # groups 0 and 2 of four
    "grouped_convs": (
        {name: ([0, 1, 2, 3, 8, 9, 10, 11],) for name in ("grouped.0.weight", "grouped.1.weight", "grouped.1.bias")},
        conv_bn(3, 16) + conv_bn(16, 8, 1) + 8 * 4 * 9 + 16 + conv_bn(8, 16, 1) + linear(16, 4),
    ),
    "group_norm": (
        {name: (slice(4),) for name in ("producer.weight", "producer.bias", "layer.weight", "layer.bias")},
        conv3(3, 4, 4) + 8,
    ),
    # a value and its gate leave together
    "glu": (
        {"producer.weight": (slice(2),), "producer.bias": (slice(2),)},
        conv3(3, 4) + conv3(2, 4),
    ),
    "bilinear_form": (
        {
            **{f"left.{kind}": (slice(4),) for kind in ("weight", "bias")},
            **{f"right.{kind}": (slice(5),) for kind in ("weight", "bias")},
            **{f"bilinear.{kind}": (slice(7),) for kind in ("weight", "bias")},
        },
        linear(12, 4) + linear(12, 5) + 7 * 4 * 5 + 7 + linear(7, 4),
    ),
    # the last head of both blocks, which share a module
    "shared_positions": (
        {
            f"blocks.{block}.qkv.{kind}": ([*range(18, 24), *range(42, 48), *range(66, 72)],)
            for block in range(2)
            for kind in ("weight", "bias")
        },
        2 * (linear(24, 54) + linear(18, 24)) + 6 * 3 + 6 + linear(24, 24) + linear(24, 3),
    ),
    "gather_rows": (
        {"fc1.weight": (slice(8),), "fc1.bias": (slice(8),)},
        linear(12, 8) + linear(8, 4),
    ),
    "library_op": (
        {
            **{f"conv1.{kind}": (slice(4),) for kind in ("weight", "bias")},
            **{f"conv2.{kind}": (slice(6),) for kind in ("weight", "bias")},
        },
        conv3(3, 4, 6) + linear(6, 4),
    ),
}


@pytest.mark.parametrize("name", WHOLE_UNITS)
def test_whole_units_leave(name: str) -> None:
    pruned, remaining = WHOLE_UNITS[name]
    masks = {key: torch.ones_like(value) for key, value in built(name).named_parameters() if key in pruned}
    for key, index in pruned.items():
        masks[key][index] = 0
    assert checked(name, masks).after == remaining


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
