"""Filters equal a naive reference that sorts one row at a time; tokens do not depend on the company."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from eft_serve.numerics import filters, sampling
from eft_serve.numerics.keyed_noise import gumbel, row_keys
from eft_serve.numerics.sampling import SamplingRows, draw, filtered_logprobs, sample

VOCAB = 40
EPSILON = 1e-5


def rows_of(*rows: dict[str, Any]) -> SamplingRows:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}
    return SamplingRows(**{name: torch.tensor([{**defaults, **row}[name] for row in rows]) for name in defaults})


def naive_survivors(logits: list[float], row: dict[str, Any], slack: float) -> set[int]:
    """Token ids left by temperature → top-k → top-p → min-p, ties with the last kept; `slack` widens top-p's edge."""
    peak = max(logits)
    weights = [math.exp((logit - peak) / row["temperature"]) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -weights[token])
    kept = order if row["top_k"] == 0 else [t for t in order if weights[t] >= weights[order[: row["top_k"]][-1]]]
    if row["top_p"] < 1:
        mass, before, least = sum(weights[token] for token in kept), 0.0, weights[kept[0]]
        for token in kept:
            if before / mass >= row["top_p"] + slack:
                break
            least, before = weights[token], before + weights[token]
        kept = [token for token in kept if weights[token] >= least]
    return {token for token in kept if weights[token] >= row["min_p"] * (1 - slack)}


parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 2.5]),
        "top_k": st.integers(0, VOCAB + 5),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
        "min_p": st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "position": st.integers(0, 2**40),
    }
)
# Halves make ties frequent and keep float32 exact.
distributions = st.lists(st.integers(-30, 10).map(lambda half: half / 2), min_size=VOCAB, max_size=VOCAB)


@pytest.mark.parametrize("windows", [(4, 16), (16,), (1024,)])
def test_filters_equal_the_naive_reference(windows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "WINDOWS", windows)

    @given(st.lists(st.tuples(distributions, parameters), min_size=1, max_size=5))
    def check(rows: list[tuple[list[float], dict[str, Any]]]) -> None:
        got = filtered_logprobs(torch.tensor([logits for logits, _ in rows]), rows_of(*(row for _, row in rows)))
        for logprobs, (logits, row) in zip(got, rows, strict=True):
            survivors = set(logprobs.isfinite().nonzero().flatten().tolist())
            assert naive_survivors(logits, row, -EPSILON) <= survivors <= naive_survivors(logits, row, EPSILON)
            assert logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
            tempered = torch.tensor([logits[token] / row["temperature"] for token in sorted(survivors)])
            torch.testing.assert_close(logprobs[sorted(survivors)], tempered.log_softmax(-1), atol=1e-4, rtol=1e-4)

    check()


@given(st.lists(st.tuples(distributions, parameters), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_a_row_draws_the_same_token_in_any_company(rows: list[tuple[list[float], dict[str, Any]]], random: Any) -> None:
    rows[0] = (rows[0][0], {**rows[0][1], "temperature": 0.0})
    tokens = sample(torch.tensor([logits for logits, _ in rows]), rows_of(*(row for _, row in rows))).tolist()
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = [rows[index] for index in order]
    again = sample(torch.tensor([logits for logits, _ in shuffled]), rows_of(*(row for _, row in shuffled))).tolist()
    assert again == [tokens[index] for index in order]
    for (logits, row), token in zip(rows, tokens, strict=True):
        assert sample(torch.tensor([logits]), rows_of(row)).tolist() == [token]


@given(distributions, parameters)
def test_what_is_drawn_survived(logits: list[float], row: dict[str, Any]) -> None:
    token = sample(torch.tensor([logits]), rows_of(row))
    assert filtered_logprobs(torch.tensor([logits]), rows_of(row))[0, token].isfinite()


@given(st.integers(0, 2**40), st.floats(0.0, 30.0), st.sampled_from([100, 3000]), st.sampled_from([0.0, 1e4, -1e4]))
def test_the_draw_is_the_best_of_all_tokens_with_noise(seed: int, spread: float, vocab: int, level: float) -> None:
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(seed)) * spread + level
    seeds, positions = torch.full((4,), seed), torch.arange(4)
    noise = gumbel(row_keys(seeds.numpy(), positions.numpy())[:, None], np.arange(vocab))
    assert draw(logits, seeds, positions).tolist() == (noise + logits.numpy()).argmax(axis=-1).tolist()


def test_noise_is_worked_out_for_few_of_many_tokens() -> None:
    logits = (torch.randn(50, 30_000, generator=torch.Generator().manual_seed(1)) * 2).numpy()
    behind = logits - logits.max(axis=-1, keepdims=True)
    keys = row_keys(np.arange(50), np.zeros(50, dtype=np.int64))
    contenders = sampling._contenders(behind, keys, gumbel(keys, logits.argmax(axis=-1)))
    assert contenders.any(axis=-1).all()
    assert contenders.mean() < 0.01


def test_greedy_takes_the_lowest_id_on_ties_and_ignores_the_rest() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, [7, 9]] = 3.0
    params = rows_of({"temperature": 0.0, "seed": 5}, {"temperature": 0.0, "top_k": 3, "position": 8})
    assert sample(logits, params).tolist() == [0, 7]
    assert filtered_logprobs(logits, params).exp().nonzero().tolist() == [[0, 0], [1, 7]]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6])
def test_a_tiny_temperature_is_nearly_greedy(temperature: float) -> None:
    logits = torch.tensor([[1e4, 1e4 - 1.0, -1e4, -torch.inf]])
    assert sample(logits, rows_of({"temperature": temperature})).tolist() == [0]
    assert filtered_logprobs(logits, rows_of({"temperature": temperature}))[0, 0].item() == 0.0


def test_a_huge_temperature_is_nearly_uniform_over_what_is_possible() -> None:
    logits = torch.tensor([[50.0, -50.0, 0.0, -torch.inf]])
    logprobs = filtered_logprobs(logits, rows_of({"temperature": 1e30}))
    torch.testing.assert_close(logprobs.exp(), torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_broken_row_is_refused(poison: float) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[2, 3] = poison
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        sample(logits, rows_of({}, {}, {}))
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        filtered_logprobs(torch.full((1, VOCAB), -torch.inf), rows_of({}))


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("temperature", math.nan), ("top_p", 1.5), ("top_k", -1), ("min_p", 2.0)]
)
def test_a_parameter_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}: out of range in rows \[1\]"):
        rows_of({}, {name: value})


def test_parameters_must_match_the_rows() -> None:
    with pytest.raises(ValueError, match="2 rows of parameters"):
        sample(torch.zeros(3, VOCAB), rows_of({}, {}))
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="seed: shape"):
        SamplingRows(ones, ones.long(), ones, ones, torch.ones(3, dtype=torch.int64), ones.long())


def test_a_window_that_misses_the_mass_falls_back_to_the_whole_vocabulary() -> None:
    flat: Tensor = torch.linspace(0.0, 1e-3, 4 * filters.WINDOWS[-1])[None]
    kept = filtered_logprobs(flat, rows_of({"top_p": 0.5})).isfinite().sum().item()
    assert kept == pytest.approx(2 * filters.WINDOWS[-1], abs=3)
    assert (
        filtered_logprobs(flat, rows_of({"top_k": 3 * filters.WINDOWS[-1]})).isfinite().sum() == 3 * filters.WINDOWS[-1]
    )
