"""Whatever happens to replicas, caches and readers: tokens are as if alone, or the one request ends with an error."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import msgspec
import pytest
from fake_models import VOCAB_SIZE, ToyBackend, endpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_harness import (
    EFT,
    Harness,
    LetterVocabulary,
    many,
    naive,
    prompts_for,
    request,
    three_models,
    two_tuned,
)

from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.request import Request
from eft_serve.types import FinishReason


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_lost_caches_dead_replicas_and_migration_change_no_token(seed: int) -> None:
    rng = random.Random(seed)
    endpoints = {f"{model}-{i}": endpoint(model, f"{model}-{i}", kv_tokens=512) for model in EFT for i in range(2)}

    def disturb(backend: ToyBackend) -> None:
        dice = rng.random()
        replica_id = rng.choice(sorted(endpoints))
        if dice < 0.2:  # an engine restarts, or evicts
            sequences = backend.sequences.get(replica_id, {})
            for sequence_id in list(sequences):
                sequences[sequence_id] = sequences[sequence_id][: rng.randint(0, len(sequences[sequence_id]))]
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


def test_a_replica_that_never_answers_is_probed_ever_more_rarely_and_stops_no_request() -> None:
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
    assert waits[-1] == 2
    for _ in range(100):
        harness.loop.set_replicas(backend.endpoints)  # as the discovery does, again and again
    harness.submit(request("r", prompts_for(random.Random(1))))
    harness.drive(max_steps=30)
    assert harness.last("r").finish_reason is not None


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


@pytest.mark.parametrize("stop", [(), ("x",)])
def test_a_text_that_cannot_be_detokenized_ends_its_own_request_only(
    caplog: pytest.LogCaptureFixture, stop: tuple[str, ...]
) -> None:
    harness = Harness(ToyBackend(three_models()))
    for name in ("bad", "good"):
        harness.submit(request(name, prompts_for(random.Random(1)), max_tokens=6, ignore_eos=True, stop=stop))
    harness.loop.receive()
    harness.loop.step()
    output = harness.loop.requests._open["bad"][1]

    def refuse(token_ids: list[int]) -> str:
        raise ValueError("no such token")

    output.detokenizer.decoder = SimpleNamespace(decode=refuse)
    harness.drive()
    failure = harness.last("bad").failure
    assert failure is not None
    assert "no such token" in failure.message
    assert len(harness.tokens("good")) == 6
    assert "cannot be decoded" in caplog.text
    used = [usage.computed_tokens for end in harness.ends.values() for usage in end.usage.models.values()]
    assert sum(used) == harness.backend.num_computed_tokens - 3, "the step beside which it was decoded counts too"


def test_a_prompt_that_cannot_be_decoded_ends_its_own_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = LetterVocabulary.decode

    def refuse(vocabulary: LetterVocabulary, token_ids: list[int]) -> str:
        if 7 in token_ids:
            raise ValueError("no such token")
        return decode(vocabulary, token_ids)

    monkeypatch.setattr(LetterVocabulary, "decode", refuse)
    harness = Harness(ToyBackend(three_models()))
    good = request("good", {model: [1, 2] for model in EFT}, max_tokens=1)
    for req in (request("bad", {model: [7] for model in EFT}), good):
        harness.submit(req)
    harness.drive()
    failure = harness.last("bad").failure
    assert failure is not None
    assert "no such token" in failure.message
    assert harness.ends["bad"].failure == failure
    assert harness.tokens("good") == naive(good)


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**40, 2**70])
def test_a_token_that_a_model_does_not_have_is_refused_by_field(token_id: int) -> None:
    harness = Harness(ToyBackend(three_models()))
    prompts = {model: [1, 2] for model in EFT}
    harness.submit(request("prompt", {**prompts, "tuned": [1, token_id]}))
    harness.submit(request("completion", prompts, forced_token_ids=[3, token_id]))
    harness.drive()
    for field in ("prompt", "completion"):
        failure = harness.last(field).failure
        assert failure is not None
        assert (failure.kind, failure.param) == ("InvalidRequestError", field)
        assert str(token_id) in failure.message


def test_an_engine_that_never_has_room_ends_in_an_error() -> None:
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(recovery_timeout_s=0.2))
    harness.backend.full = {"tuned-0"}
    harness.submit(request("r", prompts_for(random.Random(1))))
    harness.drive(max_steps=10**6)
    failure = harness.last("r").failure
    assert failure is not None
    assert failure.kind == "UnavailableError"


def test_freed_sequences_reach_a_failed_replica_when_it_answers_again() -> None:
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


def test_a_request_that_the_loop_cannot_take_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Request.set_vocabularies

    def refuse(req: Request, num_tokens: list[int]) -> None:
        if req.request_id == "bad":
            raise OverflowError("nobody thought of this")
        take(req, num_tokens)

    monkeypatch.setattr(Request, "set_vocabularies", refuse)
    harness = Harness(ToyBackend(three_models()))
    good = request("good", {model: [1, 2] for model in EFT})
    for req in (request("bad", {model: [1] for model in EFT}), good):
        harness.submit(req)
    harness.drive()
    failure = harness.ends["bad"].failure
    assert failure is not None
    assert (failure.kind, harness.last("bad").failure) == ("EngineError", failure)
    assert harness.tokens("good") == naive(good)


def test_a_loop_that_dies_ends_everybody_whatever_else_fails(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("open", {model: [1] for model in EFT}, max_tokens=400, ignore_eos=True))
    harness.loop.receive()
    harness.loop.step()

    def fail() -> None:
        raise OverflowError("nobody thought of this")

    for call in (fail, fail):
        harness.loop._inbox.put(call)
    harness.submit(request("queued", {model: [1] for model in EFT}))
    harness.loop._run()
    assert isinstance(harness.loop.error, OverflowError)
    for name in ("open", "queued"):
        failure = harness.last(name).failure
        assert failure is not None
        assert failure.kind == "CoordinatorLostError"
        assert harness.ends[name].failure == failure
    assert harness.backend.connected == {}


def test_more_prompts_of_one_model_than_a_step_may_compute_are_refused() -> None:
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(max_num_batched_tokens=2))
    names = [f"base@{i}" for i in range(3)]
    harness.submit(request("r", {name: [1, 2] for name in names}, dict.fromkeys(names, 1 / 3)))
    harness.drive(max_steps=3)
    failure = harness.last("r").failure
    assert failure is not None
    assert (failure.kind, failure.param) == ("InvalidRequestError", "model")
    assert "max_num_batched_tokens" in failure.message


def test_the_thread_runs_stops_and_fails_what_is_left() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.loop.start()
    harness.submit(request("endless", {model: [1] for model in EFT}, max_tokens=450, ignore_eos=True))
    harness.loop.close()
    assert harness.loop.error is None
    assert harness.last("endless").finish_reason in {FinishReason.ERROR, FinishReason.LENGTH}
