"""The depth of guessing follows what pays: simulated steps with known costs and acceptance, and no clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest

from eft_serve.coordinator.request import Request
from eft_serve.coordinator.speculation import look_up
from eft_serve.coordinator.speculator import DEPTHS, Speculator, tokens_per_step
from eft_serve.ensemble import Term
from eft_serve.types import GenerationRequest, SamplingParams, Speculative

TERMS = [Term("base", "base", 1.0), Term("reference", "reference", -1.0), Term("tuned", "tuned", 1.0, weight=1.0)]


def request(name: str, **settings: object) -> Request:
    generation = GenerationRequest(
        request_id=name,
        recipe="eft",
        prompts={term.name: [1, 2, 3] for term in TERMS},
        sampling=SamplingParams(max_tokens=10**6),
        speculative=Speculative(**settings),  # type: ignore[arg-type]
    )
    made = Request.create(generation, TERMS, now=0.0)
    made.num_ids = 100
    for sequence in made.sequences:
        sequence.num_computed = 2
    return made


class Models:
    """Steps of known cost: `seconds(verified rows, draft forwards)`, of requests whose guesses stand that often."""

    def __init__(self, acceptances: Iterable[float], seconds: Callable[[int, int], float], **settings: object) -> None:
        self.requests = {request(f"r{i}", **settings): a for i, a in enumerate(acceptances)}
        self.seconds = seconds
        self.speculator = Speculator()
        self.rng = random.Random(0)
        self.time = 0.0
        self.num_tokens = 0
        self.depths: list[int] = []

    def step(self) -> None:
        requests = list(self.requests)
        self.speculator.plan(requests)
        rows = sum(1 + len(r.guesses) for r in requests)
        forwards = max(max(1, r.speculation.num_asked) for r in requests)
        seconds = self.seconds(rows, forwards) * self.rng.uniform(0.9, 1.15)
        self.depths.append(max(r.speculation.num_asked for r in requests))
        self.speculator.observe(requests, seconds, {"tuned": self.seconds(0, 5) - self.seconds(0, 4)})
        self.time += seconds
        for r, acceptance in self.requests.items():
            self._advance(r, acceptance)

    def _advance(self, r: Request, acceptance: float) -> None:
        """Guesses that stand are 1, others 0; the output is all ones."""
        num_rows = 1 + len(r.guesses)
        r.guesses += [int(self.rng.random() < acceptance) for _ in range(r.speculation.num_asked)]
        tested = r.guesses[:num_rows]
        standing = next((i for i, guess in enumerate(tested) if not guess), len(tested))
        taken = [1] * min(standing + 1, num_rows)
        self.speculator.learn(r, standing, min(len(tested), standing + 1))
        r.take(taken)
        self.num_tokens += len(taken)

    @property
    def rate(self) -> float:
        return self.num_tokens / self.time


def rate_of(steps: int, acceptances: list[float], seconds: Callable[[int, int], float], **settings: object) -> float:
    models = Models(acceptances, seconds, **settings)
    for _ in range(steps):
        models.step()
    return models.rate


def own_devices(rows: int, forwards: int) -> float:
    """Every model has its own: a slow base, draft forwards beside it."""
    return max(107.0, 36.0 * forwards)


def shared_cores(rows: int, forwards: int) -> float:
    """All models on the same few cores: everything adds up."""
    return 3.0 + 0.4 * rows + 1.0 * forwards


def crowded(rows: int, forwards: int) -> float:
    """Where a row costs what it computes."""
    return 1.0 + 1.0 * rows + 2.0 * forwards


@pytest.mark.parametrize("cost", [own_devices, shared_cores])
@pytest.mark.parametrize("acceptance", [0.5, 0.9])
def test_it_comes_close_to_the_best_fixed_depth(cost: Callable[[int, int], float], acceptance: float) -> None:
    best = max(rate_of(400, [acceptance], cost, num_tokens=depth) for depth in DEPTHS if depth)
    assert rate_of(400, [acceptance], cost) > 0.88 * best


@pytest.mark.parametrize("cost", [own_devices, shared_cores, crowded])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_it_never_loses_against_plain_decoding(
    cost: Callable[[int, int], float], acceptance: float, batch: int
) -> None:
    plain = rate_of(300, [acceptance] * batch, cost, draft="none")
    assert rate_of(300, [acceptance] * batch, cost) > 0.96 * plain


def test_a_request_whose_guesses_fall_is_asked_for_fewer() -> None:
    models = Models([0.95] * 6 + [0.1], shared_cores)
    for _ in range(120):
        models.step()
    *good, bad = list(models.requests)
    asked = [0, 0]
    for _ in range(60):
        models.step()
        asked[0] += good[0].speculation.num_asked
        asked[1] += bad.speculation.num_asked
    assert asked[0] > 1.5 * asked[1]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("acceptance", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_expected_tokens_are_those_of_long_runs(overlap: bool, acceptance: float, depth: int) -> None:
    models = Models([acceptance], lambda rows, forwards: 1.0, num_tokens=depth, overlap=overlap)
    for _ in range(6000):
        models.step()
    assert models.num_tokens / 6000 == pytest.approx(tokens_per_step(acceptance, depth, overlap=overlap), rel=0.05)


def test_fixed_numbers_are_kept_and_none_means_none() -> None:
    fixed, none = request("fixed", num_tokens=5), request("none", draft="none")
    Speculator().plan([fixed, none])
    assert (fixed.speculation.num_asked, none.speculation.num_asked) == (5, 0)
    fixed.max_tokens = 3
    Speculator().plan([fixed])
    assert fixed.speculation.num_asked == 3


def test_what_follows_the_newest_tokens_is_looked_up() -> None:
    assert look_up([1, 2, 3, 4, 9, 2, 3], 2) == [4, 9]
    assert look_up([1, 2, 3, 4, 9, 2, 3], 9) == [4, 9, 2, 3]
    assert look_up([5, 1, 5, 2, 5], 1) == [2]  # the last time counts
    assert look_up([1, 2, 3], 4) == []
    assert look_up([1], 4) == []
