"""Names of the same `config.json` field in different kinds of model; reads nothing."""

from __future__ import annotations

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
HEADS_FIELDS = ("num_attention_heads", "n_head")
KV_HEADS_FIELDS = ("num_key_value_heads", "num_kv_heads")
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")  # rope types that scale by the longest sequence of a batch
