"""The forward of models that hand their attention to us: one [1, num_tokens] pass for any mix; knows no sequences.

`transformers` gives every layer's query, key and value to `ragged_attention`, registered as an attention
implementation; what this forward needs beside them travels as the keyword argument `ragged`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from eft_serve.engine.adapters import Adapters
from eft_serve.engine.attention import Attention
from eft_serve.engine.layout import Layout
from eft_serve.engine.paged_tensors import PagedTensors

RAGGED = "eft_ragged"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_HARMLESS = {"position_ids", "use_cache", "dropout", "return_dict"} | {
    f"output_{what}" for what in ("attentions", "hidden_states", "router_logits")
}


class UnsupportedModelError(Exception):
    """The model does not compute what this path would compute for it."""


@dataclass(slots=True)
class RaggedContext:
    """What the attention of one forward needs beside query, key and value."""

    layout: Layout
    cache: PagedTensors
    attention: Attention
    layers: list[int] = field(default_factory=list)  # that called, in order
    windows: set[int | None] = field(default_factory=set)  # that they asked for


class RaggedPath:
    """All rows in one forward; every layer attends through `ragged_attention`."""

    name = "ragged"

    def __init__(self, model: PreTrainedModel, attention: Attention, adapters: Adapters) -> None:
        layer_types = set(getattr(model.config, "layer_types", None) or ())
        if not model._can_set_attn_implementation():
            raise UnsupportedModelError(f"{type(model).__name__} does not take an attention implementation")
        if layer_types - _LAYER_TYPES:
            raise UnsupportedModelError(f"layers of type {', '.join(sorted(layer_types - _LAYER_TYPES))}")
        self._model = model
        self._attention = attention
        self._adapters = adapters
        self._wants_window = _wants_window(model, layer_types)
        model.set_attn_implementation(RAGGED)

    def forward(self, layout: Layout, cache: PagedTensors) -> Tensor:
        """Logits [num_logits, vocab_size] in the order of `layout.logit_index`."""
        self._adapters.select(layout.groups)
        context = RaggedContext(layout, cache, self._attention)
        output = self._model(
            input_ids=layout.input_ids[None],
            position_ids=layout.positions[None],
            use_cache=False,
            logits_to_keep=layout.logit_index,
            ragged=context,
        )
        self._check(context, len(cache.keys))
        logits: Tensor = output.logits[0]
        return logits

    def _check(self, context: RaggedContext, num_layers: int) -> None:
        if sorted(context.layers) != list(range(num_layers)):
            raise UnsupportedModelError(f"layers {context.layers} of {num_layers} dispatched their attention")
        if self._wants_window and context.windows == {None}:
            raise UnsupportedModelError("the sliding window lives in the mask alone")


def _wants_window(model: PreTrainedModel, layer_types: set[str]) -> bool:
    config = model.config
    if layer_types:
        return "sliding_attention" in layer_types
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


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
    """Attend as the context says; returns [1, num_tokens, heads, head_dim]."""
    _refuse_unknown(module, attention_mask, kwargs)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    ragged.layers.append(layer)
    ragged.windows.add(sliding_window)
    flat = [states[0].transpose(0, 1).contiguous() for states in (query, key, value)]
    out = ragged.attention(
        layer, ragged.layout, ragged.cache, *flat, scaling=scaling, window=sliding_window, softcap=softcap
    )
    return out[None], None


def _refuse_unknown(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _HARMLESS]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if not getattr(module, "is_causal", True):
        unknown.append("is_causal=False")
    if unknown:
        raise UnsupportedModelError(f"{type(module).__name__} passes {', '.join(unknown)} to its attention")


AttentionInterface.register(RAGGED, ragged_attention)
