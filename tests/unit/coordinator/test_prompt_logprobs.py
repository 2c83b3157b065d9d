"""Log-probabilities of prompts in the whole loop, and the outputs after them."""

from __future__ import annotations

import random

import pytest
import torch
from fake_models import VOCAB_SIZE, ToyBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_harness import (
    EFT,
    Harness,
    combined_logits,
    controls,
    grammar,
    many,
    naive,
    request,
    some_tokens,
    speculative,
    three_models,
)

from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.request import Request
from eft_serve.errors import InvalidRequestError
from eft_serve.types import FinishReason, TokenComponents


def shared(prompt: list[int]) -> dict[str, list[int]]:
    return dict.fromkeys(EFT, prompt)


def scored(rng: random.Random, request_id: str) -> Request:
    own = controls(rng)
    own.pop("allowed_token_ids", None)  # a grammar may allow none of them
    if rng.random() < 0.3:
        own = {"grammar": grammar(rng)}
    prompt = some_tokens(rng, 80)
    return request(
        request_id,
        shared(prompt),
        speculative=speculative(rng),
        prompt_logprobs=rng.choice([0, 3]),
        logprobs=rng.choice([None, 1]),
        max_tokens=rng.randint(max(1, int(own.get("min_tokens", 1))), 20),
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randrange(2**62),
        **own,
    )


def prompt_logprobs(harness: Harness, request_id: str) -> list[TokenComponents]:
    return [token for delta in harness.deltas[request_id] for token in delta.prompt_logprobs]


def assert_prompt_is_described(req: Request, described: list[TokenComponents]) -> None:
    prompt = req.generation.prompts["base"]
    assert [token.token_id for token in described] == prompt[1:]
    for place, token in enumerate(described, start=1):
        alone = request("alone", shared(prompt[:place]))
        expected = torch.log_softmax(combined_logits(alone, []), -1)
        assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-4)
        assert token.rank == 1 + int((expected > expected[token.token_id]).sum())
        top = expected.topk(req.generation.prompt_logprobs or 0)
        assert [other.token_id for other in token.top] == top.indices.tolist()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.sampled_from([5, 17, 1024]),  # token budget a step
    st.sampled_from([120, 4096]),  # KV tokens of a replica
)
def test_prompts_are_scored_and_outputs_are_as_without_it(seed: int, count: int, budget: int, kv_tokens: int) -> None:
    rng = random.Random(seed)
    harness = Harness(ToyBackend(three_models(kv_tokens=kv_tokens)), CoordinatorConfig(max_num_batched_tokens=budget))
    requests = [scored(rng, f"s{i}") for i in range(count)]
    others = many(rng, 3)
    for req in (*requests, *others):
        harness.submit(req)
    harness.drive()
    for req in (*requests, *others):
        assert harness.tokens(req.request_id) == naive(req)
    for req in requests:
        assert_prompt_is_described(req, prompt_logprobs(harness, req.request_id))
        has_logprobs = req.generation.logprobs is not None
        described = [c.token_id for d in harness.deltas[req.request_id] for c in d.components or ()]
        assert described == (naive(req) if has_logprobs else [])
        for usage in harness.ends[req.request_id].usage.models.values():
            assert usage.prompt_tokens == len(req.generation.prompts["base"])
            assert usage.completion_tokens == len(naive(req))


def test_a_prompt_is_scored_alone_in_few_steps() -> None:
    harness = Harness(ToyBackend(three_models()))
    num_steps = len(harness.backend.batches)
    req = request("r", shared([i % VOCAB_SIZE for i in range(129)]), prompt_logprobs=2, max_tokens=0)
    harness.submit(req)
    harness.drive()
    assert_prompt_is_described(req, prompt_logprobs(harness, "r"))
    assert harness.last("r").finish_reason is FinishReason.LENGTH
    assert harness.tokens("r") == []
    assert harness.last("r").usage is not None
    assert len(harness.backend.batches) - num_steps <= 6, "128 tokens, 32 at a time, and the first"


def test_components_of_a_prompt_are_those_of_each_term() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("r", shared([1, 2, 3]), prompt_logprobs=0, components=1, max_tokens=2))
    harness.drive()
    assert [len(token.models) for token in prompt_logprobs(harness, "r")] == [3, 3]


@pytest.mark.parametrize(
    ("prompts", "fields", "param"),
    [
        ({"base": [1, 2], "reference": [1, 2], "tuned": [1, 3]}, {}, "prompt_logprobs"),
        (shared([1]), {"max_tokens": 0}, "max_tokens"),
        (shared([1, 2]), {"forced_token_ids": [3]}, "prompt_logprobs"),
        (shared([1, 2]), {"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_a_prompt_that_cannot_be_scored_is_refused(
    prompts: dict[str, list[int]], fields: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request("r", prompts, **{"prompt_logprobs": 0, **fields})  # type: ignore[arg-type]
    assert caught.value.param == param


def test_a_prompt_beyond_the_context_is_refused_before_it_is_scored() -> None:
    harness = Harness(ToyBackend(three_models(max_len=32)))
    harness.submit(request("r", shared([1] * 33), prompt_logprobs=0))
    harness.drive()
    failure = harness.last("r").failure
    assert failure is not None
    assert (failure.kind, failure.param) == ("ContextLengthError", "prompt")
