"""A term's rows become one matrix, without a copy where they stand evenly in one buffer."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from eft_serve.coordinator.sampler import _stacked

ROWS, VOCAB, NUM_TOKENS = 6, 8, 7
answers = torch.arange(2 * ROWS * VOCAB, dtype=torch.float32).view(2, ROWS, VOCAB)
picks = st.lists(st.tuples(st.integers(0, 1), st.integers(0, ROWS - 1)), min_size=1, max_size=ROWS)


@given(picks)
def test_the_rows_come_in_their_order(picked: list[tuple[int, int]]) -> None:
    buffers = [answers[0].clone(), answers[1].clone()]
    got = _stacked([buffers[which][row : row + 1] for which, row in picked], NUM_TOKENS)
    assert torch.equal(got, torch.stack([answers[which, row, :NUM_TOKENS] for which, row in picked]))


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [2], [1, 3, 5], [2, 3]])
def test_rows_at_equal_distances_are_not_copied(chosen: list[int]) -> None:
    buffer = answers[0].clone()
    assert _stacked([buffer[row : row + 1] for row in chosen], NUM_TOKENS).data_ptr() == buffer[chosen[0]].data_ptr()


def test_rows_of_neighbouring_buffers_or_with_gaps_are_copied() -> None:
    memory = bytearray(4 * 4 * VOCAB)
    halves = [torch.frombuffer(memory, dtype=torch.float32, count=2 * VOCAB, offset=o) for o in (0, 8 * VOCAB)]
    halves[1].fill_(1.0)
    got = _stacked([halves[0][None, :VOCAB], halves[1][None, VOCAB:]], NUM_TOKENS)
    assert got.tolist() == [[0.0] * NUM_TOKENS, [1.0] * NUM_TOKENS]
    columns = answers[0].clone()
    assert torch.equal(_stacked([columns[:, :1].T, columns[:, 1:2].T], ROWS), columns.T[:2])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=5))
def test_blocks_of_several_rows_come_in_their_order(picked: list[tuple[int, int]]) -> None:
    buffer = answers[0].clone()
    got = _stacked([buffer[start : start + length] for start, length in picked], NUM_TOKENS)
    assert torch.equal(got, torch.cat([answers[0, start : start + length, :NUM_TOKENS] for start, length in picked]))


def test_blocks_that_follow_one_another_are_not_copied() -> None:
    buffer = answers[0].clone()
    assert _stacked([buffer[0:2], buffer[2:3], buffer[3:6]], NUM_TOKENS).data_ptr() == buffer.data_ptr()
