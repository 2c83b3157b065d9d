"""The parts whose bits the tokens rest on: mass, thresholds and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_cases import SAMPLING

from eft_serve.numerics import device_sampling, filters
from eft_serve.numerics.keyed_noise import gumbel, row_keys
from eft_serve.numerics.sampling_rows import SamplingRows
from eft_serve.types import SamplingParams

# Two logarithms, each within 2 units in the last place of a double, of values up to 37.
NOISE_TOLERANCE = 1e-14


def test_mass_has_the_same_bits_for_every_exponent(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat([torch.linspace(-90, 0, 1 << 20), -torch.rand(1 << 18, generator=generator) * 1e-3])
    expected = filters.mass(numbers)
    assert int(expected.max()) == 1 << 40
    assert torch.equal(filters.mass(numbers.to(device)).cpu(), expected)


@pytest.mark.parametrize("vocab", [300, 5000, 128_256])
def test_filtered_logits_are_the_same_bit_for_bit(device: torch.device, vocab: int) -> None:
    """Peaked rows are settled within the first window, flat ones by a full sort."""
    generator = torch.Generator().manual_seed(vocab)
    scales = torch.tensor([0.05, 0.5, 3.0, 10.0]).repeat_interleave(len(SAMPLING) - 1)[:, None]
    logits = torch.randn(len(scales), vocab, generator=generator) * scales
    params = [SamplingParams(**sampling) for name, sampling in SAMPLING.items() if name != "greedy"] * 4
    rows = SamplingRows.of(params, range(len(params)))
    ours = device_sampling.filtered_logits(logits.to(device), rows).cpu()
    assert torch.equal(ours, device_sampling.filtered_logits(logits, rows))


def test_equal_logits_at_a_threshold_are_all_kept(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0, -1.0]], device=device)
    rows = SamplingRows.of([SamplingParams(top_k=1)], [0])
    assert device_sampling.filtered_logits(logits, rows)[0].isfinite().tolist() == [True, True, False, True, False]


def test_a_tie_is_won_by_the_lowest_id(device: torch.device) -> None:
    logits = torch.zeros(3, 100_000, device=device)
    logits[1, 70_000:] = 2.0
    logits[2] = -torch.inf
    logits[2, 5:] = -0.0
    rows = SamplingRows.of([SamplingParams(temperature=0.0)] * 3, range(3))
    assert device_sampling.sample_rows(logits, np.full(3, 100_000), rows).tolist() == [0, 70_000, 5]


def test_noise_is_the_same_to_the_last_bits(device: torch.device) -> None:
    seeds = np.array([0, 1, -1, 2**63 - 1, -(2**63)])
    keys = row_keys(seeds, np.arange(len(seeds)))
    token_ids = torch.arange(128_256)
    ours = gumbel(keys, token_ids.to(device)).cpu()
    torch.testing.assert_close(ours, gumbel(keys, token_ids), atol=NOISE_TOLERANCE, rtol=0)
