"""Draft tokens are accepted up to the first that plain decoding would not have drawn."""

from __future__ import annotations

import pytest
import torch

from eft_serve.numerics.rows import RequestRows
from eft_serve.numerics.verify import verify
from eft_serve.types import SamplingParams


def rows(num_rows: int, drafted: list[int], forced: list[int] | None = None) -> RequestRows:
    return RequestRows(
        logits=[torch.zeros(num_rows, 10)],
        coefficients=[1.0],
        num_rows=num_rows,
        vocab_size=10,
        sampling=SamplingParams(),
        draft_token_ids=drafted,
        forced_token_ids=forced,
    )


@pytest.mark.parametrize(
    ("drawn", "drafted", "taken"),
    [
        ([7], [], [7]),
        ([7, 8, 9], [7, 8], [7, 8, 9]),
        ([7, 8, 9], [7, 5], [7, 8]),
        ([7, 8, 9], [5, 8], [7]),
        ([7, 8], [7, 8], [7, 8]),  # every row has a draft token: there is no row for one more
    ],
)
def test_draft_tokens_that_are_drawn_are_accepted_and_one_more_is_taken(
    drawn: list[int], drafted: list[int], taken: list[int]
) -> None:
    assert verify(rows(len(drawn), drafted), drawn) == taken


def test_forced_tokens_are_taken_whatever_is_drawn() -> None:
    assert verify(rows(2, [], forced=[3, 4]), [7, 8]) == [3, 4]
