"""The forward of the Llama line of models in as few operations as it takes; knows no sequences.

Llama, Mistral, Qwen2 and Qwen3 share one decoder layer (arXiv 2302.13971). Written out over the loaded model's own
modules it needs a third of the operations that `transformers` needs, and on a small batch the operations cost more than
what they compute. Query, key and value are one matrix product, gate and up another; the model's weights become views of
the joined matrices, so nothing is held twice. Ranks that DeepSpeed split are walked in the same way: what they reduce
happens inside `o_proj`, `down_proj` and `lm_head`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from eft_serve.engine.adapters import Adapters, Update
from eft_serve.engine.attention import Attention
from eft_serve.engine.layout import Layout
from eft_serve.engine.paged_tensors import PagedTensors
from eft_serve.engine.ragged_path import UnsupportedModelError
from eft_serve.engine.weights import PackedHead, input_major

_SAME_LAYER: dict[type[PreTrainedModel], Callable[[Any], int | None]] = {
    # Where each keeps a layer's sliding window. The probe is too short to reveal a window that was missed.
    LlamaForCausalLM: lambda attention: None,
    MistralForCausalLM: lambda attention: attention.config.sliding_window,
    Qwen2ForCausalLM: lambda attention: attention.sliding_window,
    Qwen3ForCausalLM: lambda attention: attention.sliding_window,
}

_FIXED_ROTARY = {"default", "linear", "llama3", "yarn"}  # a position's angles do not depend on how long the sequence is
_ROTARY_TABLE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Norm:
    """Root mean square norm (arXiv 1910.07467), on a CPU in float32 in three fifths of the time of torch's own."""

    weight: Tensor
    epsilon: float
    epsilon_tensor: Tensor | None

    @classmethod
    def of(cls, module: Any) -> _Norm:
        weight, epsilon = module.weight, module.variance_epsilon
        here = weight.device.type == "cpu" and weight.dtype == torch.float32
        return cls(weight, epsilon, torch.tensor(epsilon) if here else None)

    def __call__(self, states: Tensor) -> Tensor:
        if self.epsilon_tensor is None:
            return rms_norm(states, self.weight.shape, self.weight, self.epsilon)
        length: Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        variance = torch.addcmul(self.epsilon_tensor, length, length, value=1 / states.shape[-1])
        return (states * variance.rsqrt_()).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class _Joined:
    """Matrices with the same input as one product."""

    transposed: Tensor  # [num_inputs, num_outputs of all]
    bias: Tensor | None
    adapters: Adapters
    updates: Mapping[str, Update]  # by adapter

    @classmethod
    def of(cls, modules: Sequence[Any], adapters: Adapters) -> _Joined:
        """The modules' weights and biases become views of the joined ones."""
        weight = _stack([module.weight for module in modules])
        biases = [module.bias for module in modules]
        if len({bias is None for bias in biases}) > 1:
            raise UnsupportedModelError("some of the joined projections have a bias and some have none")
        return cls(weight.t(), None if biases[0] is None else _stack(biases), adapters, adapters.joined(modules))

    def __call__(self, states: Tensor) -> Tensor:
        if self.bias is None:
            product = torch.mm(states, self.transposed)  # `linear` takes several microseconds more
        else:
            product = torch.addmm(self.bias, states, self.transposed)
        return self.adapters.add(self.updates, states, product)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer, its matrices joined."""

    norm: _Norm
    qkv: _Joined  # hidden to (heads + 2 * kv_heads) * head_dim
    query_norm: _Norm | None
    key_norm: _Norm | None
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    output: Callable[[Tensor], Tensor]
    mlp_norm: _Norm
    gate_up: _Joined  # hidden to 2 * intermediate
    activation: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, module: Any, window: int | None, adapters: Adapters) -> _Layer:
        attention, mlp = module.self_attn, module.mlp
        has_norms = hasattr(attention, "q_norm")
        return cls(
            norm=_Norm.of(module.input_layernorm),
            qkv=_Joined.of([attention.q_proj, attention.k_proj, attention.v_proj], adapters),
            query_norm=_Norm.of(attention.q_norm) if has_norms else None,
            key_norm=_Norm.of(attention.k_norm) if has_norms else None,
            heads=attention.q_proj.weight.shape[0] // attention.head_dim,
            kv_heads=attention.k_proj.weight.shape[0] // attention.head_dim,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
            window=window,
            output=_product(attention.o_proj),
            mlp_norm=_Norm.of(module.post_attention_layernorm),
            gate_up=_Joined.of([mlp.gate_proj, mlp.up_proj], adapters),
            activation=_direct(mlp.act_fn),
            down=_product(mlp.down_proj),
        )

    def project(self, states: Tensor, rotary: _Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Query [num_tokens, heads, head_dim], key and value [num_tokens, kv_heads, head_dim], turned."""
        qkv = self.qkv(self.norm(states)).view(len(states), -1, self.head_dim)
        turned = qkv[:, : self.heads + self.kv_heads]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = turned.split([self.heads, self.kv_heads], dim=1)
            turned = torch.cat([self.query_norm(query), self.key_norm(key)], dim=1)
        turned = rotary.turn(turned)
        return turned[:, : self.heads], turned[:, self.heads :], qkv[:, self.heads + self.kv_heads :]

    def feed_forward(self, states: Tensor) -> Tensor:
        """[num_tokens, hidden]."""
        gate, up = self.gate_up(self.mlp_norm(states)).chunk(2, dim=1)
        return self.down(self.activation(gate).mul_(up))


@dataclass(frozen=True, slots=True)
class _Rotary:
    """Rotary embedding (arXiv 2104.09864) of one forward's positions."""

    cos: Tensor  # [num_tokens, 1, head_dim]
    sin: Tensor  # the same, its first half negated

    @classmethod
    def of(cls, table: Tensor) -> _Rotary:
        cos, sin = table.chunk(2, dim=-1)
        return cls(cos, sin)

    @staticmethod
    def table(module: Any, states: Tensor, positions: Tensor) -> Tensor:
        """[num_tokens, 1, 2 * head_dim], what `of` takes."""
        cos, sin = module(states, positions[None])
        half = sin.shape[-1] // 2
        return torch.cat([cos[0], -sin[0, :, :half], sin[0, :, half:]], dim=-1)[:, None]

    def turn(self, states: Tensor) -> Tensor:
        """[num_tokens, heads, head_dim]."""
        return torch.addcmul(states * self.cos, states.roll(states.shape[-1] // 2, dims=-1), self.sin)


class CompactPath:
    """All rows in one forward, written out."""

    name = "compact"

    def __init__(self, model: PreTrainedModel, attention: Attention, adapters: Adapters) -> None:
        window_of = _SAME_LAYER.get(type(model))
        if window_of is None:
            raise UnsupportedModelError(f"{type(model).__name__} has layers of another kind")
        self._model: Any = model
        self._attention = attention
        self._adapters = adapters
        self._layers = [_Layer.of(layer, window_of(layer.self_attn), adapters) for layer in self._model.model.layers]
        self._embed = _direct(self._model.model.embed_tokens)
        self._norm = _Norm.of(self._model.model.norm)
        self._rotary_table = self._whole_rotary_table()
        self._packed = PackedHead(model.lm_head.weight) if PackedHead.suits(model.lm_head) else None

    def forward(self, layout: Layout, cache: PagedTensors) -> Tensor:
        """Logits [num_logits, vocab_size] in the order of `layout.logit_index`."""
        self._adapters.select(layout.groups)
        states = self._embed(layout.input_ids)
        rotary = _Rotary.of(self._rotary(states, layout.positions))
        for index, layer in enumerate(self._layers):
            query, key, value = layer.project(states, rotary)
            attended = self._attention(
                index, layout, cache, query, key, value, scaling=layer.scaling, window=layer.window
            )
            states = layer.output(attended.flatten(1)).add_(states)
            states = layer.feed_forward(states).add_(states)
        return self._head(self._norm(states[layout.logit_index]))

    def _rotary(self, states: Tensor, positions: Tensor) -> Tensor:
        if self._rotary_table is not None:
            return self._rotary_table.index_select(0, positions)
        return _Rotary.table(self._model.model.rotary_emb, states, positions)

    @torch.no_grad()
    def _whole_rotary_table(self) -> Tensor | None:
        """[max_position_embeddings, 1, 2 * head_dim]; None where it is large or angles follow the length."""
        module, weight = self._model.model.rotary_emb, self._norm.weight
        num_positions = self._model.config.max_position_embeddings
        num_bytes = num_positions * 2 * self._layers[0].head_dim * weight.dtype.itemsize
        if module.rope_type not in _FIXED_ROTARY or num_bytes > _ROTARY_TABLE_BYTES:
            return None
        return _Rotary.table(module, weight, torch.arange(num_positions, device=weight.device))

    def _head(self, states: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed(states)
        logits: Tensor = self._model.lm_head(states[None])[0]  # a split head takes three dimensions
        return logits


def _direct(module: Any) -> Callable[[Tensor], Tensor]:
    """What calling the module does, without looking for hooks where there are none."""
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    called: Callable[[Tensor], Tensor] = module if has_hooks else module.forward
    return called


def _product(module: Any) -> Callable[[Tensor], Tensor]:
    """What the module makes of [num_tokens, num_inputs]; a plain matrix is multiplied without asking the module."""
    is_plain = type(module) is nn.Linear and module.bias is None and "forward" not in vars(module)
    if not is_plain or module._forward_hooks or module._forward_pre_hooks:
        return _direct(module)
    transposed = module.weight.t()
    return lambda states: torch.mm(states, transposed)


def _stack(parameters: Sequence[nn.Parameter]) -> Tensor:
    with torch.no_grad():
        joined = input_major(torch.cat([parameter.data for parameter in parameters]))
        for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
    return joined
