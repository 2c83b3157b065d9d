"""Keyed guessing changes no token, classic guessing no distribution; and the tests that say so can fail."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from eft_serve.numerics import speculative
from eft_serve.numerics.sampling import SamplingRows, filtered_logprobs, sample
from eft_serve.numerics.speculative import guess_seeds, take_classic, take_keyed

VOCAB = 6
NUM_DRAWS = 24_000
# Chi-square at significance 1e-4 with 5 and 35 degrees of freedom. Its power against a distribution that is 5 % off in
# total variation is above .99 at 24,000 draws (noncentrality at least 4 * 24,000 * .05 ** 2 = 240).
CRITICAL = {5: 25.7, 35: 77.1}


def params(count: int, **changes: Any) -> SamplingRows:
    fields = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0, **changes}
    return SamplingRows(**{k: v if isinstance(v, Tensor) else torch.full((count,), v) for k, v in fields.items()})


@given(st.data())
def test_keyed_guesses_change_no_token(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    drawn = [data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)) for n in lengths]
    guesses = [data.draw(st.lists(st.integers(0, 2), min_size=n - 1, max_size=n)) for n in lengths]
    taken = take_keyed([t for block in drawn for t in block], guesses, lengths)
    for tokens, own, guessed in zip(taken, drawn, guesses, strict=True):
        assert tokens == own[: len(tokens)]  # plain decoding\'s, as far as they go
        assert tokens[:-1] == guessed[: len(tokens) - 1]  # on which the rows depend
        if len(tokens) < len(own):
            assert tokens[-1] != guessed[len(tokens) - 1]


def speculate(p: Tensor, q: Tensor | None, rows: SamplingRows, num_guesses: int) -> list[list[int]]:
    """Many blocks of two positions: guesses from q (token 1 when q is None), judged against p; both [VOCAB]."""
    lengths = [2] * NUM_DRAWS
    all_p = p.expand(2 * NUM_DRAWS, -1).clone()
    if q is None:
        guesses = [[1] * num_guesses] * NUM_DRAWS
        return take_classic(all_p, None, rows, guesses, lengths)
    all_q = q.expand(2 * NUM_DRAWS, -1).clone()
    drafts = SamplingRows(rows.temperature, rows.top_k, rows.top_p, rows.min_p, guess_seeds(rows.seed), rows.position)
    guessed = sample(all_q, drafts).view(NUM_DRAWS, 2)[:, :num_guesses].tolist()
    return take_classic(all_p, all_q, rows, guessed, lengths)


def block_params(**changes: Any) -> SamplingRows:
    seeds = torch.arange(NUM_DRAWS).repeat_interleave(2)
    return params(2 * NUM_DRAWS, seed=seeds, position=torch.tensor([5, 6]).repeat(NUM_DRAWS), **changes)


def statistics(taken: list[list[int]], expected: Tensor) -> tuple[float, float]:
    """Chi-square of the first token, and of the pair where two were taken, given that they were."""
    first = torch.bincount(torch.tensor([t[0] for t in taken]), minlength=VOCAB).double()
    seconds = [t[1] for t in taken if len(t) > 1]
    second = torch.bincount(torch.tensor(seconds), minlength=VOCAB).double()
    return tuple(  # type: ignore[return-value]
        float(((seen - seen.sum() * expected) ** 2 / (seen.sum() * expected).clamp(min=1e-12)).sum())
        for seen in (first, second)
    )


P = torch.tensor([0.3, 1.2, -0.5, 0.9, 0.0, -1.1])
Q = torch.tensor([1.0, 0.4, 0.2, -0.8, 0.6, -0.3])


@pytest.mark.parametrize("q", [Q, P, None], ids=["drawn", "the same", "certain"])
@pytest.mark.parametrize("num_guesses", [1, 2])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_classic_guesses_change_no_distribution(q: Tensor | None, num_guesses: int, temperature: float) -> None:
    rows = block_params(temperature=temperature)
    expected = torch.softmax(P.double() / temperature, -1)
    first, second = statistics(speculate(P, q, rows, num_guesses), expected)
    assert first < CRITICAL[5]
    assert second < CRITICAL[5]


def test_filters_apply_to_both_sides() -> None:
    rows = block_params(top_k=3)
    taken = speculate(P, Q, rows, 2)
    expected = filtered_logprobs(P[None], params(1, top_k=3)).exp()[0].double()
    assert {t for tokens in taken for t in tokens} == set(expected.nonzero().flatten().tolist())
    assert statistics(taken, expected)[0] < CRITICAL[5]


def test_the_test_sees_a_rule_that_accepts_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "uniform", lambda keys: np.full(keys.shape, 1e-9))
    assert statistics(speculate(P, Q, block_params(), 1), torch.softmax(P.double(), -1))[0] > CRITICAL[5]


def test_the_test_sees_a_recovery_from_the_wrong_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "_residual", lambda p, q, fallen: p)
    assert statistics(speculate(P, Q, block_params(), 1), torch.softmax(P.double(), -1))[0] > CRITICAL[5]


def test_the_test_sees_noise_that_guess_and_verdict_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "separate", lambda seeds, purpose: seeds)
    rows = block_params()
    assert statistics(speculate(P, Q, rows, 1), torch.softmax(P.double(), -1))[0] > CRITICAL[5]


def test_acceptance_is_one_less_the_total_variation() -> None:
    taken = speculate(P, Q, block_params(), 1)
    variation = 0.5 * float((torch.softmax(P.double(), -1) - torch.softmax(Q.double(), -1)).abs().sum())
    accepted = sum(len(tokens) > 1 for tokens in taken) / NUM_DRAWS
    assert accepted == pytest.approx(1 - variation, abs=4 * 0.5 / NUM_DRAWS**0.5)


def test_greedy_rows_stand_exactly_where_the_most_likely_token_was_guessed() -> None:
    logits = torch.stack([P, P, Q, Q])
    rows = params(4, temperature=0.0)
    best_p, best_q = int(P.argmax()), int(Q.argmax())
    guess_logits = torch.stack([P, Q, Q, P])
    taken = take_classic(logits, guess_logits, rows, [[best_p, best_q], [best_q]], [2, 2])
    assert taken == [[best_p, best_p], [best_q, best_q]]


def test_what_does_not_look_at_its_neighbours() -> None:
    rows = block_params()
    together = speculate(P, Q, rows, 2)
    some = torch.tensor([6, 7, 100, 101])
    few = rows.select(some)
    drafts = SamplingRows(few.temperature, few.top_k, few.top_p, few.min_p, guess_seeds(few.seed), few.position)
    guessed = sample(Q.expand(4, -1).clone(), drafts).view(2, 2).tolist()
    alone = take_classic(P.expand(4, -1).clone(), Q.expand(4, -1).clone(), few, guessed, [2, 2])
    assert alone == [together[3], together[50]]
