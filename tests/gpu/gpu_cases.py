"""Batches of random rows, and how they are combined and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from eft_serve.numerics.backends import CpuBackend, Errors, SamplingBackend
from eft_serve.numerics.rows import RequestRows, RowBatch, Truncation
from eft_serve.types import SamplingParams

PADDING = 64  # columns of the head that no token has
COEFFICIENTS = {  # of base, reference and one or two tuned models
    "eft": [1.0, -1.0, 1.0],
    "scaled": [1.5, -1.5, 1.0],
    "halfway": [0.6, 0.4],
    "two tuned": [1.0, -1.0, 0.7, 0.3],
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "t1": {},
    "t07_p09": {"temperature": 0.7, "top_p": 0.9},
    "t13_k40": {"temperature": 1.3, "top_k": 40},
    "m005": {"min_p": 0.05},
    "k50_p08_m01": {"top_k": 50, "top_p": 0.8, "min_p": 0.1},
}
TRUNCATION = Truncation(top_p=0.9, unscaled=[0.0, 0.0, 1.0], ratio=[1.5, -1.5, 0.0])  # of "scaled"


@cache
def cpu() -> CpuBackend:
    """Compiled at the first call."""
    return CpuBackend()


def request(
    vocab: int,
    coefficients: Sequence[float],
    num_rows: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    truncation: Truncation | None = None,
    **sampling: Any,
) -> RequestRows:
    """Random logits, peaked and flat in turns, with padding that must not count."""
    generator = torch.Generator().manual_seed(seed)
    scale = (3.0, 0.3)[seed % 2]
    logits = [(torch.randn(num_rows, vocab + PADDING, generator=generator) * scale).to(dtype) for _ in coefficients]
    for term in logits:
        term[:, vocab:] = torch.nan
        term[:, seed % vocab] = -torch.inf  # an impossible token
    return RequestRows(
        logits=logits,
        coefficients=coefficients,
        num_rows=num_rows,
        vocab_size=vocab,
        sampling=SamplingParams(seed=seed * 7919 - 3, **sampling),
        output_token_ids=[0] * (seed % 50),
        truncation=truncation,
    )


def run(backend: SamplingBackend, requests: Sequence[RequestRows]) -> tuple[list[Tensor], list[list[int]], Errors]:
    """Each request's combined logits and tokens, and the errors."""
    batch = RowBatch(requests)
    logits, errors = backend.combine(batch)
    drawn = backend.sample(batch, logits)
    return [logits[rows, : r.vocab_size].cpu() for r, rows in batch], [drawn[rows] for _, rows in batch], errors
