"""Transformer blocks in the styles that the libraries write them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..specimen import Inputs, Zoo, images, sequences, tokens

ATTENTION = Zoo()


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``(batch, length, heads * dims) -> (batch, heads, length, dims)``."""
    return x.view(x.size(0), x.size(1), heads, -1).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """``(batch, heads, length, dims) -> (batch, length, heads * dims)``."""
    return x.transpose(1, 2).flatten(2)


class BertLayer(nn.Module):
    """Separate q, k, v; post-norm; sizes held in attributes."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.all_head_size = heads, width // heads, width
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.intermediate, self.output = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def transpose(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).permute(0, 2, 1, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.transpose(self.query(x)), self.transpose(self.key(x)), self.transpose(self.value(x))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        context = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).contiguous()
        x = self.norm1(x + self.dense(context.view(*context.shape[:-2], self.all_head_size)))
        return self.norm2(x + self.output(F.gelu(self.intermediate(x))))


def padded_tokens(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
    """Token ids and a mask that hides the last tokens of each sample, never all."""
    ids = torch.randint(30, (batch, 7 + stretch), generator=generator)
    lengths = torch.randint(3, 7 + stretch, (batch, 1), generator=generator)
    return {"ids": ids, "mask": torch.arange(7 + stretch)[None] < lengths}


@ATTENTION(padded_tokens, stretches=True)
class Bert(nn.Module):
    """Token, position and type embeddings, two layers, pooled output."""

    def __init__(self, width: int = 24, heads: int = 4, hidden: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(30, width), nn.Embedding(16, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(BertLayer(width, heads, hidden) for _ in range(depth))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norm(self.word(ids) + self.position(torch.arange(ids.size(1))))
        for layer in self.layers:
            x = layer(x, mask)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class Conv1D(nn.Module):
    """GPT-2's linear layer, with its weight stored as (in, out)."""

    def __init__(self, out: int, inp: int) -> None:
        super().__init__()
        self.nf, self.nx = out, inp
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inp, out) / inp**0.5),
            nn.Parameter(torch.zeros(out)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class GPT2Block(nn.Module):
    """Fused q, k, v split by a size in an attribute; causal mask in a buffer; pre-norm."""

    def __init__(self, width: int, heads: int, length: int = 32) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.split_size = heads, width // heads, width
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)
        self.c_fc, self.c_out = Conv1D(4 * width, width), Conv1D(width, 4 * width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.register_buffer("causal", torch.ones(length, length).tril().bool(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.size(1)
        q, k, v = (split_heads(t, self.num_heads) for t in self.c_attn(self.ln_1(x)).split(self.split_size, dim=2))
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
        scores = torch.where(self.causal[:length, :length], scores, torch.finfo(scores.dtype).min)
        x = x + self.c_proj(merge_heads(scores.softmax(-1) @ v))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


@ATTENTION(tokens(30, 7), stretches=True)
class GPT2(nn.Module):
    """Two blocks and a head that is tied to the token embedding."""

    def __init__(self, width: int = 24, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(30, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(GPT2Block(width, heads) for _ in range(depth))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, 30, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


class RMSNorm(nn.Module):
    """Llama's norm, written out."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in Llama's layout: dim ``d`` turns with dim ``d + dims / 2``."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def repeat_kv(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """``(batch, kv heads, length, dims) -> (batch, kv heads * repeats, length, dims)``."""
    batch, heads, length, dims = x.shape
    return x[:, :, None].expand(batch, heads, repeats, length, dims).reshape(batch, heads * repeats, length, dims)


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary embeddings and SwiGLU, pre-norm by RMS norm, no biases."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = width // heads, heads // kv_heads
        kv_width = kv_heads * self.head_dim
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (
            nn.Linear(width, kv_width, bias=False),
            nn.Linear(width, kv_width, bias=False),
        )
        self.gate_proj, self.up_proj = (
            nn.Linear(width, hidden, bias=False),
            nn.Linear(width, hidden, bias=False),
        )
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        shape = (*h.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(h).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = repeat_kv(k, self.num_key_value_groups), repeat_kv(v, self.num_key_value_groups)
        scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
        scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
        context = (scores.softmax(-1) @ v).transpose(1, 2).contiguous()
        x = x + self.o_proj(context.reshape(*x.shape[:-1], -1))
        h = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


@ATTENTION(tokens(30, 7), stretches=True)
class Llama(nn.Module):
    """Two blocks; the rotary tables are computed once and passed to each."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2, hidden: int = 40) -> None:
        super().__init__()
        dims = width // heads
        self.embed = nn.Embedding(30, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, kv_heads, hidden) for _ in range(2))
        self.norm, self.lm_head = RMSNorm(width), nn.Linear(width, 30, bias=False)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, dims, 2) / dims), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(ids.size(1)).float(), self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        x = self.embed(ids)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.lm_head(self.norm(x))


class ViTBlock(nn.Module):
    """timm's: fused qkv reshaped to (3, heads, dims), unbind, default-scale attention, layer scale."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.gamma * self.proj(h)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@ATTENTION(images(3, 8, 8))
class ViT(nn.Module):
    """Patches, class token, positions, two blocks."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 5, width))
        self.blocks = nn.Sequential(ViTBlock(width, heads), ViTBlock(width, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


@ATTENTION(images(3, 8, 8))
class Swin(nn.Module):
    """Rolled windows, a table of position biases with a column a head, ``C // self.num_heads`` in forward."""

    def __init__(self, width: int = 24, heads: int = 4, window: int = 4) -> None:
        super().__init__()
        self.num_heads, self.window = heads, window
        self.embed = nn.Conv2d(3, width, 1)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        axis = torch.arange(window)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
        offset = grid[:, :, None] - grid[:, None, :] + window - 1
        self.register_buffer("index", (offset[0] * (2 * window - 1) + offset[1]).flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.embed(x).permute(0, 2, 3, 1)
        B, H, W, C = shortcut.shape
        w = self.window
        x = torch.roll(self.norm(shortcut), (-2, -2), (1, 2))
        x = x.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)
        qkv = self.qkv(x).reshape(x.size(0), w * w, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.table[self.index].view(w * w, w * w, -1).permute(2, 0, 1)
        scores = (q * (C // self.num_heads) ** -0.5) @ k.transpose(-2, -1) + bias[None]
        x = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, w * w, C))
        x = x.view(B, H // w, W // w, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        return self.head((shortcut + torch.roll(x, (2, 2), (1, 2))).mean((1, 2)))


@ATTENTION(sequences(6, 24), stretches=True)
class MultiQuery(nn.Module):
    """One key-value head for all query heads, broadcast by the matrix product."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.dims = heads, width // heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * self.dims)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = split_heads(self.q(x), self.heads)
        k, v = self.kv(x).split(self.dims, dim=-1)
        weights = (q @ k[:, None].transpose(-1, -2) * self.dims**-0.5).softmax(-1)
        return x + self.out(merge_heads(weights @ v[:, None]))


@ATTENTION(sequences(6, 24), stretches=True)
class DefaultScale(nn.Module):
    """``scaled_dot_product_attention`` without a scale: it divides by whatever head size it is given."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q, self.k, self.v))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


@ATTENTION(sequences(6, 24), stretches=True)
class EinsumAttention(nn.Module):
    """Weights with a head axis of their own, contracted by einsum (T5X, BERT in Flax, wav2vec's cousins)."""

    def __init__(self, width: int = 24, heads: int = 4, dims: int = 6) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(width, heads, dims) / width**0.5) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(heads, dims, width) / width**0.5)
        self.scale = dims**-0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("blw,whd->bhld", x, w) for w in (self.wq, self.wk, self.wv))
        weights = torch.einsum("bhid,bhjd->bhij", q * self.scale, k).softmax(-1)
        return x + torch.einsum("bhld,hdw->blw", torch.einsum("bhij,bhjd->bhid", weights, v), self.wo)


@ATTENTION(sequences(6, 24), stretches=True)
class RelativeBias(nn.Module):
    """T5's: a bias a head from an embedding of distances; no scale; an inner width of its own."""

    def __init__(self, width: int = 24, heads: int = 4, dims: int = 8) -> None:
        super().__init__()
        self.n_heads, self.key_value_proj_dim, self.inner_dim = heads, dims, heads * dims
        self.q, self.k, self.v = (nn.Linear(width, self.inner_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(self.inner_dim, width, bias=False)
        self.relative_attention_bias = nn.Embedding(8, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.size(1)
        q, k, v = (
            p(x).view(-1, length, self.n_heads, self.key_value_proj_dim).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        distance = (torch.arange(length)[None] - torch.arange(length)[:, None]).abs().clamp(max=7)
        bias = self.relative_attention_bias(distance).permute(2, 0, 1).unsqueeze(0)
        context = (q @ k.transpose(3, 2) + bias).softmax(-1) @ v
        return x + self.o(context.transpose(1, 2).contiguous().view(-1, length, self.inner_dim))


@ATTENTION(sequences(6, 24), stretches=True)
class BiasedValues(nn.Module):
    """Constants in v pass through the softmax: its rows sum to one."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.dims = heads, width // heads
        self.qk, self.v, self.out = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (split_heads(t, self.heads) for t in self.qk(x).chunk(2, -1))
        weights = self.dropout((q @ k.transpose(-1, -2) / self.dims**0.5).softmax(-1))
        return self.out(merge_heads(weights @ split_heads(self.v(x), self.heads)))


class BeitAttention(nn.Module):
    """One fused weight, its bias put together from parameters and a buffer of zeros; learnt relative positions."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.num_heads, self.length = heads, length
        self.table = nn.Parameter(torch.randn(2 * length - 1, heads))
        place = torch.arange(length)
        self.register_buffer("index", place[:, None] - place[None] + length - 1, persistent=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.register_buffer("k_bias", torch.zeros(width), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        q, k, v = qkv.reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(self.length, self.length, -1).permute(2, 0, 1).contiguous()
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))
        return self.proj(x.transpose(1, 2).reshape(batch, length, -1))


@ATTENTION(sequences(6, 24))
class Beit(nn.Module):
    """Heads of which only the weights are masked put constants into the output."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), BeitAttention(width, heads, length=6)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.attn(self.norm(x)))
