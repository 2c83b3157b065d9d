"""Seeded tokens that were recorded before the kernels existed, and the batches that they were drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eft_serve.numerics.rows import RequestRows
from eft_serve.types import SamplingParams

PINNED: dict[str, list[int]] = json.loads((Path(__file__).parent / "pinned_tokens.json").read_text())
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "t1": {},
    "t07_p09": {"temperature": 0.7, "top_p": 0.9},
    "t13_k40": {"temperature": 1.3, "top_k": 40},
    "t1_k50_p08_m01": {"top_k": 50, "top_p": 0.8, "min_p": 0.1},
    "t1_m005": {"min_p": 0.05},
}


def pinned_logits(term: int, num_rows: int, vocab: int) -> Tensor:
    """By integer arithmetic, so that no library's generator can change them."""
    index = np.arange(num_rows * vocab, dtype=np.uint64).reshape(num_rows, vocab) + np.uint64(term * 1_000_003)
    bits = index * np.uint64(0x9E3779B97F4A7C15)
    bits ^= bits >> np.uint64(29)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(32)
    return torch.from_numpy((12 * ((bits >> np.uint64(44)).astype(np.float64) / 2**20) ** 6).astype(np.float32))


def pinned_batch(name: str, vocab: int) -> list[RequestRows]:
    """Eight requests, drawn in the way of this name."""
    terms = [pinned_logits(term, 8, vocab) for term in range(3)]
    return [
        RequestRows(
            logits=[term[row : row + 1] for term in terms],
            coefficients=[1.0, -1.0, 1.0],
            num_rows=1,
            vocab_size=vocab,
            sampling=SamplingParams(seed=row * 7919 - 3, **PARAMETERS[name]),
            output_token_ids=[0] * (row * 13),
        )
        for row in range(8)
    ]
