"""Attention over the cached tokens; knows the layout of one forward and the caches' tensors, not the model."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from eft_serve.engine.layout import Group, Heads, Layout
from eft_serve.engine.paged_tensors import PagedTensors


class Attention(Protocol):
    """An attention backend; one is used for a model's whole life."""

    name: str

    def __call__(
        self,
        layer: int,
        layout: Layout,
        cache: PagedTensors,
        query: Tensor,  # [num_tokens, heads, head_dim]
        key: Tensor,  # [num_tokens, kv_heads, head_dim]
        value: Tensor,
        *,
        scaling: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Write the new keys and values, attend; [num_tokens, heads, head_dim]."""
        ...


class GroupedAttention:
    """Group by group with torch's scaled dot product, on any device and dtype."""

    name = "grouped"

    def __call__(
        self,
        layer: int,
        layout: Layout,
        cache: PagedTensors,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        cache.write(layer, layout.cache_rows(key.shape[1]), key, value)
        return _joined(
            [
                self.attend(layer, group, cache, query, key, value, scaling=scaling, window=window, softcap=softcap)
                for group in layout.groups
            ]
        )

    def attend(
        self,
        layer: int,
        group: Group,
        cache: PagedTensors,
        query: Tensor,  # of all groups, like key and value
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """One group's output, [its tokens, heads, head_dim]; its keys and values are written already."""
        q = _by_row(query[group.tokens], group)
        heads = Heads(key.shape[1], query.shape[1] // key.shape[1], key.shape[2])
        if group.q_length > 1 and group.nothing_cached and window is None and softcap is None:
            k, v = _by_row(key[group.tokens], group), _by_row(value[group.tokens], group)
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=heads.repeats > 1)
            return _flat(out)
        outputs = []
        for part in group.parts(window, heads, query.dtype):
            k, v = cache.gather(layer, part.blocks, part.kv_length)
            outputs.append(_flat(_masked(q[part.rows], k, v, part.mask, scaling, softcap)))
        return _joined(outputs)


def _joined(outputs: list[Tensor]) -> Tensor:
    """One after the other."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _by_row(flat: Tensor, group: Group) -> Tensor:
    """[batch * q_length, heads, head_dim] as [batch, heads, q_length, head_dim]."""
    return flat.view(group.batch_size, group.q_length, *flat.shape[1:]).transpose(1, 2)


def _flat(out: Tensor) -> Tensor:
    """[rows, heads, q_length, head_dim] as [rows * q_length, heads, head_dim]."""
    return out.transpose(1, 2).flatten(0, 1)


def _masked(
    query: Tensor,  # [rows, heads, q_length, head_dim]
    key: Tensor,  # [rows, kv_heads, kv_length, head_dim]
    value: Tensor,
    mask: Tensor | None,  # [rows, 1, repeats * q_length, kv_length], added to the scores
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Grouped queries without copied keys: the heads of one key-value head become more rows of it."""
    packed = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])  # [rows, kv_heads, repeats * q_length, _]
    if softcap is None:
        out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    else:
        out = _softcapped(packed, key, value, mask, scaling, softcap)
    return out.reshape(*query.shape[:3], -1)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Gemma 2 (arXiv 2408.00118): scores squashed to (-softcap, softcap) before the softmax."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
