"""The whole decode loop over toy models: tokens are as if alone."""

from __future__ import annotations

import random

import pytest
from fake_models import ToyBackend, endpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_harness import (
    EFT,
    TOLD,
    Harness,
    LetterVocabulary,
    many,
    naive,
    prompts_for,
    request,
    some_tokens,
    speculative,
    three_models,
)

from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.request import Request
from eft_serve.types import Delta, FinishReason, Speculative


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
        is_described = req.generation.components is not None or req.generation.logprobs is not None
        assert described == (naive(req) if is_described else [])
    assert not any(harness.backend.sequences.values()), "every sequence was freed"
    assert harness.backend.max_computed <= budget
    assert_accounted(harness, requests)


def assert_accounted(harness: Harness, requests: list[Request]) -> None:
    """Each request has one end, and all that the models computed is somebody's."""
    assert harness.ends.keys() == {req.request_id for req in requests}
    used = [usage for end in harness.ends.values() for usage in end.usage.models.values()]
    num_probes = len(harness.backend.endpoints)
    assert sum(usage.computed_tokens for usage in used) == harness.backend.num_computed_tokens - num_probes
    for req in requests:
        models = harness.ends[req.request_id].usage.models
        prompts = {term.model: len(req.generation.prompts[term.name]) for term in req.combination.terms}
        assert {model: usage.prompt_tokens for model, usage in models.items()} == prompts
        assert {usage.completion_tokens for usage in models.values()} == {len(harness.tokens(req.request_id))}
        assert all(0 <= usage.cached_tokens < usage.prompt_tokens for usage in models.values())
        assert harness.last(req.request_id).usage == harness.ends[req.request_id].usage
        assert harness.ends[req.request_id].usage.spec_decode.num_accepted <= len(harness.tokens(req.request_id))


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


def test_only_models_with_a_coefficient_run() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.backend.batches.clear()
    harness.submit(request("plain", {"base": [1]}, {"base": 1.0}))
    harness.drive()
    assert {replica_id for batches in harness.backend.batches for replica_id in batches} == {"base-0"}


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
