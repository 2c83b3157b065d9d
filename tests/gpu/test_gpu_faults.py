"""A fault on the GPU ends its own request, in the CPU's words, and leaves its neighbours their bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_cases import COEFFICIENTS, TRUNCATION, cpu, request, run
from torch import Tensor

from eft_serve.numerics.backends import TorchBackend
from eft_serve.numerics.rows import RequestRows

VOCAB = 3000
FAULTS = {  # what one term's logits become from some column on, and what both say
    "nan": (torch.nan, 77, "NaN or +inf"),
    "infinite": (torch.inf, VOCAB - 1, "NaN or +inf"),
    "overflow": (3e38, 5, "the combination overflows float32"),
    "impossible": (-torch.inf, 0, "no token is possible"),
}


def faulty(fault: str, seed: int, num_rows: int = 3) -> RequestRows:
    poison, first, _ = FAULTS[fault]
    each = request(VOCAB, COEFFICIENTS["scaled"], num_rows, seed, top_p=0.9)
    each.logits[0][1, first:VOCAB] = poison
    return each


def healthy(seed: int, dtype: torch.dtype = torch.float32) -> RequestRows:
    return request(VOCAB, COEFFICIENTS["eft"], 2, seed, dtype, top_p=0.9)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_without_a_distribution_ends_its_request_alone(device: torch.device, fault: str) -> None:
    requests = [healthy(0), faulty(fault, 1), healthy(2), healthy(3, torch.bfloat16), faulty(fault, 4)]
    logits, tokens, errors = run(TorchBackend(device), requests)
    expected_logits, expected, expected_errors = run(cpu(), requests)
    assert sorted(errors) == sorted(expected_errors) == [1, 4]
    assert all(FAULTS[fault][2] in message for message in [*errors.values(), *expected_errors.values()])
    assert errors == run(TorchBackend(torch.device("cpu")), requests)[2], "the words depend on no device"
    for index in (0, 2, 3):
        assert torch.equal(logits[index], expected_logits[index])
        assert tokens[index] == expected[index]
    assert all(not logits[index].any() for index in errors)


@pytest.mark.parametrize("fault", ["nan", "infinite", "impossible"])
def test_a_truncated_request_without_a_distribution_ends_alone(device: torch.device, fault: str) -> None:
    requests = [healthy(0), replace(faulty(fault, 1), truncation=TRUNCATION), healthy(2)]
    logits, _, errors = run(TorchBackend(device), requests)
    assert errors == run(cpu(), requests)[2]
    assert list(errors) == [1]
    assert torch.equal(logits[2], run(cpu(), [requests[2]])[0][0])


@pytest.mark.parametrize(
    "flawed",
    [
        torch.zeros(2, VOCAB - 1),
        torch.zeros(0, VOCAB),
        torch.zeros(2, VOCAB, dtype=torch.float64),
        torch.zeros(VOCAB, 2).T,
    ],
    ids=["narrow", "short", "float64", "strided"],
)
def test_logits_that_cannot_be_read_end_their_request_alone(device: torch.device, flawed: Tensor) -> None:
    bad = replace(healthy(1), logits=[*healthy(1).logits[:2], flawed])
    requests = [healthy(0), bad, healthy(2)]
    logits, tokens, errors = run(TorchBackend(device), requests)
    expected_logits, expected, expected_errors = run(cpu(), requests)
    assert errors == expected_errors
    assert list(errors) == [1]
    assert torch.equal(logits[2], expected_logits[2])
    assert tokens[2] == expected[2]


def test_a_fault_leaves_the_device_usable(device: torch.device) -> None:
    backend = TorchBackend(device)
    for fault in FAULTS:
        run(backend, [faulty(fault, 1), healthy(0)])
    assert run(backend, [healthy(5)])[1] == run(cpu(), [healthy(5)])[1]
