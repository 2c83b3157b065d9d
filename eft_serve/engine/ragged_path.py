"""The forward of models whose attention we compute: one [1, num_tokens] pass for any mix; knows no sequences."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from eft_serve.engine.attention import RAGGED, PagedTensors, RaggedContext, UnsupportedAttentionError
from eft_serve.engine.layout import Layout

_LAYER_TYPES = {"full_attention", "sliding_attention"}


class RaggedPath:
    """All rows in one forward; every layer attends through `ragged_attention`."""

    name = "ragged"

    def __init__(self, model: PreTrainedModel) -> None:
        layer_types = set(getattr(model.config, "layer_types", None) or ())
        if not model._can_set_attn_implementation():
            raise UnsupportedAttentionError(f"{type(model).__name__} does not take an attention implementation")
        if layer_types - _LAYER_TYPES:
            raise UnsupportedAttentionError(f"layers of type {', '.join(sorted(layer_types - _LAYER_TYPES))}")
        self._model = model
        self._wants_window = _wants_window(model, layer_types)
        model.set_attn_implementation(RAGGED)

    def forward(self, layout: Layout, cache: PagedTensors) -> Tensor:
        """Logits [num_logits, vocab_size] in the order of `layout.logit_index`."""
        context = RaggedContext(layout, cache)
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
            raise UnsupportedAttentionError(f"layers {context.layers} of {num_layers} dispatched their attention")
        if self._wants_window and context.windows == {None}:
            raise UnsupportedAttentionError("the sliding window lives in the mask alone")


def _wants_window(model: PreTrainedModel, layer_types: set[str]) -> bool:
    config = model.config
    if layer_types:
        return "sliding_attention" in layer_types
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
