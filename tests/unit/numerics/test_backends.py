"""Both backends give the same bits; each row is its own formula; a fault ends its request's rows alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from pinned import PARAMETERS, PINNED, pinned_batch
from torch import Tensor

from eft_serve.numerics.backends import CpuBackend, SamplingBackend, TorchBackend, choose_backend
from eft_serve.numerics.combine import combine
from eft_serve.numerics.rows import RequestRows, RowBatch, Truncation, tiles
from eft_serve.types import SamplingParams

BACKENDS: list[SamplingBackend] = [CpuBackend(), TorchBackend(torch.device("cpu"))]
VOCAB, PADDING = 13, 3
backends = pytest.mark.parametrize("backend", BACKENDS, ids=["kernels", "torch"])


def request(
    coefficients: Sequence[float],
    num_rows: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    truncation: Truncation | None = None,
    **sampling: Any,
) -> RequestRows:
    """Random logits with padding that must not count."""
    generator = torch.Generator().manual_seed(seed)
    logits = [(torch.randn(num_rows, VOCAB + PADDING, generator=generator) * 3).to(dtype) for _ in coefficients]
    for term in logits:
        term[:, VOCAB:] = torch.nan
    return RequestRows(
        logits=logits,
        coefficients=coefficients,
        num_rows=num_rows,
        vocab_size=VOCAB,
        sampling=SamplingParams(**sampling),
        truncation=truncation,
    )


def combined(backend: SamplingBackend, requests: Sequence[RequestRows]) -> list[Tensor]:
    """Each request's rows."""
    batch = RowBatch(requests)
    logits, errors = backend.combine(batch)
    assert errors == {}
    return [logits[rows, : each.vocab_size] for each, rows in batch]


coefficient_lists = st.lists(st.sampled_from([-1.0, 0.0, 0.3, 1.0, 1.7]), min_size=1, max_size=4).filter(any)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(st.lists(st.tuples(coefficient_lists, st.integers(1, 3), dtypes), min_size=1, max_size=5))
def test_requests_of_any_terms_and_dtypes_are_combined_each_by_its_formula(
    kinds: list[tuple[list[float], int, torch.dtype]],
) -> None:
    requests = [request(c, n, seed=i, dtype=dtype) for i, (c, n, dtype) in enumerate(kinds)]
    by_backend = [combined(backend, requests) for backend in BACKENDS]
    for each, kernels, by_torch in zip(requests, *by_backend, strict=True):
        coefficients = torch.tensor([[c] * each.num_rows for c in each.coefficients])
        expected = combine([term[:, :VOCAB] for term in each.logits], coefficients)
        assert torch.equal(kernels, expected), "one bit is another distribution"
        assert torch.equal(by_torch, expected)


@backends
def test_an_impossible_token_of_a_running_term_is_impossible_and_of_another_is_not(backend: SamplingBackend) -> None:
    each = request([1.0, -1.0, 0.0])
    each.logits[0][0, 2] = each.logits[1][0, 2] = each.logits[1][0, 4] = -torch.inf
    each.logits[2][0, 5] = torch.nan
    (logits,) = combined(backend, [each])
    assert (logits[0] == -torch.inf).nonzero().flatten().tolist() == [2, 4]
    assert logits.isnan().sum() == 0


@backends
@pytest.mark.parametrize(
    ("coefficients", "poison", "message"),
    [
        ([1.0, 1.0], torch.nan, "NaN"),
        ([1.0, 1.0], torch.inf, "NaN or"),
        ([3.0, 1.0], 2e38, "overflow"),
        ([1.0, 1.0], -torch.inf, "no token is possible"),
    ],
)
def test_a_row_without_a_distribution_is_an_error_of_its_own_request(
    backend: SamplingBackend, coefficients: list[float], poison: float, message: str
) -> None:
    healthy, faulty = request([1.0, -1.0, 1.0], 2, temperature=0.0), request(coefficients, 2, temperature=1.0)
    where = slice(None) if poison == -torch.inf else 3
    faulty.logits[0][1, where] = poison
    batch = RowBatch([healthy, faulty, healthy])
    logits, errors = backend.combine(batch)
    assert list(errors) == [1]
    assert message in errors[1]
    assert len(backend.sample(batch, logits)) == 6, "garbage must not stop the kernel"
    assert torch.equal(logits[:2, :VOCAB], combined(backend, [healthy])[0])


@backends
@pytest.mark.parametrize(
    "flawed",
    [
        torch.zeros(1, VOCAB - 1),  # a head narrower than the tokenizer
        torch.zeros(0, VOCAB),
        torch.zeros(1, VOCAB, dtype=torch.float64),
        torch.zeros(VOCAB, 2).T[:1],
    ],
    ids=["narrow", "short", "float64", "strided"],
)
def test_logits_that_cannot_be_read_are_an_error_of_their_own_request(backend: SamplingBackend, flawed: Tensor) -> None:
    healthy, faulty = request([1.0]), request([1.0, -1.0])
    faulty = replace(faulty, logits=[faulty.logits[0], flawed])
    truncated = replace(faulty, truncation=Truncation(top_p=0.9, unscaled=[0, 1], ratio=[1, -1]))
    batch = RowBatch([faulty, healthy, truncated])
    logits, errors = backend.combine(batch)
    assert sorted(errors) == [0, 2]
    assert "term 1" in errors[0]
    assert torch.equal(logits[1:2, :VOCAB], combined(backend, [healthy])[0])
    assert len(backend.sample(batch, logits)) == 3


@given(st.integers(0, 2**32), st.floats(0, 1), st.sampled_from([0.5, 1.0, 1.5]))
def test_truncated_requests_are_the_same_alone_and_beside_others(seed: int, top_p: float, scale: float) -> None:
    truncation = Truncation(top_p=top_p, unscaled=[0.0, 0.0, 1.0], ratio=[scale, -scale, 0.0])
    truncated = request([scale, -scale, 1.0], 2, seed=seed, truncation=truncation)
    plain = request([1.0], 1)
    for backend in BACKENDS:
        together, alone = combined(backend, [plain, truncated]), combined(backend, [truncated])
        assert torch.equal(together[1], alone[0])
    assert torch.equal(combined(BACKENDS[0], [truncated])[0], combined(BACKENDS[1], [truncated])[0])


@backends
def test_a_truncated_request_without_a_distribution_is_an_error_of_its_own(backend: SamplingBackend) -> None:
    truncated = request([1.0, -1.0, 1.0], truncation=Truncation(top_p=0.9, unscaled=[0, 0, 1], ratio=[1, -1, 0]))
    truncated.logits[2][0, 1] = torch.nan
    _, errors = backend.combine(RowBatch([request([1.0]), truncated]))
    assert list(errors) == [1]


@backends
@pytest.mark.parametrize(
    ("base", "reference", "tuned"),
    [
        ([-torch.inf, 0.0], [0.0, 0.0], [0.0, -torch.inf]),  # each part has a possible token, both together none
        ([3e38, 0.0], [-3e38, 0.0], [3e38, 0.0]),
    ],
    ids=["nothing possible", "overflow"],
)
def test_a_truncated_combination_without_a_distribution_is_an_error(
    backend: SamplingBackend, base: list[float], reference: list[float], tuned: list[float]
) -> None:
    each = RequestRows(
        logits=[torch.tensor([term]) for term in (base, reference, tuned)],
        coefficients=[1.0, -1.0, 1.0],
        num_rows=1,
        vocab_size=2,
        sampling=SamplingParams(top_p=0.9),
        truncation=Truncation(top_p=0.9, unscaled=[0, 0, 1], ratio=[1, -1, 0]),
    )
    batch = RowBatch([each])
    logits, errors = backend.combine(batch)
    assert list(errors) == [0]
    assert len(backend.sample(batch, logits)) == 1


def test_terms_that_count_for_nothing_combine_to_zero() -> None:
    for backend in BACKENDS:
        (logits,) = combined(backend, [request([0.0, 0.0])])
        assert logits.tolist() == [[0.0] * VOCAB]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf], ids=["nan", "impossible"])
@pytest.mark.parametrize("filtered", [{}, {"top_p": 0.9}, {"top_k": 3}, {"top_k": 3, "top_p": 0.5}, {"min_p": 0.5}])
def test_rows_without_a_number_end_the_kernel_all_the_same(poison: float, filtered: dict[str, float]) -> None:
    batch = RowBatch([request([1.0], **filtered)])  # type: ignore[arg-type]
    assert len(CpuBackend().sample(batch, torch.full((1, VOCAB), poison))) == 1


@pytest.mark.timeout(20)
@pytest.mark.parametrize("filtered", [{"top_k": 1000}, {"top_p": 0.5}, {"top_p": 0.9}])
def test_logits_that_rise_and_fall_over_the_ids_are_filtered_in_linear_time(filtered: dict[str, float]) -> None:
    vocab = 128_256
    ids = torch.arange(vocab)
    each = RequestRows(
        logits=[(torch.minimum(ids, vocab - ids) / vocab * 6)[None]],
        coefficients=[1.0],
        num_rows=1,
        vocab_size=vocab,
        sampling=SamplingParams(**filtered),  # type: ignore[arg-type]
    )
    batch = RowBatch([each] * 4)
    backend = CpuBackend()
    started = time.perf_counter()
    backend.sample(batch, backend.combine(batch)[0])
    assert time.perf_counter() - started < 4, "seconds a row: some order of the values is quadratic"


@backends
def test_rows_of_several_vocabularies_draw_below_their_own(backend: SamplingBackend) -> None:
    narrow = RequestRows(
        logits=[torch.arange(20.0)[None]], coefficients=[1.0], num_rows=1, vocab_size=4, sampling=SamplingParams()
    )
    batch = RowBatch([narrow, request([1.0], temperature=0.0)] * 20)
    logits, _ = backend.combine(batch)
    assert max(backend.sample(batch, logits)[::2]) < 4


@backends
@pytest.mark.parametrize("vocab", [3000, 128_256])
@pytest.mark.parametrize("name", PARAMETERS)
def test_seeded_tokens_are_those_that_earlier_versions_drew(backend: SamplingBackend, name: str, vocab: int) -> None:
    """Recorded before the kernels existed: a seed must mean the same after an upgrade."""
    batch = RowBatch(pinned_batch(name, vocab))
    assert backend.sample(batch, backend.combine(batch)[0]) == PINNED[f"{name}-{vocab}"]


def test_tiles_split_between_requests_and_leave_none_out() -> None:
    requests = [request([1.0], n) for n in (1, 2, 5, 1, 1)]
    assert list(tiles(requests, 3 * VOCAB)) == [range(2), range(2, 3), range(3, 5)]
    assert list(tiles(requests, 1)) == [range(i, i + 1) for i in range(5)]
    assert list(tiles(requests, 10**9)) == [range(5)]
    assert list(tiles([], 5)) == []


def test_a_gpu_that_is_not_there_is_refused_by_name() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=r"coordinator\.device"):
        choose_backend("cuda")
    assert isinstance(choose_backend("auto"), CpuBackend)
