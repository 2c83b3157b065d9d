"""The GPU's backend gives the bits and the tokens of the CPU's."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from gpu_cases import COEFFICIENTS, SAMPLING, TRUNCATION, cpu, request, run
from pinned import PARAMETERS, PINNED, pinned_batch

from eft_serve.numerics.backends import CpuBackend, TorchBackend, choose_backend
from eft_serve.numerics.rows import RequestRows, RowBatch

ROWS = {3000: 40, 32_000: 10, 128_256: 3}  # of a request, by vocabulary
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Truncation normalises by a logarithm of a sum, in float32 on either device: values of about 30 and a few roundings.
TRUNCATED_TOLERANCE = 1e-4


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", ROWS)
def test_random_rows_combine_to_the_same_bits_and_draw_the_same_tokens(
    device: torch.device, vocab: int, dtype: str, name: str
) -> None:
    requests = [
        request(vocab, coefficients, ROWS[vocab], 2 * seed + flat, DTYPES[dtype], **SAMPLING[name])
        for seed, coefficients in enumerate(COEFFICIENTS.values())
        for flat in (0, 1)
    ]
    logits, tokens, errors = run(TorchBackend(device), requests)
    expected_logits, expected, expected_errors = run(cpu(), requests)
    assert errors == expected_errors == {}
    assert all(map(torch.equal, logits, expected_logits)), "one bit is another distribution"
    assert tokens == expected
    assert len({token for row in tokens for token in row}) > ROWS[vocab], "one token for all proves nothing"


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", ROWS)
def test_truncated_rows_agree_to_rounding_and_draw_the_same_tokens(
    device: torch.device, vocab: int, dtype: str, name: str
) -> None:
    requests = [
        request(vocab, COEFFICIENTS["scaled"], ROWS[vocab], seed, DTYPES[dtype], TRUNCATION, **SAMPLING[name])
        for seed in range(4)
    ]
    logits, tokens, errors = run(TorchBackend(device), requests)
    expected_logits, expected, _ = run(cpu(), requests)
    assert errors == {}
    for ours, theirs in zip(logits, expected_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TRUNCATED_TOLERANCE, rtol=0)
    assert tokens == expected


def mixed_requests(seed: int) -> list[RequestRows]:
    """Vocabularies, dtypes, terms, ways to draw, draft rows and truncation side by side."""
    choice = random.Random(seed)
    requests = []
    for number in range(24):
        truncated = number % 5 == 0
        coefficients = COEFFICIENTS["scaled"] if truncated else choice.choice([*COEFFICIENTS.values()])
        num_rows = choice.choice([1, 1, 1, 5])  # four draft tokens and what follows
        each = request(
            choice.choice([17, 3000, 32_000]),
            coefficients,
            num_rows,
            seed * 100 + number,
            choice.choice([*DTYPES.values()]),
            TRUNCATION if truncated else None,
            **choice.choice([*SAMPLING.values()]),
        )
        requests.append(replace(each, draft_token_ids=[1] * (num_rows - 1)))
    mixed_dtypes = [term.to(dtype) for term, dtype in zip(requests[1].logits, DTYPES.values(), strict=False)]
    requests[1] = replace(requests[1], logits=mixed_dtypes, coefficients=requests[1].coefficients[: len(mixed_dtypes)])
    return requests


@pytest.mark.parametrize("seed", range(4))
def test_requests_of_any_kind_in_one_batch_are_what_each_is_alone_on_a_cpu(device: torch.device, seed: int) -> None:
    requests = mixed_requests(seed)
    logits, tokens, errors = run(TorchBackend(device), requests)
    assert errors == {}
    for each, ours, drawn in zip(requests, logits, tokens, strict=True):
        (alone,), (expected,), _ = run(cpu(), [each])
        tolerance = 0.0 if each.truncation is None else TRUNCATED_TOLERANCE
        torch.testing.assert_close(ours, alone, atol=tolerance, rtol=0)
        assert drawn == expected


@pytest.mark.parametrize("vocab", [3000, 128_256])
@pytest.mark.parametrize("name", PARAMETERS)
def test_seeded_tokens_are_those_that_earlier_versions_drew(device: torch.device, name: str, vocab: int) -> None:
    backend, batch = TorchBackend(device), RowBatch(pinned_batch(name, vocab))
    assert backend.sample(batch, backend.combine(batch)[0]) == PINNED[f"{name}-{vocab}"]


def test_a_gpu_is_chosen_where_there_is_one(gpu: torch.device) -> None:
    assert isinstance(choose_backend("auto"), TorchBackend)
    assert isinstance(choose_backend("cuda"), TorchBackend)
    assert isinstance(choose_backend("cpu"), CpuBackend)
    logits, _ = choose_backend("auto").combine(RowBatch([request(50, [1.0], 1, 0)]))
    assert logits.device.type == gpu.type
