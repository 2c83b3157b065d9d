"""The up-scaling ratio counts inside the nucleus of each row and as 0 outside."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from eft_serve.numerics.combine import combine
from eft_serve.numerics.logprobs import log_softmax
from eft_serve.numerics.truncate import truncate_weights

NUM_ROWS, VOCAB = 3, 11
knobs = st.floats(-3, 3)
seeds = st.integers(0, 2**32)


def some_terms(seed: int) -> Tensor:
    """base, reference and tuned; [3, NUM_ROWS, VOCAB]."""
    return torch.randn(3, NUM_ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def spread(*values: float) -> Tensor:
    return torch.tensor(values)[:, None].expand(len(values), NUM_ROWS)


@given(seeds, knobs, knobs)
def test_truncating_at_one_is_the_plain_combination(seed: int, scale: float, weight: float) -> None:
    terms = some_terms(seed)
    plain = combine(terms, spread(scale, 1 - scale - weight, weight))
    truncated = truncate_weights(terms, spread(0, 1 - weight, weight), spread(scale, -scale, 0), torch.ones(NUM_ROWS))
    torch.testing.assert_close(log_softmax(truncated), log_softmax(plain), atol=1e-4, rtol=1e-4)


def test_the_ratio_counts_inside_the_nucleus_of_each_row_only() -> None:
    tuned = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(3, 4)
    base, ref = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(3, 4), torch.zeros(3, 4)
    terms, unscaled, confined = [base, ref, tuned], spread(0, 0, 1), spread(1, -1, 0)
    got = truncate_weights(terms, unscaled, confined, torch.tensor([0.0, 0.7, 1.0]))
    ratio = log_softmax(base) - log_softmax(ref)
    inside = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(got, tuned + ratio * inside)
    with pytest.raises(ValueError, match="top_p"):
        truncate_weights(terms, unscaled, confined, torch.tensor([0.0, 0.7, 1.1]))


def test_truncating_survives_tokens_impossible_in_both_terms_of_the_ratio() -> None:
    terms = some_terms(3)
    terms[:2, :, 4] = -torch.inf
    got = truncate_weights(terms, spread(0, 0, 1), spread(1, -1, 0), torch.ones(NUM_ROWS))
    assert got[:, 4].isneginf().all()
    assert not got.isnan().any()
    outside = truncate_weights(terms, spread(0, 0, 1), spread(1, -1, 0), torch.zeros(NUM_ROWS))
    assert outside[:, 4].isfinite().any()
