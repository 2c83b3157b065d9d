"""Requests that another coordinator goes on with: what it gives is the rest of the very same answer."""

from __future__ import annotations

import random

import msgspec
import pytest
from fake_models import ToyBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_harness import (
    EFT,
    GRAMMARS,
    Harness,
    grammar,
    many,
    prompts_for,
    request,
    some_tokens,
    speculative,
    three_models,
)

from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.request import Request
from eft_serve.errors import InvalidRequestError
from eft_serve.types import Delta, Resumption

PROMPTS = {model: [1, 2] for model in EFT}


def all_kinds(rng: random.Random) -> list[Request]:
    """Sampled and scored, with controls, grammars, stop strings, log-probabilities of outputs and prompts."""
    prompt = some_tokens(rng, 80)
    return [
        *many(rng, 3),
        request("g", prompts_for(rng), grammar=grammar(rng), speculative=speculative(rng), logprobs=1, max_tokens=20),
        request(
            "s", prompts_for(rng), stop=("3", "ab", "Q"), temperature=1.0, seed=rng.randrange(2**62), max_tokens=30
        ),
        request("p", dict.fromkeys(EFT, prompt), prompt_logprobs=1, logprobs=0, repetition_penalty=1.3),
        request("only", dict.fromkeys(EFT, prompt), prompt_logprobs=1, max_tokens=len(prompt) == 1),
    ]


def given_by(deltas: list[Delta]) -> Resumption:
    return Resumption(
        token_ids=[token for delta in deltas for token in delta.token_ids],
        num_characters=sum(len(delta.text) for delta in deltas),
        num_prompt_logprobs=sum(len(delta.prompt_logprobs) for delta in deltas),
    )


def content(deltas: list[Delta]) -> tuple[object, ...]:
    return (
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.token_ids],
        [c.token_id for delta in deltas for c in delta.components or ()],
        [c.token_id for delta in deltas for c in delta.prompt_logprobs],
        deltas[-1].finish_reason,
    )


def run(requests: list[Request], kv_tokens: int) -> dict[str, list[Delta]]:
    config = CoordinatorConfig(max_num_batched_tokens=64)
    harness = Harness(ToyBackend(three_models(kv_tokens=kv_tokens)), config)
    for each in requests:
        harness.submit(each)
    harness.drive()
    assert not any(harness.backend.sequences.values()), "every sequence was freed"
    return harness.deltas


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([200, 4096]))
def test_what_is_resumed_goes_on_as_if_nothing_had_happened(seed: int, kv_tokens: int) -> None:
    rng = random.Random(seed)
    whole = run(requests := all_kinds(rng), kv_tokens)
    begun: dict[str, list[Delta]] = {}
    resumed = []
    for each in requests:
        deltas = whole[each.request_id]
        begun[each.request_id] = deltas[: rng.randrange(len(deltas))]
        generation = msgspec.structs.replace(each.generation, resumption=given_by(begun[each.request_id]))
        resumed.append(GRAMMARS.matched(Request.create(generation, each.arrival)))
    rest = run(resumed, kv_tokens)
    for request_id, before in begun.items():
        assert content(before + rest[request_id]) == content(whole[request_id])
        usage = rest[request_id][-1].usage
        assert usage is not None
        tokens = content(whole[request_id])[1]
        assert {used.completion_tokens for used in usage.models.values()} == {len(tokens)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "resumption"),
    [
        ({"max_tokens": 2}, Resumption(token_ids=[1, 2], num_characters=0, num_prompt_logprobs=0)),
        ({"forced_token_ids": [3, 4]}, Resumption(token_ids=[4], num_characters=0, num_prompt_logprobs=0)),
        ({"prompt_logprobs": 0}, Resumption(token_ids=[4], num_characters=0, num_prompt_logprobs=0)),
        ({}, Resumption(token_ids=[], num_characters=0, num_prompt_logprobs=1)),
    ],
)
def test_what_cannot_have_been_given_is_refused(fields: dict[str, object], resumption: Resumption) -> None:
    begun = request("r", PROMPTS, **fields).generation  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="resumption"):
        Request.create(msgspec.structs.replace(begun, resumption=resumption), 0.0)


def test_more_text_than_its_tokens_have_is_an_error_of_its_request() -> None:
    begun = request("r", PROMPTS).generation
    resumption = Resumption(token_ids=[3], num_characters=9, num_prompt_logprobs=0)
    deltas = run([Request.create(msgspec.structs.replace(begun, resumption=resumption), 0.0)], 4096)
    assert deltas["r"][-1].failure is not None
    assert deltas["r"][-1].failure.param == "resumption"
