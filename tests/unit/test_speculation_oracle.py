"""The embedded family decoded with draft tokens ahead gives, token for token, what it gives without.

Real engines in this process under a real decode loop, many requests at once, prompts prefilled in chunks beside those
that decode, and so little KV room that requests are preempted in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from eft_serve.bench.speculate import EFT
from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.config import ZOO_CHECKPOINTS, CoordinatorConfig, ModelConfig
from eft_serve.coordinator.decode_loop import DecodeLoop
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.coordinator.request import Request
from eft_serve.engine.engine import Engine
from eft_serve.evaluation.product import InProcess, endpoint_of
from eft_serve.types import Delta, EventKind, GenerationRequest, SamplingParams, Speculative
from eft_serve.zoo.questions import held_out_questions, long_prompts

KV_TOKENS = 640  # for at most 32 requests of 30 to 110 tokens
CONFIG = CoordinatorConfig(max_num_seqs=32, max_num_batched_tokens=96)
SIDES = {
    **{f"{k} at a time": Speculative(num_tokens=k, min_confidence=0.0) for k in (1, 2, 4, 8, 16)},
    "16 while it is sure": Speculative(num_tokens=16),
    "4, no overlap": Speculative(num_tokens=4, overlap=False),
    "default": Speculative(),
    "another model": Speculative(draft="base-small", num_tokens=3),
}


class Stage:
    def __init__(self) -> None:
        self.engines = {
            term.model: Engine.load(term.model, ModelConfig(path=f"zoo:{term.model}", kv_cache_tokens=KV_TOKENS))
            for term in EFT.terms
        }
        self.vocabularies = {name: Vocabulary.load(ZOO_CHECKPOINTS / name) for name in self.engines}
        asked = [*held_out_questions(190), *long_prompts(14)]
        self.prompts = [self.vocabularies["base-large"].tokenizer.encode(f"User: {q.text}\nAssistant:") for q in asked]

    def decode(self, prompts: Sequence[list[int]], temperature: float, speculative: Speculative | None) -> Outcome:
        deltas: dict[str, list[int]] = {}

        def take(emitted: Sequence[tuple[Request, Delta]]) -> None:
            for request, delta in emitted:
                assert delta.failure is None
                deltas.setdefault(request.request_id, []).extend(delta.token_ids)

        loop = DecodeLoop(CONFIG, InProcess(self.engines), self.vocabularies, take, CoordinatorMetrics())
        loop.set_replicas({name: endpoint_of(engine) for name, engine in self.engines.items()})
        requests = [self._request(i, prompt, temperature, speculative) for i, prompt in enumerate(prompts)]
        for request in requests:
            loop.submit(request)
        loop.receive()
        while loop.step() or loop.num_requests:
            loop.receive()
        for engine in self.engines.values():
            assert engine._cache.used_tokens == len(engine._cache) == 0
        return Outcome([deltas[r.request_id] for r in requests], requests)

    @staticmethod
    def _request(index: int, prompt: list[int], temperature: float, speculative: Speculative | None) -> Request:
        generation = GenerationRequest(
            request_id=f"r{index}",
            combination=EFT,
            prompts={term.name: prompt for term in EFT.terms},
            sampling=SamplingParams(temperature=temperature, seed=index, max_tokens=80),
            speculative=speculative,
        )
        return Request.create(generation, time.monotonic())


class Outcome:
    def __init__(self, tokens: list[list[int]], requests: list[Request]) -> None:
        self.tokens = tokens
        events = [event.kind for request in requests for event in request.timeline.events]
        self.num_preemptions = events.count(EventKind.PREEMPTED)
        self.num_accepted = sum(request.speculation.stats.num_accepted for request in requests)
        self.num_passes = sum(request.speculation.stats.num_passes for request in requests)
        self.num_tokens = sum(map(len, tokens))


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    for engine in stage.engines.values():
        engine.close()


@pytest.fixture(scope="module")
def plain(stage: Stage) -> Callable[[float], Outcome]:
    known: dict[float, Outcome] = {}

    def get(temperature: float) -> Outcome:
        if temperature not in known:
            known[temperature] = stage.decode(prompts_at(stage, temperature), temperature, None)
        return known[temperature]

    return get


def prompts_at(stage: Stage, temperature: float) -> list[list[int]]:
    """More than 200 greedily, and 51 drawn."""
    return stage.prompts[:: 4 if temperature else 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
@pytest.mark.parametrize("side", SIDES)
def test_draft_tokens_change_no_token(
    stage: Stage, plain: Callable[[float], Outcome], side: str, temperature: float
) -> None:
    prompts = prompts_at(stage, temperature)
    got = stage.decode(prompts, temperature, SIDES[side])
    assert got.tokens == plain(temperature).tokens
    assert len(prompts) >= (50 if temperature else 200)
    assert got.num_preemptions > 0, "nobody was preempted: KV_TOKENS is too many"
    assert got.num_accepted > 0
    if side != "1 at a time":
        assert got.num_passes < got.num_tokens
