"""Filters equal a naive reference that sorts one row at a time; tokens do not depend on the company or the device."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from eft_serve.numerics import device_sampling, filters
from eft_serve.numerics.device_sampling import filtered_logits
from eft_serve.numerics.keyed_noise import gumbel
from eft_serve.numerics.sampling import sample
from eft_serve.numerics.sampling_rows import SamplingRows
from eft_serve.types import SamplingParams

VOCAB = 40
EPSILON = 1e-5
Row = tuple[SamplingParams, int]  # and the position


def draw(logits: Tensor, rows: list[Row]) -> list[int]:
    tokens: list[int] = sample(logits, [params for params, _ in rows], [position for _, position in rows]).tolist()
    return tokens


def arrays(rows: list[Row]) -> SamplingRows:
    return SamplingRows.of([params for params, _ in rows], [position for _, position in rows])


def on_device(logits: Tensor, rows: list[Row]) -> list[int]:
    widths = np.full(len(logits), logits.shape[1])
    tokens: list[int] = device_sampling.sample_rows(logits, widths, arrays(rows)).tolist()
    return tokens


def naive_survivors(logits: list[float], row: SamplingParams, slack: float) -> set[int]:
    """Token ids left by temperature → top-k → top-p → min-p, ties with the last kept; `slack` widens top-p's edge."""
    peak = max(logits)
    weights = [math.exp((logit - peak) / row.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -weights[token])
    kept = order if row.top_k == 0 else [t for t in order if weights[t] >= weights[order[: row.top_k][-1]]]
    if row.top_p < 1:
        mass, before, least = sum(weights[token] for token in kept), 0.0, weights[kept[0]]
        for token in kept:
            if before / mass >= row.top_p + slack:
                break
            least, before = weights[token], before + weights[token]
        kept = [token for token in kept if weights[token] >= least]
    return {token for token in kept if weights[token] >= row.min_p * (1 - slack)}


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    seed=st.integers(0, 2**64 - 1),
)
rows_of_parameters = st.tuples(params, st.integers(0, 2**40))
# Halves make ties frequent and keep float32 exact.
distributions = st.lists(st.integers(-30, 10).map(lambda half: half / 2), min_size=VOCAB, max_size=VOCAB)
batches = st.lists(st.tuples(distributions, rows_of_parameters), min_size=2, max_size=6)


@pytest.mark.parametrize("windows", [(4, 16), (16,), (1024,)])
def test_torch_filters_on_any_rows_equal_the_naive_reference(
    windows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "WINDOWS", windows)

    @given(batches)
    def check(batch: list[tuple[list[float], Row]]) -> None:
        got = filtered_logits(torch.tensor([logits for logits, _ in batch]), arrays([row for _, row in batch]))
        for tempered, (logits, (row, _)) in zip(got, batch, strict=True):
            survivors = set(tempered.isfinite().nonzero().flatten().tolist())
            assert naive_survivors(logits, row, -EPSILON) <= survivors <= naive_survivors(logits, row, EPSILON)
            expected = torch.tensor([(logits[token] - max(logits)) / row.temperature for token in sorted(survivors)])
            torch.testing.assert_close(tempered[sorted(survivors)], expected)

    check()


@given(batches)
def test_the_kernel_on_any_rows_draws_the_tokens_of_torch(batch: list[tuple[list[float], Row]]) -> None:
    logits, rows = torch.tensor([logits for logits, _ in batch]), [row for _, row in batch]
    assert draw(logits, rows) == on_device(logits, rows)


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 2049, 40_000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_the_kernel_at_any_width_draws_the_tokens_of_torch(vocab: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(24, vocab, generator=generator) * scale
    logits[:, torch.randint(0, vocab, (vocab // 3,), generator=generator)] = -torch.inf
    logits[:, -1] = 0.0
    kinds = [{}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}, {"top_k": 7, "top_p": 0.5}, {"top_p": 0.0}]
    rows = [
        (SamplingParams(temperature=(0.0, 0.7, 1.0, 2.0)[i % 4], seed=i, **kinds[i % 6]), i)  # type: ignore[arg-type]
        for i in range(24)
    ]
    assert draw(logits, rows) == on_device(logits, rows)


def test_mass_in_torch_equals_that_of_the_kernel_to_the_last_unit() -> None:
    from eft_serve.numerics.kernels import drawing

    x = -torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 60
    assert filters.mass(x).tolist() == drawing._masses(x.numpy()).tolist()
    np.testing.assert_allclose(filters.mass(x).numpy() / 2**40, np.exp(x.double().numpy()), atol=1e-7)


@given(batches, st.randoms(use_true_random=False))
def test_a_row_in_any_company_draws_the_same_token(batch: list[tuple[list[float], Row]], random: Any) -> None:
    batch[0] = (batch[0][0], (msgspec.structs.replace(batch[0][1][0], temperature=0.0), 0))
    tokens = draw(torch.tensor([logits for logits, _ in batch]), [row for _, row in batch])
    order = list(range(len(batch)))
    random.shuffle(order)
    again = draw(torch.tensor([batch[i][0] for i in order]), [batch[i][1] for i in order])
    assert again == [tokens[index] for index in order]
    for (logits, row), token in zip(batch, tokens, strict=True):
        assert draw(torch.tensor([logits]), [row]) == [token]


@given(distributions, rows_of_parameters)
def test_what_is_drawn_survived_the_filters(logits: list[float], row: Row) -> None:
    token = draw(torch.tensor([logits]), [row])
    assert filtered_logits(torch.tensor([logits]), arrays([row]))[0, token].isfinite()


@given(st.integers(0, 2**40), st.floats(0.0, 30.0), st.sampled_from([100, 3000]), st.sampled_from([0.0, 1e4, -1e4]))
def test_a_draw_is_the_best_of_all_tokens_with_noise(seed: int, spread: float, vocab: int, level: float) -> None:
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(seed)) * spread + level
    rows = [(SamplingParams(seed=seed), position) for position in range(4)]
    noise = gumbel(arrays(rows).keys, torch.arange(vocab)).numpy()
    behind = (logits - logits.amax(dim=-1, keepdim=True)).numpy()
    assert draw(logits, rows) == (noise + behind).argmax(axis=-1).tolist()


def test_greedy_on_ties_takes_the_lowest_id_and_ignores_the_rest() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, [7, 9]] = 3.0
    logits[2] = -0.0
    logits[2, 5] = 0.0
    rows = [
        (SamplingParams(temperature=0.0, seed=5), 0),
        (SamplingParams(temperature=0.0, top_k=3), 8),
        (SamplingParams(temperature=0.0), 0),
    ]
    assert draw(logits, rows) == on_device(logits, rows) == [0, 7, 0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6])
def test_a_tiny_temperature_is_nearly_greedy(temperature: float) -> None:
    logits = torch.tensor([[1e4, 1e4 - 1.0, -1e4, -torch.inf]])
    assert draw(logits, [(SamplingParams(temperature=temperature), 0)]) == [0]


def test_a_huge_temperature_is_nearly_uniform_over_what_is_possible() -> None:
    rows = [(SamplingParams(temperature=1e30, seed=seed), 0) for seed in range(3000)]
    tokens = draw(torch.tensor([[50.0, -50.0, 0.0, -torch.inf]]).repeat(3000, 1), rows)
    counts = np.bincount(tokens, minlength=4)
    assert counts[3] == 0
    assert counts[:3].min() > 900


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_broken_row_is_refused(poison: float) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[2, 3] = poison
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        draw(logits, [(SamplingParams(), 0)] * 3)
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        draw(torch.full((1, VOCAB), -torch.inf), [(SamplingParams(), 0)])


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("temperature", math.nan), ("top_p", 1.5), ("top_k", -1), ("min_p", 2.0)]
)
def test_a_parameter_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_parameters_that_do_not_match_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows of parameters"):
        draw(torch.zeros(3, VOCAB), [(SamplingParams(), 0)] * 2)


@pytest.mark.parametrize("filtered", [{"top_p": 0.5}, {"top_k": 30_000}])
def test_a_flat_distribution_is_filtered_over_the_whole_vocabulary(filtered: dict[str, Any]) -> None:
    flat = torch.linspace(0.0, 1e-3, 60_000)[None]
    rows = [(SamplingParams(**filtered, seed=seed), 0) for seed in range(200)]
    tokens = draw(flat.repeat(200, 1), rows)
    assert min(tokens) >= 29_990
    assert min(tokens) < 32_000, "nobody drew from the far end of what is left"
    assert tokens == on_device(flat.repeat(200, 1), rows)
