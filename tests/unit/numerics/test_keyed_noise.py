"""The keyed draw is a softmax draw: chi-square over seeds and over positions, with a proof that the test can fail.

24,000 draws over 16 tokens (15 degrees of freedom), critical value at 1e-4: an honest draw fails one run in 10,000, and
all keys are fixed, so that the outcome never changes. A distribution with chi-square distance d = Σ (q−p)²/p moves the
statistic by 24,000·d: one that moves 5 % of every second token's probability (d ≈ .0025) adds 60 to a mean of 15 with a
standard deviation of about 16, so it is caught (limit 44.3) with a power of more than .97.
"""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from eft_serve.numerics.device_sampling import filtered_logits
from eft_serve.numerics.kernels import drawing
from eft_serve.numerics.keyed_noise import MAX_NOISE, MIN_NOISE, gumbel, row_keys, to_int64
from eft_serve.numerics.sampling import sample
from eft_serve.numerics.sampling_rows import SamplingRows
from eft_serve.types import SamplingParams

NUM_DRAWS, VOCAB = 24_000, 16
CRITICAL = 44.26  # chi-square, 15 degrees of freedom, upper 1e-4
int64s = st.integers(-(2**63), 2**63 - 1)


def logits_of_16() -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(7))


def chi_square(tokens: Tensor, probs: Tensor) -> float:
    expected = probs.double() * len(tokens)
    observed = torch.bincount(tokens, minlength=len(probs)).double()
    possible = expected > 0
    assert observed[~possible].sum() == 0
    return float(((observed - expected)[possible] ** 2 / expected[possible]).sum())


def draws(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    params = [SamplingParams(temperature=temperature, top_k=top_k, seed=seed) for seed in seeds.tolist()]
    return sample(logits.expand(NUM_DRAWS, VOCAB), params, positions.tolist())


COUNTING, FIXED = torch.arange(NUM_DRAWS), torch.full((NUM_DRAWS,), 1234567)
SPREAD_OUT = torch.randint(-(2**62), 2**62, (NUM_DRAWS,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [(COUNTING, FIXED), (FIXED, COUNTING), (SPREAD_OUT, FIXED), (COUNTING, COUNTING), (COUNTING << 40, FIXED)],
    ids=["seeds", "positions", "random-seeds", "both", "high-bits"],
)
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (1.7, 6)])
def test_the_draw_is_softmax(seeds: Tensor, positions: Tensor, temperature: float, top_k: int) -> None:
    logits = logits_of_16()
    one = SamplingRows.of([SamplingParams(temperature=temperature, top_k=top_k)], [0])
    probs = filtered_logits(logits[None], one)[0].softmax(dim=-1)
    assert chi_square(draws(logits, seeds, positions, temperature, top_k), probs) < CRITICAL


def test_the_chi_square_catches_a_distribution_that_is_five_percent_off() -> None:
    probs = logits_of_16().softmax(0)
    off = probs * torch.tensor([1.05, 0.95]).repeat(VOCAB // 2)
    assert chi_square(draws(off.log(), COUNTING, FIXED), probs) > CRITICAL


def test_the_chi_square_catches_noise_that_repeats() -> None:
    probs = logits_of_16().softmax(0)
    assert chi_square(draws(logits_of_16(), COUNTING % 500, FIXED), probs) > CRITICAL


def test_neighbouring_keys_draw_independently() -> None:
    """Pairs of successive positions, as one draw of 256 outcomes: 255 degrees of freedom, upper 1e-4 is 346."""
    tokens = draws(torch.zeros(VOCAB), FIXED, COUNTING)
    pairs = tokens[:-1:2] * VOCAB + tokens[1::2]
    assert chi_square(pairs, torch.full((VOCAB**2,), VOCAB**-2.0)) < 346


@given(int64s, int64s, st.lists(st.integers(0, 300_000), min_size=1, max_size=20, unique=True))
def test_noise_is_bounded_and_belongs_to_its_token(seed: int, position: int, tokens: list[int]) -> None:
    key = row_keys(np.array([seed]), np.array([position]))
    together = gumbel(key, torch.tensor(tokens))[0].numpy()
    assert ((together >= MIN_NOISE) & (together <= MAX_NOISE)).all()
    for token, noise in zip(tokens, together, strict=True):
        assert gumbel(key, torch.tensor([token])).item() == noise.item()


@given(int64s, st.lists(st.integers(0, 300_000), min_size=1, max_size=20))
def test_noise_of_the_kernel_is_that_of_torch(seed: int, tokens: list[int]) -> None:
    key = row_keys(np.array([seed]), np.array([0]))
    got = [drawing._gumbel(np.uint64(drawing._hash(key[0], token))) for token in tokens]
    np.testing.assert_allclose(got, gumbel(key, torch.tensor(tokens))[0].numpy(), rtol=1e-14)


def test_noise_is_pinned() -> None:
    """Seeded outputs must survive an upgrade: the numbers are SplitMix64's, worked out with Python's integers."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, position, token in [(0, 0, 0), (2**64 - 1, 5, 31999), (1 << 63, 2**33, 128_255)]:
        bits = mix((mix((mix((seed + golden) & mask) + position * golden) & mask) + (token + 1) * golden) & mask) >> 12
        wanted = -torch.tensor((bits + 0.5) / 2**52, dtype=torch.float64).log().neg().log()
        key = row_keys(np.array([to_int64(seed)]), np.array([position]))
        assert gumbel(key, torch.tensor([token])).item() == pytest.approx(wanted.item(), rel=1e-14)


def test_the_bounds_are_the_extremes_of_the_uniform() -> None:
    lowest, highest = torch.tensor([0.5, 2.0**52 - 0.5], dtype=torch.float64) * 2.0**-52
    assert -(-highest.log()).log() == pytest.approx(MAX_NOISE, rel=1e-12)
    assert -(-lowest.log()).log() == pytest.approx(MIN_NOISE, rel=1e-12)
