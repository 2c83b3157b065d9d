"""Attention over the paged cache; knows the layout of one forward and the cache's tensors, not the model.

`transformers` hands every layer's query, key and value to `ragged_attention`, registered as an attention
implementation; what this forward needs beside them travels as the keyword argument `ragged`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from eft_serve.engine.layout import Layout

RAGGED = "eft_ragged"
_HARMLESS = {"position_ids", "use_cache", "dropout", "return_dict"} | {
    f"output_{what}" for what in ("attentions", "hidden_states", "router_logits")
}


class UnsupportedAttentionError(Exception):
    """The model asks of its attention what `ragged_attention` does not compute."""


@dataclass(frozen=True, slots=True)
class PagedTensors:
    """The keys and values of every layer: [num_slots, kv_heads of this rank, head_dim] each."""

    keys: list[Tensor]
    values: list[Tensor]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store [num_tokens, kv_heads, head_dim] at `slots`."""
        self.keys[layer].index_copy_(0, slots, key)
        self.values[layer].index_copy_(0, slots, value)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at slots [batch, kv_length], each [batch, kv_heads, kv_length, head_dim]."""
        key, value = (
            cache.index_select(0, slots.flatten()).view(*slots.shape, *cache.shape[1:]).transpose(1, 2)
            for cache in (self.keys[layer], self.values[layer])
        )
        return key, value


@dataclass(slots=True)
class RaggedContext:
    """What the attention of one forward needs beside query, key and value."""

    layout: Layout
    cache: PagedTensors
    layers: list[int] = field(default_factory=list)  # that called, in order
    windows: set[int | None] = field(default_factory=set)  # that they asked for


def ragged_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, num_tokens, head_dim]
    key: Tensor,  # [1, kv_heads, num_tokens, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ragged: RaggedContext,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write the new keys and values, attend group by group; returns [1, num_tokens, heads, head_dim]."""
    _refuse_unknown(module, attention_mask, kwargs)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    ragged.layers.append(layer)
    ragged.windows.add(sliding_window)
    new_key, new_value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    ragged.cache.write(layer, ragged.layout.slots, new_key, new_value)
    outputs = []
    for group in ragged.layout.groups:
        rows = slice(group.start, group.stop)
        q = query[0, :, rows].reshape(-1, group.batch_size, group.q_length, query.shape[3]).transpose(0, 1)
        view = group.view(sliding_window, query.shape[1] // key.shape[1])
        if view.is_causal and softcap is None:
            out = _causal_attention(q, key[:, :, rows], value[:, :, rows], scaling)
        else:
            k, v = ragged.cache.read(layer, view.slots)
            out = _masked_attention(q, k, v, view.mask, scaling, softcap)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def _refuse_unknown(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _HARMLESS]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if not getattr(module, "is_causal", True):
        unknown.append("is_causal=False")
    if unknown:
        raise UnsupportedAttentionError(f"{type(module).__name__} passes {', '.join(unknown)} to its attention")


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def _masked_attention(
    query: Tensor,  # [batch, heads, q_length, head_dim]
    key: Tensor,  # [batch, kv_heads, kv_length, head_dim]
    value: Tensor,
    mask: Tensor | None,  # [batch, 1, repeats * q_length, kv_length] bool
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Grouped queries without copied keys: the heads of one kv head become more rows of it."""
    packed = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])  # [batch, kv_heads, repeats * q_length, _]
    if softcap is None:
        out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    else:
        out = _softcapped_attention(packed, key, value, mask, scaling, softcap)
    return out.reshape(*query.shape[:3], -1)


def _softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Gemma 2 (arXiv 2408.00118): scores squashed to (-softcap, softcap) before the softmax."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


AttentionInterface.register(RAGGED, ragged_attention)
