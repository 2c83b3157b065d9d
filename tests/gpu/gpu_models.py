"""Small random models on a device: in plain transformers, and behind the engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from eft_serve.config import ModelConfig
from eft_serve.engine import varlen_attention
from eft_serve.engine.engine import Engine
from eft_serve.engine.model_runner import ModelRunner

VOCAB_SIZE, CONTEXT, WINDOW = 512, 256, 24
_SIZE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "ffn_hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,  # of 64
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.1,
}
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2-sliding": {"sliding_window": WINDOW, "max_window_layers": 2},
    "gemma2": {"sliding_window": WINDOW, "head_dim": 64, "query_pre_attn_scalar": 64},
}
_CONTRACT = {"scale", "window_size", "enable_gqa"}


def save(architecture: str, path: Path) -> Path:
    """In bfloat16, so that every dtype loads the same numbers."""
    torch.manual_seed(0)
    config = build_config(architecture, **_SIZE, **_OWN.get(architecture, {}))
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    return path


class Stock:
    """A checkpoint in plain transformers, uncached, in any dtype."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        self._device = device
        self._models: dict[str, PreTrainedModel] = {}

    @torch.no_grad()
    def logits(self, dtype: str, token_ids: list[int]) -> Tensor:
        """[num_tokens, vocab_size] float32 on the CPU."""
        ids = torch.tensor([token_ids], device=self._device)
        logits: Tensor = self._model(dtype)(ids, use_cache=False).logits[0]
        return logits.float().cpu()

    def exact(self, token_ids: list[int]) -> Tensor:
        """In float32: what rounding errors are measured from."""
        return self.logits("float32", token_ids)

    def _model(self, dtype: str) -> PreTrainedModel:
        if dtype not in self._models:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                self._path, dtype=getattr(torch, dtype), attn_implementation="eager"
            )
            self._models[dtype] = model.to(self._device)  # type: ignore[arg-type]
        return self._models[dtype]


def load_engine(
    path: Path,
    device: torch.device,
    dtype: str,
    backend: str | None,
    monkeypatch: pytest.MonkeyPatch,
    **settings: Any,
) -> Engine:
    """An engine in this process that runs its model by this backend, or by the one that it finds."""
    if not _has_deepspeed():
        monkeypatch.setattr(ModelRunner, "_init_inference", lambda runner, _: runner.model.to(runner.device))
    if not has_contract():
        monkeypatch.setattr(varlen_attention, "_torch_kernel", lambda: _operator)
    if backend is not None:
        monkeypatch.setattr(ModelRunner, "backends", lambda runner: [backend])
    return Engine.load(path.name, ModelConfig(path=str(path), device=device.type, dtype=dtype, **settings))  # type: ignore[arg-type]


def _has_deepspeed() -> bool:
    """On one rank it only moves the model to the device, so the engine can be tested without it."""
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        return False
    return True


def has_contract() -> bool:
    """Whether torch's variable-length attention takes what the engine gives it: from 2.13 on."""
    return set(inspect.signature(varlen_attention._torch_kernel()).parameters) >= _CONTRACT


def flash_kernel() -> Callable[..., Any]:
    """Torch's variable-length attention; the operator below it where torch is older than the contract."""
    return varlen_attention._torch_kernel() if has_contract() else _operator


def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    lengths = query_starts, key_starts, longest_query, longest_key
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        *lengths,
        0.0,
        window_size == (-1, 0),
        False,
        scale=scale,
        window_size_left=window_size[0],
        window_size_right=window_size[1],
    )[0]
    return out
