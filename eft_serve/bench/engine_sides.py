"""Three ways to compute the same step of one model: our engine, stock transformers, and its matrix products alone.

Each has weights of its own: shared ones would be warm in the cache for the side that comes second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from eft_serve.config import ModelConfig
from eft_serve.engine.engine import Engine
from eft_serve.types import SequenceStep

KV_CACHE_TOKENS = 32 * 512


class Side(Protocol):
    """Holds a batch of sequences of one length."""

    def forward(self, token_ids: Tensor) -> None:
        """Append [batch, num_tokens] and compute the last logits."""
        ...

    def end(self) -> None:
        """Forget the sequences."""
        ...


class Ours:
    """The engine behind the step contract."""

    def __init__(self, checkpoint: Path) -> None:
        self._engine = Engine.load("bench", ModelConfig(path=str(checkpoint), kv_cache_tokens=KV_CACHE_TOKENS))
        self._num_computed = 0
        self._names: list[str] = []

    def forward(self, token_ids: Tensor) -> None:
        self._names = [str(row) for row in range(len(token_ids))]
        steps = [
            SequenceStep(name, self._num_computed, row, 1)
            for name, row in zip(self._names, token_ids.tolist(), strict=True)
        ]
        if any(output.logits is None for output in self._engine.forward(steps)):
            raise RuntimeError("the engine did not compute a step")
        self._num_computed += token_ids.shape[1]

    def end(self) -> None:
        self._engine.free(self._names)
        self._num_computed = 0


class Stock:
    """transformers as it is: its cache, its attention."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = load_stock(checkpoint)
        self._cache = DynamicCache()

    @torch.inference_mode()
    def forward(self, token_ids: Tensor) -> None:
        self._model(token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def end(self) -> None:
        self._cache = DynamicCache()


class MatrixFloor:
    """The matrix products that no implementation of this step can leave out, and nothing else.

    Args:
        checkpoint: weights are used as it stores them.
        num_tokens: the most that one sequence will hold.
        batch: the most sequences at a time.
        with_attention: with attention's two products over keys and values that already lie in the right order.
    """

    def __init__(self, checkpoint: Path, num_tokens: int, batch: int, with_attention: bool) -> None:
        model = load_stock(checkpoint)
        config = model.config
        self._heads, self._head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self._layers = [_products(model, layer) for layer in range(config.num_hidden_layers)]
        self._head = model.lm_head.weight.detach().clone()
        self._hidden = torch.randn(batch * num_tokens, config.hidden_size)
        self._inner = torch.randn(batch * num_tokens, config.intermediate_size)
        shape = (config.num_hidden_layers, 2, batch * self._heads, num_tokens, self._head_dim)
        self._cached = torch.randn(shape) if with_attention else None
        self._num_computed = 0

    @torch.inference_mode()
    def forward(self, token_ids: Tensor) -> None:
        batch, num_tokens = token_ids.shape
        self._num_computed += num_tokens
        x, inner = self._hidden[: batch * num_tokens], self._inner[: batch * num_tokens]
        for layer, (query, key, value, output, gate, up, down) in enumerate(self._layers):
            queries = linear(x, query)
            linear(x, key)
            linear(x, value)
            self._attend(layer, queries.view(batch * self._heads, num_tokens, self._head_dim))
            linear(x, output)
            linear(x, gate)
            linear(x, up)
            linear(inner, down)
        linear(x[:batch], self._head)

    def _attend(self, layer: int, queries: Tensor) -> None:
        if self._cached is not None:
            keys, values = self._cached[layer, :, : len(queries), : self._num_computed]
            torch.bmm(torch.bmm(queries, keys.transpose(1, 2)), values)

    def end(self) -> None:
        self._num_computed = 0


def load_stock(checkpoint: Path) -> LlamaForCausalLM:
    """The model as transformers serves it on a CPU."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
    )
    if not isinstance(model, LlamaForCausalLM):
        raise TypeError(f"{checkpoint}: {type(model).__name__} is no Llama, whose products are known here")
    model.train(False)
    return model


def _products(model: LlamaForCausalLM, layer: int) -> list[Tensor]:
    block = model.model.layers[layer]
    attention, mlp = block.self_attn, block.mlp
    modules = (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )
    return [module.weight.detach().clone() for module in modules]
