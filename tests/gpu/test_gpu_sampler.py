"""The whole pipeline on the GPU: the tokens, accepted draft tokens, components and faults of the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from gpu_cases import SAMPLING, cpu
from torch import Tensor

from eft_serve.coordinator.request import Request
from eft_serve.coordinator.sampler import Sampler, SamplerOutput
from eft_serve.errors import EftServeError, EngineError
from eft_serve.numerics.backends import SamplingBackend, TorchBackend
from eft_serve.types import Combination, GenerationRequest, Reward, SamplingParams, Term, TokenComponents

VOCAB = 5000
PADDING = 8
TERMS = (
    Term("base", "base", 1.5, ratio=1.5),
    Term("tuned", "tuned", 1.0, weight=1.0),
    Term("reference", "reference", -1.5, ratio=-1.5),
)
REWARDS = (Reward("helpful", "tuned", "reference", 0.7), Reward("odd", "base", "tuned", -0.2))
# A sum of 5000 exponentials in another order, and logarithms of about 20, in float32.
LOGPROB_TOLERANCE = 1e-4


def ready(
    seed: int,
    num_rows: int = 1,
    components: int | None = None,
    truncate_top_p: float = 1.0,
    forced: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    **sampling: Any,
) -> Request:
    """A request whose models have all answered."""
    generation = GenerationRequest(
        request_id=f"r{seed}",
        combination=Combination(TERMS, truncate_top_p, REWARDS),
        prompts={term.name: [1] for term in TERMS},
        sampling=SamplingParams(seed=seed, max_tokens=100, **sampling),
        components=components,
        forced_token_ids=forced,
    )
    request = Request.create(generation, 0.0)
    request.num_ids = VOCAB
    generator = torch.Generator().manual_seed(seed)
    for sequence in request.sequences:
        sequence.rows = (torch.randn(num_rows, VOCAB + PADDING, generator=generator) * 3).to(dtype)
    return request


def sampled(backend: SamplingBackend, requests: Sequence[Request], threads: int = 1) -> list[SamplerOutput]:
    outputs = Sampler(backend, threads, lambda *_: None).sample(requests)
    assert all(isinstance(output, SamplerOutput) for output in outputs), outputs
    return [output for output in outputs if isinstance(output, SamplerOutput)]


def assert_same(ours: Sequence[SamplerOutput], theirs: Sequence[SamplerOutput]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_ids == b.token_ids
        assert (a.components is None) == (b.components is None)
        for mine, other in zip(a.components or [], b.components or [], strict=True):
            assert_components(mine, other)


def assert_components(ours: TokenComponents, theirs: TokenComponents) -> None:
    assert ours.token_id == theirs.token_id
    numbers = [[each.logprob, *each.models, *each.rewards, each.reward] for each in (ours, theirs)]
    assert numbers[0] == pytest.approx(numbers[1], abs=LOGPROB_TOLERANCE)
    for mine, other in zip(ours.top, theirs.top, strict=True):
        assert_components(mine, other)


def batch() -> list[Request]:
    """Every way to draw, with and without truncation and components."""
    ways = [*SAMPLING.values()]
    dtypes = [torch.bfloat16, torch.float16, torch.float32]  # float32 with alternatives, of which none tie
    return [
        ready(
            seed,
            num_rows=1 + seed % 4,
            components=(None, 0, 5)[seed % 3],
            truncate_top_p=(1.0, 0.9)[seed % 5 == 3],
            dtype=dtypes[seed % 3],
            **ways[seed % len(ways)],
        )
        for seed in range(60)
    ]


class SmallTiles(TorchBackend):
    tile_elements = 5 * VOCAB


@pytest.mark.parametrize(("build", "threads"), [(TorchBackend, 1), (TorchBackend, 4), (SmallTiles, 1), (SmallTiles, 4)])
def test_a_batch_of_any_kind_gives_the_cpus_tokens_and_components(
    device: torch.device, build: Callable[[torch.device], SamplingBackend], threads: int
) -> None:
    assert_same(sampled(build(device), batch(), threads), sampled(cpu(), batch()))


@pytest.mark.parametrize("name", SAMPLING)
def test_as_many_draft_tokens_are_accepted_as_on_a_cpu(device: torch.device, name: str) -> None:
    def drafted(seed: int, num_right: int) -> Request:
        request = ready(seed, 5, components=3, **SAMPLING[name])
        drawn = own_draws(request)
        wrong = (drawn[num_right] + 1) % VOCAB
        request.draft_token_ids = [*drawn[:num_right], wrong, 0, 0, 0][:4]
        return request

    cases = [(seed, seed % 5) for seed in range(15)]
    ours, theirs = ([drafted(*case) for case in cases] for _ in range(2))
    outputs = sampled(TorchBackend(device), ours)
    assert_same(outputs, sampled(cpu(), theirs))
    assert [len(output.token_ids) for output in outputs] == [num_right + 1 for _, num_right in cases]


def own_draws(request: Request) -> list[int]:
    """What the CPU draws in each row."""
    num_rows, tokens = request.num_rows, list[int]()
    for _ in range(num_rows):  # a draft token that is right shows the next one
        request.draft_token_ids = [*tokens, 0][: num_rows - 1]
        tokens = sampled(cpu(), [request])[0].token_ids
        if len(tokens) == num_rows:
            break
    request.draft_token_ids = []
    return tokens


def test_forced_tokens_are_scored_as_on_a_cpu(device: torch.device) -> None:
    requests = [ready(seed, 4, components=2, forced=[7, 4999, 0, 123]) for seed in range(5)]
    outputs = sampled(TorchBackend(device), requests)
    assert_same(outputs, sampled(cpu(), requests))
    assert all(output.token_ids == [7, 4999, 0, 123] for output in outputs)


def test_a_request_at_fault_ends_alone(device: torch.device) -> None:
    def poisoned(value: float) -> list[Request]:
        requests = [ready(seed, components=1) for seed in range(6)]
        rows: list[Tensor | None] = [requests[at].sequences[term].rows for at, term in ((1, 0), (4, 2))]
        for each in rows:
            assert each is not None
            each[0, 3] = value
        return requests

    for value in (torch.nan, torch.inf, -3e38):
        outputs = Sampler(TorchBackend(device), 1, lambda *_: None).sample(poisoned(value))
        expected = Sampler(cpu(), 1, lambda *_: None).sample(poisoned(value))
        assert [type(output) for output in outputs] == [type(output) for output in expected]
        failures: list[EftServeError] = [output for output in outputs if isinstance(output, EngineError)]
        assert ["r1" in failures[0].message, "r4" in failures[-1].message] == [True, True]
        healthy = [[o for o in side if isinstance(o, SamplerOutput)] for side in (outputs, expected)]
        assert_same(*healthy)
