"""Rows with and without truncation in one batch, each as if it were combined alone."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from eft_serve.coordinator.combining import combine_rows
from eft_serve.ensemble import Term

VOCAB = 13
knobs = st.sampled_from([-1.0, 0.0, 0.3, 1.0, 1.7])
rows_of_knobs = st.lists(st.tuples(knobs, knobs, st.sampled_from([0.0, 0.5, 0.9, 1.0])), min_size=1, max_size=6)


def eft(scale: float, weight: float, truncate_top_p: float) -> tuple[Term, ...]:
    ratio = scale if truncate_top_p < 1 else 0.0
    return (
        Term("base", "large", scale, ratio=ratio),
        Term("ref", "small", 1 - scale - weight, ratio=-ratio),
        Term("tuned", "chat", weight),
    )


def written_out(terms: Tensor, scale: float, weight: float, top_p: float) -> Tensor:
    """One row, token by token; [3, VOCAB] to [VOCAB]."""
    base, ref, tuned = torch.log_softmax(terms.double(), dim=-1)
    unscaled = torch.log_softmax(ref + weight * (tuned - ref), dim=-1)
    order = unscaled.argsort(descending=True).tolist()
    result, mass = unscaled.clone(), 0.0
    for token in order:
        if mass < top_p or token == order[0]:
            result[token] += scale * (base[token] - ref[token])
        mass += float(unscaled[token].exp())
    return torch.log_softmax(result, dim=-1).float()


@given(st.integers(0, 2**32), rows_of_knobs)
def test_each_row_is_its_own_formula(seed: int, rows: list[tuple[float, float, float]]) -> None:
    logits = torch.randn(3, len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    top_p = [row[2] for row in rows]
    got = combine_rows(list(logits), [eft(*row) for row in rows], top_p)
    for index, row in enumerate(rows):
        expected = written_out(logits[:, index], *row)
        torch.testing.assert_close(torch.log_softmax(got[index], dim=-1), expected, atol=1e-4, rtol=1e-4)
        alone = combine_rows(list(logits[:, index : index + 1]), [eft(*row)], [row[2]])
        assert torch.equal(alone[0], got[index]), "a neighbour changed a row"


def test_a_model_that_cancels_but_that_the_nucleus_needs_counts() -> None:
    """Scale 1 with weight 0: the reference's coefficient is 0, and yet the nucleus is its own."""
    logits = [torch.tensor([[0.0, 0.0, 0.0, 5.0]]), torch.tensor([[4.0, 3.0, 0.0, 0.0]])]
    terms = (Term("base", "large", 1.0, ratio=1.0), Term("ref", "small", 0.0, ratio=-1.0))
    got = torch.log_softmax(combine_rows(logits, [terms], [0.9]), dim=-1)
    base, ref = (torch.log_softmax(term[0], dim=-1) for term in logits)
    expected = torch.stack([base[0], base[1], ref[2], ref[3]])
    torch.testing.assert_close(got[0], torch.log_softmax(expected, dim=-1))


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_row_that_holds_no_number_is_refused(top_p: float) -> None:
    logits = [torch.zeros(2, VOCAB) for _ in range(3)]
    logits[2][1, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        combine_rows(logits, [eft(1.0, 1.0, top_p)] * 2, [top_p] * 2)
