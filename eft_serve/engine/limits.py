"""Which models can be served exactly, and how long their sequences may be; reads no file."""

from __future__ import annotations

from transformers import PretrainedConfig

from eft_serve.checkpoints.config_fields import BATCH_DEPENDENT_ROPE, CONTEXT_FIELDS, KV_HEADS_FIELDS
from eft_serve.config import ModelConfig
from eft_serve.errors import CheckpointError


def check_served(config: PretrainedConfig, model: ModelConfig) -> None:
    """Refuse what cannot be served exactly.

    Raises:
        CheckpointError: with the field and the remedy.
    """
    _check_rope(config, model)
    if model.tensor_parallel == 1:
        return
    if config.model_type == "falcon" and not getattr(config, "new_decoder_architecture", False):
        raise CheckpointError(
            f"tensor_parallel: {model.tensor_parallel} for {model.path}: DeepSpeed cannot split Falcon models of the "
            "old decoder architecture (Falcon-7B); set tensor_parallel: 1"
        )
    if config.model_type in ("falcon", "bloom") and getattr(config, "alibi", config.model_type == "bloom"):
        raise CheckpointError(
            f"tensor_parallel: {model.tensor_parallel} for {model.path}: ALiBi models are not split; set "
            "tensor_parallel: 1"
        )
    heads = config.num_attention_heads
    kv_heads = next((value for name in KV_HEADS_FIELDS if (value := getattr(config, name, None))), heads)
    if heads % model.tensor_parallel or kv_heads % model.tensor_parallel:
        raise CheckpointError(
            f"tensor_parallel: {model.tensor_parallel} for {model.path} does not divide its {heads} attention heads "
            f"and {kv_heads} key-value heads; choose a divisor of both"
        )


def _check_rope(config: PretrainedConfig, model: ModelConfig) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters, *(nested for nested in parameters.values() if isinstance(nested, dict))]:
        limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        if rope.get("rope_type") not in BATCH_DEPENDENT_ROPE or not limit:
            continue
        if model.max_model_len is None or model.max_model_len > limit:
            raise CheckpointError(
                f"max_model_len: {model.path} scales its rotary embedding by the longest sequence of a batch "
                f"({rope['rope_type']}), so that one request would change another; set max_model_len: {limit} or less"
            )


def context_limit(config: PretrainedConfig, model: ModelConfig) -> int | None:
    """Tokens one sequence may hold, by the configuration and the checkpoint; None when neither limits it."""
    own = next((value for name in CONTEXT_FIELDS if (value := getattr(config, name, None))), None)
    asked = model.max_model_len
    if asked is not None and own is not None and asked > own:
        raise CheckpointError(f"max_model_len: {asked} exceeds the {own} tokens that {model.path} was made for")
    return asked or own
