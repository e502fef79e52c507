"""``nn.MultiheadAttention`` with any number of heads and head dims."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskprop.align.plan import Plan
from maskprop.modules import modules_by_path
from maskprop.rewrite.edits import Edits


class CompactMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose heads need not fill ``embed_dim``.

    The call signature, parameters and ``state_dict`` names are its base's; the projections may have fewer rows.

    Attributes:
        num_heads: heads that are left.
        scale: what the scores are multiplied by: that of the dense head dim.
    """

    scale: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``: same arguments, same shapes in and out."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        elif self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        length, batch, _ = query.shape
        q, k, v = self._project(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, batch, length, k.shape[0], q)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([k, self.bias_k.expand(1, batch, -1)]),
                torch.cat([v, self.bias_v.expand(1, batch, -1)]),
            )
            mask = None if mask is None else F.pad(mask, (0, 1))
        q, k, v = (t.reshape(t.shape[0], batch, self.num_heads, -1).permute(1, 2, 0, 3) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            mask = None if mask is None else F.pad(mask, (0, 1))
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        out = F.linear(out.permute(2, 0, 1, 3).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            out = out.squeeze(1)
        elif self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        biases: Any = (
            (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.unflatten(0, (3, -1)).unbind()
        )
        weights: Any
        packed: Tensor | None = self.in_proj_weight  # typed as always there
        if packed is not None:
            weights = packed.unflatten(0, (3, -1)).unbind()  # as many rows each, as the dense module has them
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _mask(
        self,
        attn_mask: Tensor | None,
        padding: Tensor | None,
        batch: int,
        length: int,
        keys: int,
        like: Tensor,
    ) -> Tensor | None:
        """One additive mask that broadcasts to (batch, heads, queries, keys)."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, like)
            if mask.dim() == 3:  # (batch * heads of the dense module, queries, keys)
                mask = mask.reshape(batch, -1, length, keys)
                mask = mask[:, : self.num_heads] if mask.shape[1] > 1 else mask
            else:
                mask = mask.reshape(1, 1, length, keys)
        if padding is not None:
            extra = _additive(padding, like).reshape(batch, 1, 1, keys)
            mask = extra if mask is None else mask + extra
        return mask


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))


def replace_attention(edits: Edits, plan: Plan) -> list[str]:
    """Give every ``nn.MultiheadAttention`` whose projections shrank a forward that can express it.

    Returns:
        Paths of the modules that changed.
    """
    found = []
    for path, module in modules_by_path(edits.model).items():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        dot = path + "." if path else ""
        names = [dot + n for n in ("in_proj_weight", "q_proj_weight", "out_proj.weight")]
        if not any(n in plan.keep for n in names):
            continue
        heads = _heads_left(plan, dot, module)
        if not isinstance(module, CompactMultiheadAttention):
            edits.set_class(module, CompactMultiheadAttention)
            edits.set_attribute(module, "scale", module.head_dim**-0.5)
            edits.set_attribute(module, "_qkv_same_embed_dim", False)
        edits.set_attribute(module, "num_heads", heads)
        edits.set_attribute(module, "head_dim", module.out_proj.in_features // heads)
        found.append(path)
    return found


def _heads_left(plan: Plan, dot: str, module: nn.MultiheadAttention) -> int:
    """Heads of which the output projection keeps a column."""
    for keep in plan.keep.get(dot + "out_proj.weight", []):
        if keep.axis == 1:
            dim = plan.shapes[dot + "out_proj.weight"][1] // module.num_heads
            return len(torch.unique(keep.index // dim))
    return int(module.num_heads)
