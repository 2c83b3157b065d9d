"""Tiny random models of every architecture, large enough in their weights that greedy decoding is not degenerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from eft_serve.engine.engine import Engine
from eft_serve.types import SequenceStep

VOCAB_SIZE = 61
CONTEXT = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GQA = {"num_key_value_heads": 2}
_GEMMA = {**_GQA, "head_dim": 16}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA),
    "mistral": ("mistral", {**_GQA, "sliding_window": 5}),
    "qwen2": ("qwen2", _GQA),
    "qwen2-sliding": ("qwen2", {**_GQA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**_GQA, "head_dim": 16, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", _GQA),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True}),
    "phi3": ("phi3", {**_GQA, "sliding_window": 7}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": (
        "gemma2",
        {**_GEMMA, "sliding_window": 6, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 9.0},
    ),
    "gemma3": ("gemma3_text", {**_GEMMA, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "falcon-mqa": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
    "falcon-alibi": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "alibi": True},
    ),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "jetmoe": (
        "jetmoe",
        {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
COMPACT = {"llama", "mistral", "qwen2", "qwen2-sliding", "qwen3"}
PADDED = {"falcon-new", "falcon-mqa", "falcon-alibi", "bloom", "jetmoe"}


def build_config(architecture: str, **changes: Any) -> PretrainedConfig:
    model_type, fields = ARCHITECTURES[architecture]
    fields = {**_COMMON, **fields, **changes}
    if model_type == "bloom":
        fields = {k: v for k, v in fields.items() if k not in ("intermediate_size", "max_position_embeddings")}
    return AutoConfig.for_model(model_type, **fields)


def save_model(config: PretrainedConfig, path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def stock_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """[num_tokens, vocab_size], uncached."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits


def greedy(engine: Engine, sequence_id: str, prompt: list[int], count: int, salt: str | None = None) -> list[int]:
    """Greedy continuation through the step contract, one token a step."""
    tokens, start = list(prompt), 0
    for _ in range(count):
        (output,) = engine.forward([SequenceStep(sequence_id, start, tokens[start:], 1, None if start else salt)])
        assert output.logits is not None, output
        start = len(tokens)
        tokens.append(int(output.logits[-1].argmax()))
    engine.free([sequence_id])
    return tokens[len(prompt) :]
