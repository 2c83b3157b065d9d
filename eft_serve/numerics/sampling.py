"""From combined logits to tokens: per-row temperature, top-k, top-p and min-p, in this order, then a keyed draw.

It knows rows and not requests. A row's token depends only on its own logits and parameters, never on its neighbours,
the number of threads or the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eft_serve.numerics import device_sampling
from eft_serve.numerics.kernels import drawing as kernels
from eft_serve.numerics.logprobs import require_possible
from eft_serve.numerics.sampling_rows import SamplingRows
from eft_serve.types import SamplingParams


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """One token for each row, [num_rows] int64.

    Args:
        logits: [num_rows, vocab_size], floating, unnormalised; −inf is impossible.
        params: how each row is sampled.
        positions: of each row's token within the output.

    Raises:
        ValueError: a row has NaN, +inf or no possible token, or there are not as many parameters as rows.
    """
    if logits.dim() != 2 or not len(logits) == len(params) == len(positions):
        raise ValueError(f"logits: shape {tuple(logits.shape)} for {len(params)} rows of parameters")
    require_possible(logits)
    widths = np.full(len(logits), logits.shape[1])
    return sample_rows(logits.float().contiguous(), widths, SamplingRows.of(params, positions))


def sample_rows(logits: Tensor, widths: NDArray[np.int64], rows: SamplingRows) -> Tensor:
    """As `sample`, without checks: by the compiled kernel on a CPU, by torch elsewhere.

    Args:
        logits: [num_rows, at least the largest width] float32, contiguous.
        widths: [num_rows], columns that count.
        rows: how each is sampled.
    """
    if logits.device.type != "cpu":
        return device_sampling.sample_rows(logits, widths, rows)
    token_ids = np.empty(len(rows), np.int64)
    kernels.sample_rows(
        logits.numpy(), widths, rows.temperature, rows.top_k, rows.top_p, rows.log_min_p, rows.keys, token_ids
    )
    return torch.from_numpy(token_ids)
