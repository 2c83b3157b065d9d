"""A row's most likely tokens and its normaliser, by the compiled kernel, against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eft_serve.numerics.logprobs import top_logprobs

VALUES = st.sampled_from([-torch.inf, -80.0, -3.0, -1.0, 0.0, -0.0, 0.5, 7.0]) | st.floats(-50, 50, width=32)


@given(st.lists(VALUES, min_size=1, max_size=200), st.integers(0, 20), st.integers(0, 3), st.data())
def test_top_tokens_are_the_largest_and_the_lowest_ids_of_equals(
    values: list[float], num_top: int, padding: int, data: st.DataObject
) -> None:
    values[data.draw(st.integers(0, len(values) - 1))] = 1.0
    num_top = min(num_top, len(values))
    chosen = data.draw(st.integers(0, len(values) - 1))
    row = torch.tensor([values + [1e30] * padding])
    token_ids, logprobs = top_logprobs(row, len(values), [chosen], num_top)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert token_ids.tolist() == [[chosen, *order[:num_top]]]
    expected = torch.log_softmax(torch.tensor(values).double(), -1)
    assert logprobs[0].tolist() == pytest.approx([float(expected[i]) for i in token_ids[0]], abs=2e-5)


def test_many_rows_of_a_real_vocabulary_are_normalised() -> None:
    rows = torch.randn(5, 128_256, generator=torch.Generator().manual_seed(1)) * 4
    token_ids, logprobs = top_logprobs(rows, 128_256, [1, 2, 3, 4, 5], 20)
    expected = torch.log_softmax(rows.double(), -1)
    assert token_ids[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(token_ids[:, 1:], expected.topk(20).indices)
    assert torch.allclose(logprobs.double(), expected.gather(1, token_ids), atol=2e-6)


def test_logits_that_are_equal_only_relative_to_the_peak_are_in_order() -> None:
    token_ids, _ = top_logprobs(torch.tensor([[1.0, 18.0, 1.0000009536743164]]), 3, [0], 2)
    assert token_ids.tolist() == [[0, 1, 2]]


def test_rows_that_rise_take_no_longer_than_others() -> None:
    rows = torch.arange(128_256, dtype=torch.float32)[None] * 1e-6
    token_ids, _ = top_logprobs(rows, 128_256, [0], 20)
    assert token_ids[0, 1:].tolist() == sorted(range(128_236, 128_256), key=lambda i: (-float(rows[0, i]), i))
