"""The whole decode loop over toy models: whatever happens to replicas and caches, tokens are as if alone."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import msgspec
import pytest
import torch
from fake_models import EOS, VOCAB_SIZE, ToyBackend, endpoint, toy_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.decode_loop import DecodeLoop
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.coordinator.pacing import Pacer
from eft_serve.coordinator.request import Request
from eft_serve.numerics.sampling import sample
from eft_serve.types import (
    Combination,
    Delta,
    Endpoint,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Speculative,
    Term,
)

EFT = {"base": 1.0, "reference": -1.0, "tuned": 1.0}
TOLD = "base@told"  # the base's second prompt


@dataclass(frozen=True)
class LetterVocabulary:
    """One letter a token."""

    num_tokens: int = VOCAB_SIZE
    eos_token_ids: frozenset[int] = frozenset([EOS])

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(0x4E00 + token_id) for token_id in token_ids if token_id != EOS)


@dataclass
class Harness:
    """A loop driven step by step in the test's own thread."""

    backend: ToyBackend
    config: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    deltas: dict[str, list[Delta]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        models = {e.info.model for e in self.backend.endpoints.values()}
        vocabularies = dict.fromkeys(sorted(models), LetterVocabulary())
        self.metrics = CoordinatorMetrics()
        self.loop = DecodeLoop(self.config, self.backend, vocabularies, self._emit, self.metrics)  # type: ignore[arg-type]
        self.loop.set_replicas(self.backend.endpoints)
        self.drive()

    def _emit(self, deltas: Sequence[tuple[str, Delta]]) -> None:
        for request_id, delta in deltas:
            self.deltas.setdefault(request_id, []).append(delta)

    def submit(self, request: Request) -> None:
        self.loop.submit(request)

    def drive(self, max_steps: int = 5000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            self.loop.receive()
            if not self.loop.step() and not self.loop.num_requests:
                return
        raise AssertionError("the loop does not come to an end")

    def retry_now(self) -> None:
        """As if the time had passed that failed replicas are left alone for."""
        for replica in self.loop.replicas.replicas.values():
            replica.retry_at = 0.0

    def tokens(self, request_id: str) -> list[int]:
        return [token_id for delta in self.deltas[request_id] for token_id in delta.token_ids]

    def last(self, request_id: str) -> Delta:
        return self.deltas[request_id][-1]


class Paced(Pacer):
    """One that has learnt."""

    CHUNK = 20

    @property
    def chunk(self) -> int:
        return self.CHUNK


def request(
    request_id: str,
    prompts: Mapping[str, list[int]],
    coefficients: Mapping[str, float] = EFT,
    now: float | None = None,
    tenant: str = "anonymous",
    speculative: Speculative | None = None,
    adapted: Mapping[str, str] | None = None,
    forced_token_ids: list[int] | None = None,
    components: int | None = None,
    **sampling: object,
) -> Request:
    adapted = adapted or {}
    terms = tuple(
        Term(
            name,
            model=adapted.get(name, name.partition("@")[0]),
            coefficient=c,
            adapter=name if name in adapted else None,
            weight=float(name in ("tuned", TOLD)),
        )
        for name, c in coefficients.items()
    )
    generation = GenerationRequest(
        request_id=request_id,
        combination=Combination(terms),
        prompts=dict(prompts),
        sampling=SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **sampling}),  # type: ignore[arg-type]
        tenant=tenant,
        speculative=speculative,
        forced_token_ids=forced_token_ids,
        components=components,
    )
    return Request.create(generation, time.monotonic() if now is None else now)


def naive(req: Request) -> list[int]:
    """One token at a time, no cache, in the obvious way; what is given stands, whatever it is."""
    if req.generation.forced_token_ids is not None:
        return req.generation.forced_token_ids
    output: list[int] = []
    sampling = req.generation.sampling
    while len(output) < sampling.max_tokens and not (output and output[-1] == EOS and not sampling.ignore_eos):
        combined = torch.zeros(VOCAB_SIZE)
        for term in req.combination.terms:
            logits = toy_logits(term.model, req.generation.prompts[term.name] + output, term.adapter)
            combined += term.coefficient * torch.log_softmax(logits, -1)
        drawn = sample(combined[None], [sampling], [len(output)]) if sampling.temperature else combined.argmax()
        output.append(int(drawn))
    return output


def three_models(**kwargs: int) -> dict[str, Endpoint]:
    return {f"{model}-0": endpoint(model, f"{model}-0", **kwargs) for model in EFT}


def prompts_for(rng: random.Random, longest: int = 40) -> dict[str, list[int]]:
    """Each model its own prompt, of its own length; half of them begin like others."""
    prompts = {model: some_tokens(rng, longest) for model in EFT}
    common = rng.choice([0, longest // 2])
    return {model: [*range(min(common, len(tokens))), *tokens[common:]] for model, tokens in prompts.items()}


def some_tokens(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))]


def many(rng: random.Random, count: int) -> list[Request]:
    recipes = [EFT, {"base": 1.0}, {"base": 0.0, "tuned": 1.0}, {"base": 0.5, "reference": -0.25, "tuned": 0.75}]
    return [
        request(
            f"r{i}",
            prompts_for(rng),
            rng.choice(recipes),
            tenant=rng.choice("xy"),
            speculative=speculative(rng),
            forced_token_ids=some_tokens(rng, 20) if rng.random() < 0.3 else None,
            components=rng.choice([None, 0, 2]),
            max_tokens=rng.randint(1, 20),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([0.5, 1.0]),
            seed=rng.randrange(2**62),
        )
        for i in range(count)
    ]


def speculative(rng: random.Random) -> Speculative | None:
    return rng.choice(
        [
            None,
            Speculative(),
            Speculative(
                num_tokens=rng.choice([1, 2, 4, 8, 16]),
                min_confidence=rng.choice([0.0, 0.1, 0.5]),
                overlap=rng.random() < 0.5,
            ),
            Speculative(num_tokens=4, disable_by_batch_size=2),
        ]
    )


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.sampled_from([3, 17, 64, 1024]),  # token budget a step
    st.sampled_from([64, 100, 4096]),  # KV tokens of a replica
    st.integers(1, 8),
)
def test_tokens_are_as_if_alone(seed: int, count: int, budget: int, kv_tokens: int, max_seqs: int) -> None:
    rng = random.Random(seed)
    config = CoordinatorConfig(max_num_batched_tokens=budget, max_num_seqs=max_seqs)
    harness = Harness(ToyBackend(three_models(kv_tokens=kv_tokens)), config)
    requests = many(rng, count)
    for req in requests:
        harness.submit(req)
    harness.drive()
    for req in requests:
        assert harness.tokens(req.request_id) == naive(req)
        assert harness.last(req.request_id).finish_reason in {FinishReason.STOP, FinishReason.LENGTH}
        described = [c.token_id for d in harness.deltas[req.request_id] for c in d.components or ()]
        assert described == (naive(req) if req.generation.components is not None else [])
    assert not any(harness.backend.sequences.values()), "every sequence was freed"
    assert harness.backend.max_computed <= budget


def two_prompts(rng: random.Random, request_id: str, longest: int = 12, **sampling: object) -> Request:
    """One whose base reads two prompts."""
    prompts = prompts_for(rng, longest) | {TOLD: some_tokens(rng, longest)}
    coefficients = rng.choice([{"base": -0.5, TOLD: 1.5}, {TOLD: 1.2, "reference": -1.0, "base": 0.8}])
    return request(request_id, prompts, coefficients, speculative=speculative(rng), **sampling)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([3, 5, 17, 1024]), st.sampled_from([64, 100, 4096]))
def test_a_model_that_reads_two_prompts(seed: int, count: int, budget: int, kv_tokens: int) -> None:
    rng = random.Random(seed)
    harness = Harness(ToyBackend(three_models(kv_tokens=kv_tokens)), CoordinatorConfig(max_num_batched_tokens=budget))
    requests = [two_prompts(rng, f"r{i}", max_tokens=rng.randint(1, 15)) for i in range(count)]
    for req in requests:
        harness.submit(req)
    harness.drive()
    for req in requests:
        assert harness.tokens(req.request_id) == naive(req)


def test_two_prompts_that_never_fit_one_replica_together_are_refused() -> None:
    def served(num_replicas: int, num_tokens: int) -> Delta:
        bases = {f"base-{i}": endpoint("base", f"base-{i}", kv_tokens=64) for i in range(num_replicas)}
        harness = Harness(ToyBackend(bases))
        prompts = {"base": [1] * num_tokens, TOLD: [2] * num_tokens}
        harness.submit(request("r", prompts, {"base": 0.5, TOLD: 0.5}, ignore_eos=True, max_tokens=20))
        harness.drive()
        tokens = harness.tokens("r")
        return harness.last("r") if not tokens else Delta(text="", token_ids=tokens)

    refused = served(1, 32)
    assert refused.failure is not None
    assert (refused.failure.kind, refused.failure.param) == ("ContextLengthError", "prompt")
    assert (
        "model base holds 64 tokens and the prompts that it reads side by side have 32 and 32"
        in refused.failure.message
    )
    assert len(served(1, 28).token_ids) == 4  # 2 · (28 + 4) = 64
    assert len(served(2, 32).token_ids) == 20


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.sampled_from([2, 3, 5, 17, 1024]),  # token budget a step
    st.sampled_from([120, 200, 4096]),  # KV tokens of a replica
    st.sampled_from([None, Speculative(num_tokens=3)]),
)
def test_an_adapter_and_its_model_share_a_replica(
    seed: int, count: int, budget: int, kv_tokens: int, speculative: Speculative | None
) -> None:
    rng = random.Random(seed)
    endpoints = {f"{model}-0": endpoint(model, f"{model}-0", kv_tokens=kv_tokens) for model in ("base", "reference")}
    harness = Harness(ToyBackend(endpoints), CoordinatorConfig(max_num_batched_tokens=budget))
    requests = [
        request(
            f"r{i}",
            prompts_for(rng),
            rng.choice([EFT, {"tuned": 1.0}]),
            adapted={"tuned": "reference"},
            speculative=speculative,
            max_tokens=rng.randint(1, 20),
        )
        for i in range(count)
    ]
    for req in requests:
        harness.submit(req)
    harness.drive()
    for req in requests:
        assert harness.tokens(req.request_id) == naive(req)
    assert not any(harness.backend.sequences.values()), "every sequence was freed"
    assert harness.backend.max_computed <= budget


@pytest.mark.parametrize(("draft", "drafter"), [("auto", "tuned"), ("tuned", "tuned"), ("reference", "reference")])
def test_an_adapter_and_its_model_draft_each_under_its_own_name(draft: str, drafter: str) -> None:
    prompts = {model: [1] for model in EFT}
    req = request("r", prompts, adapted={"tuned": "reference"}, speculative=Speculative(draft=draft))
    assert req.speculation.drafter == drafter


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_lost_caches_dead_replicas_and_migration_change_no_token(seed: int) -> None:
    rng = random.Random(seed)
    endpoints = {f"{model}-{i}": endpoint(model, f"{model}-{i}", kv_tokens=512) for model in EFT for i in range(2)}

    def disturb(backend: ToyBackend) -> None:
        dice = rng.random()
        replica_id = rng.choice(sorted(endpoints))
        if dice < 0.2:  # an engine restarts, or evicts
            held = backend.sequences.get(replica_id, {})
            for sequence_id in list(held):
                held[sequence_id] = held[sequence_id][: rng.randint(0, len(held[sequence_id]))]
        elif dice < 0.3:
            backend.dead = {replica_id}
            backend.sequences.pop(replica_id, None)
        elif dice < 0.6:
            backend.dead = set()

    backend = ToyBackend(endpoints, disturb=disturb)
    harness = Harness(ToyBackend(endpoints))
    harness.backend = harness.loop.backend = backend
    backend.connected = endpoints
    requests = many(rng, 8)
    for req in requests:
        harness.submit(req)
    harness.retry_now()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eft_serve.coordinator.replicas.FIRST_RETRY_S", 0.0)
        harness.drive()
    for req in requests:
        assert harness.tokens(req.request_id) == naive(req), req


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_an_engine_that_holds_less_is_sent_the_rest_at_once(kept: int) -> None:
    harness = Harness(ToyBackend(three_models()))
    req = request("r", prompts_for(random.Random(2)), max_tokens=12, ignore_eos=True)
    harness.submit(req)
    for _ in range(6):
        harness.loop.receive()
        harness.loop.step()
    held = harness.backend.sequences["tuned-0"]
    held["r/tuned"] = held["r/tuned"][:kept]
    harness.drive(max_steps=12)
    assert harness.tokens("r") == naive(req)


def test_requests_join_while_others_run_and_a_long_prompt_does_not_stop_them() -> None:
    rng = random.Random(7)
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(max_num_batched_tokens=8))
    short = request("short", {model: [1, 2] for model in EFT}, max_tokens=10, ignore_eos=True)
    harness.submit(short)
    harness.loop.receive()
    harness.loop.step()
    harness.submit(request("long", {model: [rng.randrange(60) for _ in range(60)] for model in EFT}, max_tokens=2))
    for _ in range(8):
        harness.loop.receive()
        before = len(short.output_token_ids)
        harness.loop.step()
        assert len(short.output_token_ids) == before + 1
    assert "long" not in harness.deltas
    harness.drive()
    assert len(harness.tokens("long")) == 2
    assert harness.backend.max_computed <= 8


def test_text_is_detokenized_while_the_next_step_is_computed_and_a_first_token_at_once() -> None:
    emitted_at_fan_out: list[int] = []

    def note(backend: ToyBackend) -> None:
        emitted_at_fan_out.append(len(harness.deltas.get("r", ())))

    harness = Harness(ToyBackend(three_models()))
    req = request("r", {model: [1, 2] for model in EFT}, max_tokens=10, ignore_eos=True)
    harness.submit(req)
    harness.loop.receive()
    harness.backend.disturb = note  # after what is done meanwhile
    for step in range(1, 5):
        harness.loop.step()
        assert len(req.output_token_ids) == step
        assert len(harness.tokens("r")) == max(1, step - 1)
    assert emitted_at_fan_out == [0, 1, 2, 3]
    harness.drive()
    assert harness.tokens("r") == naive(req)


def test_nothing_is_emitted_for_an_aborted_request_not_even_what_is_drawn() -> None:
    harness = Harness(ToyBackend(three_models()))
    for name in ("r", "other"):
        harness.submit(request(name, {model: [1, 2] for model in EFT}, max_tokens=10, ignore_eos=True))
    harness.loop.receive()
    for _ in range(3):
        harness.loop.step()
    harness.loop.abort("r")
    harness.drive()
    assert len(harness.tokens("r")) == 2
    assert len(harness.tokens("other")) == 10


LONG = {model: [i * step % 59 for i in range(60)] for step, model in enumerate(EFT, 1)}


def run_counted(harness: Harness, req: Request) -> tuple[int, int]:
    """Steps until its end, and the tokens that they computed."""
    steps, computed = len(harness.backend.batches), harness.backend.num_computed_tokens
    harness.submit(req)
    harness.drive()
    assert harness.tokens(req.request_id) == naive(req)
    return len(harness.backend.batches) - steps, harness.backend.num_computed_tokens - computed


def test_a_prefill_takes_small_chunks_beside_decodes_and_large_ones_alone() -> None:
    harness = Harness(ToyBackend({"t": endpoint("tuned", "t")}))
    harness.loop.scheduler.pacer = Paced(slowdown=2.0, most=1024)
    prompt = {"tuned": [i % VOCAB_SIZE for i in range(200)]}
    harness.submit(request("alone", prompt, {"tuned": 1.0}, max_tokens=1))
    harness.drive()
    alone = [len(step.token_ids) for batch in harness.backend.batches for b in batch.values() for step in b.steps]
    assert max(alone) == 200
    harness.submit(request("decoding", {"tuned": [1]}, {"tuned": 1.0}, max_tokens=100, ignore_eos=True))
    harness.loop.receive()
    harness.loop.step()
    harness.backend.batches.clear()
    harness.backend.max_computed = 0
    harness.submit(request("late", {"tuned": [9, *prompt["tuned"]]}, {"tuned": 1.0}, max_tokens=1))
    harness.drive()
    assert harness.backend.max_computed == Paced.CHUNK + 1, "the chunk, and the token of the one that decodes"


def test_a_long_prompt_that_is_cached_takes_two_steps() -> None:
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(max_num_batched_tokens=8))
    first = run_counted(harness, request("first", LONG, max_tokens=1))
    assert first == (8 + 1, 3 * 60), "the first goes in chunks; the last step tells the engines of its end"
    again = run_counted(harness, request("again", LONG, max_tokens=1))
    assert again == (2 + 1, 3 * (3 + 1)), "14 of 15 blocks of 4 tokens are found"
    other = run_counted(harness, request("other", LONG, max_tokens=1, tenant="other"))
    assert other == first, "another tenant finds nothing"


def test_a_prompt_within_the_budget_takes_one_step_cached_or_not() -> None:
    harness = Harness(ToyBackend(three_models()))
    assert run_counted(harness, request("first", LONG, max_tokens=1)) == (1 + 1, 3 * 60)
    assert run_counted(harness, request("again", LONG, max_tokens=1)) == (1 + 1, 3 * 4)


def test_an_evicted_sequence_finds_its_blocks_again_with_what_it_generated() -> None:
    harness = Harness(ToyBackend(three_models()))
    req = request("r", LONG, max_tokens=20, ignore_eos=True)
    harness.submit(req)
    for _ in range(13):
        harness.loop.receive()
        harness.loop.step()
    computed = harness.backend.num_computed_tokens
    assert len(req.output_token_ids) == 13
    del harness.backend.sequences["tuned-0"]["r/tuned"]
    harness.drive()
    assert harness.tokens("r") == naive(req)
    # Seven tokens are left. One round is lost: two models compute their token again, the third its last block of four.
    assert harness.backend.num_computed_tokens - computed <= 3 * 7 + 2 + 3


def test_only_models_with_a_coefficient_run() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.backend.batches.clear()
    harness.submit(request("plain", {"base": [1]}, {"base": 1.0}))
    harness.drive()
    assert {replica_id for batches in harness.backend.batches for replica_id in batches} == {"base-0"}


def test_an_aborted_request_is_freed_everywhere_and_says_nothing_more() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("gone", prompts_for(random.Random(1)), max_tokens=400, ignore_eos=True))
    for _ in range(5):
        harness.loop.receive()
        harness.loop.step()
    emitted = len(harness.deltas["gone"])
    assert all(harness.backend.sequences.values())
    harness.loop.abort("gone")
    harness.loop.abort("never heard of")
    harness.drive()
    assert len(harness.deltas["gone"]) == emitted
    assert not any(harness.backend.sequences.values())


def test_stop_string_length_and_context_end() -> None:
    rng = random.Random(3)
    prompts = prompts_for(rng)
    plain = request("plain", prompts, max_tokens=12, ignore_eos=True)
    expected = LetterVocabulary().decode(naive(plain))
    harness = Harness(ToyBackend(three_models(max_len=48)))
    harness.submit(plain)
    harness.submit(request("stop", prompts, max_tokens=12, ignore_eos=True, stop=(expected[4:6],)))
    harness.submit(request("context", {m: [1] * 40 for m in EFT}, max_tokens=100, ignore_eos=True))
    harness.submit(request("too long", {m: [1] * 48 for m in EFT}, max_tokens=1))
    harness.drive()
    assert "".join(d.text for d in harness.deltas["plain"]) == expected
    assert harness.last("plain").finish_reason == FinishReason.LENGTH
    assert "".join(d.text for d in harness.deltas["stop"]) == expected[:4]
    assert harness.last("stop").finish_reason == FinishReason.STOP
    assert len(harness.tokens("context")) == 8
    failure = harness.last("too long").failure
    assert failure is not None
    assert failure.kind == "ContextLengthError"
    assert "48" in failure.message


def test_a_model_without_replicas_fails_its_requests_in_time_and_no_others() -> None:
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(recovery_timeout_s=0.3))
    harness.submit(request("eft", prompts_for(random.Random(1)), max_tokens=400, ignore_eos=True))
    harness.submit(request("base", {"base": [1]}, {"base": 1.0}, max_tokens=50, ignore_eos=True))
    for _ in range(3):
        harness.loop.receive()
        harness.loop.step()
    harness.backend.dead = {"tuned-0"}
    harness.drive(max_steps=10**6)
    failure = harness.last("eft").failure
    assert failure is not None
    assert failure.kind == "UnavailableError"
    assert "tuned" in failure.message
    assert harness.last("base").finish_reason == FinishReason.LENGTH


def two_tuned() -> dict[str, Endpoint]:
    return {**three_models(), "tuned-1": endpoint("tuned", "tuned-1")}


def test_a_replica_that_takes_too_long_costs_one_timeout_and_no_request() -> None:
    """It fails only after a wait that is longer than a request's time to recover."""
    backend = ToyBackend(two_tuned())
    harness = Harness(backend, CoordinatorConfig(recovery_timeout_s=0.2))
    requests = [request(f"r{i}", prompts_for(random.Random(i)), max_tokens=8) for i in range(6)]
    for req in requests[:3]:
        harness.submit(req)
    harness.loop.receive()
    harness.loop.step()
    backend.dead = {"tuned-0"}
    backend.disturb = lambda b: time.sleep(0.3)
    harness.loop.step()
    backend.disturb = lambda b: None
    backend.batches.clear()
    for req in requests[3:]:
        harness.submit(req)
    harness.drive()
    assert [harness.tokens(r.request_id) for r in requests] == [naive(r) for r in requests]
    assert not any("tuned-0" in batches for batches in backend.batches), "it was tried again at once"


def test_a_replica_that_never_answers_is_asked_ever_more_rarely_and_stops_nobody() -> None:
    backend = ToyBackend(two_tuned())
    backend.dead = {"tuned-1"}
    harness = Harness(backend)
    replica = harness.loop.replicas.replicas["tuned-1"]
    waits = []
    for _ in range(8):
        harness.retry_now()
        harness.loop.step()
        waits.append(round(replica.retry_at - time.monotonic()))
    assert waits == sorted(waits)
    assert waits[-1] == 60
    for _ in range(100):
        harness.loop.set_replicas(backend.endpoints)  # as the discovery does, again and again
    harness.submit(request("r", prompts_for(random.Random(1))))
    harness.drive(max_steps=30)
    assert harness.last("r").finish_reason is not None


def test_waiting_for_a_turn_is_not_waiting_for_a_model() -> None:
    """Twelve long prompts through a small budget take far longer than a request's time to recover; so may one step."""
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(max_num_batched_tokens=10, recovery_timeout_s=0.05))
    harness.backend.disturb = lambda backend: time.sleep(0.1 if len(backend.batches) == 20 else 0.002)
    requests = [request(f"r{i}", {m: [i] * 60 for m in EFT}, max_tokens=2) for i in range(12)]
    for req in requests:
        harness.submit(req)
    started = time.monotonic()
    harness.drive()
    assert time.monotonic() - started > 0.1
    assert [harness.tokens(r.request_id) for r in requests] == [naive(r) for r in requests]


def test_a_long_step_is_not_counted_against_who_came_during_it() -> None:
    """Nor is it when an engine then has no room for it at first, so that it makes no progress by itself."""
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(recovery_timeout_s=0.3))
    harness.submit(request("first", prompts_for(random.Random(1)), max_tokens=2, ignore_eos=True))
    harness.loop.receive()
    harness.loop.step()

    def long_step(backend: ToyBackend) -> None:
        backend.disturb = lambda backend: None
        time.sleep(0.4)
        late = request("late", prompts_for(random.Random(2)), ignore_eos=True)
        harness.submit(late)
        backend.full = {"tuned-0"}

    harness.backend.disturb = long_step
    for _ in range(4):
        harness.loop.step()
        harness.loop.receive()
    harness.backend.full = set()
    harness.drive()
    assert harness.last("late").failure is None
    assert len(harness.tokens("late")) == 12


def test_the_time_to_recover_begins_with_the_loss_for_those_who_wait_too() -> None:
    config = CoordinatorConfig(recovery_timeout_s=0.3, max_num_seqs=1)
    harness = Harness(ToyBackend(three_models()), config)
    for name in ("runs", "waits"):
        harness.submit(request(name, prompts_for(random.Random(1)), max_tokens=5, ignore_eos=True))
    harness.loop.receive()
    harness.loop.step()

    def hang(backend: ToyBackend) -> None:
        backend.disturb = lambda backend: None
        time.sleep(0.4)
        backend.dead = {"tuned-0"}

    harness.backend.disturb = hang
    for _ in range(3):
        harness.loop.step()
    assert harness.loop.num_requests == 2
    harness.backend.dead = set()
    harness.retry_now()
    harness.drive()
    assert [len(harness.tokens(name)) for name in ("runs", "waits")] == [5, 5]


def test_what_is_drawn_does_not_wait_for_a_probe() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("r", prompts_for(random.Random(1)), max_tokens=2, ignore_eos=True))
    harness.loop.receive()
    harness.loop.step()
    harness.loop.step()
    assert len(harness.tokens("r")) == 1
    harness.loop.replicas.replicas["tuned-0"].healthy = False
    emitted: list[int] = []
    harness.backend.disturb = lambda backend: emitted.append(len(harness.tokens("r")))
    harness.loop.step()
    assert emitted[0] == 2, "before the probe's answer was waited for"


def test_a_text_that_cannot_be_detokenized_ends_its_own_request_only(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(ToyBackend(three_models()))
    for name in ("bad", "good"):
        harness.submit(request(name, prompts_for(random.Random(1)), max_tokens=6, ignore_eos=True))
    harness.loop.receive()
    harness.loop.step()
    output = harness.loop._requests["bad"][1]

    def refuse(token_ids: list[int]) -> str:
        raise ValueError("no such token")

    output.detokenizer.decoder = SimpleNamespace(decode=refuse)
    harness.drive()
    failure = harness.last("bad").failure
    assert failure is not None
    assert "no such token" in failure.message
    assert len(harness.tokens("good")) == 6
    assert "cannot be decoded" in caplog.text


def test_an_engine_that_never_has_room_ends_in_an_error() -> None:
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(recovery_timeout_s=0.2))
    harness.backend.full = {"tuned-0"}
    harness.submit(request("r", prompts_for(random.Random(1))))
    harness.drive(max_steps=10**6)
    failure = harness.last("r").failure
    assert failure is not None
    assert failure.kind == "UnavailableError"


def test_what_a_failed_replica_was_not_told_is_told_when_it_answers_again() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("r", prompts_for(random.Random(1)), max_tokens=400, ignore_eos=True))
    harness.loop.receive()
    harness.loop.step()
    harness.loop.step()
    harness.loop.abort("r")
    harness.loop.receive()
    harness.backend.dead = {"tuned-0"}
    harness.loop.step()
    assert harness.backend.sequences["tuned-0"]
    harness.backend.dead = set()
    harness.retry_now()
    harness.drive()
    harness.loop.step()
    assert not any(harness.backend.sequences.values())


def test_a_request_whose_reader_has_gone_without_a_word_ends_at_its_deadline() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.backend.disturb = lambda backend: time.sleep(0.01)
    req = request("r", prompts_for(random.Random(1)), max_tokens=400, ignore_eos=True)
    late = Request.create(msgspec.structs.replace(req.generation, timeout_s=0.2), time.monotonic())
    harness.submit(late)
    harness.drive()
    failure = harness.last("r").failure
    assert failure is not None
    assert failure.kind == "DeadlineError"
    assert 0 < len(harness.tokens("r")) < 100
    harness.loop.step()
    assert not any(harness.backend.sequences.values())


def test_a_replica_counts_only_after_it_answered_a_step() -> None:
    backend = ToyBackend(three_models())
    backend.dead = {"tuned-0"}
    harness = Harness(backend)
    assert harness.loop.missing_models == ["tuned"]
    backend.dead = set()
    harness.retry_now()
    harness.drive()
    assert harness.loop.missing_models == []
    harness.loop.set_replicas({"base-0": backend.endpoints["base-0"]})
    harness.drive()
    assert harness.loop.missing_models == ["reference", "tuned"]


def test_a_combination_that_overflows_fails_its_own_request_only() -> None:
    harness = Harness(ToyBackend(three_models()))
    good = request("good", {model: [1, 2] for model in EFT})
    harness.submit(good)
    harness.submit(request("bad", {model: [3, 4] for model in EFT}, {**EFT, "base": 3e38}))
    harness.drive()
    assert harness.tokens("good") == naive(good)
    failure = harness.last("bad").failure
    assert failure is not None
    assert failure.kind == "EngineError"


def test_the_thread_runs_stops_and_fails_what_is_left() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.loop.start()
    harness.submit(request("endless", {model: [1] for model in EFT}, max_tokens=450, ignore_eos=True))
    harness.loop.close()
    assert harness.loop.error is None
    assert harness.last("endless").finish_reason in {FinishReason.ERROR, FinishReason.LENGTH}


def test_a_seeded_request_draws_the_same_alone_and_in_a_crowd() -> None:
    rng = random.Random(11)
    seeded = prompts_for(rng)
    outputs = []
    for crowd in (0, 9):
        harness = Harness(ToyBackend(three_models()), CoordinatorConfig(max_num_batched_tokens=16 + crowd))
        for other in many(rng, crowd):
            harness.submit(other)
        harness.submit(request("seeded", seeded, temperature=1.0, seed=42, max_tokens=20, ignore_eos=True))
        harness.drive()
        outputs.append(harness.tokens("seeded"))
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) > 5
