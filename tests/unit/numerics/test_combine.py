"""The combination is the formula, for every row by itself, and impossible tokens stay impossible."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from eft_serve.numerics.combine import _with_care, combine
from eft_serve.numerics.logprobs import log_softmax

NUM_ROWS, VOCAB = 3, 11
knobs = st.floats(-3, 3)
seeds = st.integers(0, 2**32)


def some_terms(seed: int, count: int) -> Tensor:
    return torch.randn(count, NUM_ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def spread(values: list[float]) -> Tensor:
    return torch.tensor(values)[:, None].expand(len(values), NUM_ROWS)


@given(seeds, knobs, knobs, knobs)
def test_the_formula_on_logprobs(seed: int, scale: float, alpha: float, gamma: float) -> None:
    base, ref, tuned, other, other_ref = log_softmax(some_terms(seed, 5))
    wanted = ref + scale * (base - ref) + alpha * (tuned - ref) + gamma * (other - other_ref)
    got = combine([base, ref, tuned, ref, other, other_ref], spread([scale, 1 - scale, alpha, -alpha, gamma, -gamma]))
    torch.testing.assert_close(log_softmax(got), log_softmax(wanted), atol=1e-4, rtol=1e-4)


@given(seeds)
def test_scale_one_and_weight_zero_is_the_base(seed: int) -> None:
    terms = some_terms(seed, 4)
    assert torch.equal(combine(terms, spread([1.0, 0.0, 0.0, -0.0])), terms[0])


@given(seeds, knobs, knobs)
def test_one_model_in_every_role_is_that_model(seed: int, scale: float, alpha: float) -> None:
    model = some_terms(seed, 1)[0]
    got = combine([model] * 4, spread([scale, 1 - scale, alpha, -alpha]))
    torch.testing.assert_close(log_softmax(got), log_softmax(model), atol=1e-4, rtol=1e-4)


@given(seeds, st.floats(-50, 50), st.integers(0, 2))
def test_a_constant_added_to_a_term_changes_nothing(seed: int, constant: float, term: int) -> None:
    terms = some_terms(seed, 3)
    factors = spread([1.3, -0.7, 0.4])
    before = log_softmax(combine(terms, factors))
    terms[term] += constant
    torch.testing.assert_close(log_softmax(combine(terms, factors)), before, atol=1e-3, rtol=1e-4)


@given(seeds, st.lists(st.tuples(st.integers(0, 2), st.integers(0, VOCAB - 2)), max_size=8))
def test_impossible_in_any_running_term_is_impossible(seed: int, holes: list[tuple[int, int]]) -> None:
    terms = some_terms(seed, 3)
    for term, token in holes:
        terms[term, :, token] = -torch.inf
    factors = torch.tensor([[1.0, 1.0, 0.0], [-1.0, 2.0, 1.0], [0.5, -0.5, 0.0]])
    got = combine(terms, factors)
    running = factors[:, :, None] != 0
    wanted = (terms.isneginf() & running).any(dim=0)
    assert torch.equal(got.isneginf(), wanted)
    assert not got.isnan().any()
    assert not log_softmax(got).isnan().any()


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_a_zero_coefficient_contributes_nothing_whatever_it_holds(poison: float) -> None:
    terms = some_terms(0, 2)
    terms[1, 0] = poison
    got = combine(terms, torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]))
    assert torch.equal(got[0], terms[0, 0])
    assert torch.equal(got[1:], terms[0, 1:] + terms[1, 1:])


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_infinity_and_nan_name_the_term(poison: float) -> None:
    terms = some_terms(0, 3)
    terms[2, 1, 5] = poison
    with pytest.raises(ValueError, match=r"term 2 .* rows \[1\]"):
        combine(terms, spread([1.0, 1.0, 1.0]))


def test_a_row_without_a_possible_token_fails_closed() -> None:
    terms = some_terms(0, 2)
    terms[0, 1, :6] = -torch.inf
    terms[1, 1, 6:] = -torch.inf
    with pytest.raises(ValueError, match=r"no token is possible in rows \[1\]"):
        combine(terms, spread([1.0, 1.0]))


def test_what_overflows_or_does_not_fit_is_refused() -> None:
    terms = some_terms(0, 2)
    with pytest.raises(ValueError, match="overflows"):
        combine(terms * 1e37, spread([100.0, 1.0]))
    with pytest.raises(ValueError, match="coefficients"):
        combine(terms, spread([1.0]))
    with pytest.raises(ValueError, match="finite"):
        combine(terms, spread([1.0, math.nan]))
    with pytest.raises(ValueError, match="term 1"):
        combine([terms[0], terms[1, :, :-1]], spread([1.0, 1.0]))
    with pytest.raises(ValueError, match="no term"):
        combine([], torch.zeros(0, NUM_ROWS))


@given(seeds, st.permutations(range(NUM_ROWS)))
def test_rows_do_not_know_their_neighbours(seed: int, order: list[int]) -> None:
    terms, factors = some_terms(seed, 3), torch.tensor([[1.0, 0.5, 0.0], [-1.0, 2.0, 1.0], [0.5, 0.0, 0.1]])
    together = combine(terms, factors)
    assert torch.equal(combine(terms[:, order], factors[:, order]), together[order])
    assert torch.equal(combine(terms[:, :1], factors[:, :1]), together[:1])


poisons = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, NUM_ROWS - 1),
        st.integers(0, VOCAB - 1),
        st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38, 0.0, -0.0]),
    ),
    max_size=6,
)
factor_lists = st.lists(st.sampled_from([1.0, -1.0, 0.0, -0.0, 0.3, 2.0]), min_size=9, max_size=9)


def outcome(compute: Callable[[], Tensor]) -> list[int] | str:
    """The bits, or what is wrong."""
    try:
        return compute().view(torch.int32).flatten().tolist()
    except ValueError as error:
        return str(error)


@given(seeds, poisons, factor_lists, st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_quick_way_and_the_careful_one_agree_on_every_row(
    seed: int, poison: list[tuple[int, int, int, float]], values: list[float], dtype: torch.dtype
) -> None:
    terms, factors = some_terms(seed, 3), torch.tensor(values).view(3, NUM_ROWS)
    for term, row, token, value in poison:
        terms[term, row, token] = value
    terms = terms.to(dtype)
    careful = outcome(lambda: _with_care(list(terms), factors, range(NUM_ROWS)))
    assert outcome(lambda: combine(terms, factors)) == careful
    alone = [outcome(lambda row=row: combine(terms[:, [row]], factors[:, [row]])) for row in range(NUM_ROWS)]  # type: ignore[misc]
    if isinstance(careful, str):
        assert any(isinstance(one, str) for one in alone)
    else:
        assert [bit for one in alone for bit in one] == careful


def test_combining_changes_no_input() -> None:
    terms = some_terms(2, 1)
    combine(terms, spread([1.0])).zero_()
    assert terms.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_terms_are_combined_in_float32(dtype: torch.dtype) -> None:
    terms = some_terms(1, 2).to(dtype)
    got = combine(terms, spread([1.1, 0.3]))
    torch.testing.assert_close(got, 1.1 * terms[0].float() + 0.3 * terms[1].float())


def test_log_softmax_of_nothing_possible_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        log_softmax(torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]]))
