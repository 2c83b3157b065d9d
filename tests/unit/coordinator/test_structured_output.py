"""Outputs that follow grammars in the whole loop, against the naive loop and another library's matches."""

from __future__ import annotations

import random

import pytest
import torch
from fake_models import EOS, ToyBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_harness import (
    EFT,
    Harness,
    LetterVocabulary,
    controls,
    grammar,
    naive,
    pattern_of,
    prompts_for,
    request,
    speculative,
    three_models,
)

from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.sampler import SamplerOutput
from eft_serve.coordinator.structured_output import GrammarMask
from eft_serve.errors import InvalidRequestError
from eft_serve.grammars import matcher
from eft_serve.grammars.definitions import of_regex
from eft_serve.testing.naive import PartialRegex
from eft_serve.types import FinishReason, Grammar, Speculative

PROMPTS = {model: [1, 2] for model in EFT}
COMBINED_WITH = {"logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty"}


def letters(*token_ids: int) -> str:
    return LetterVocabulary().decode([*token_ids])


def constrained(rng: random.Random, request_id: str) -> Request:
    others = {name: value for name, value in controls(rng).items() if name in COMBINED_WITH}
    return request(
        request_id,
        prompts_for(rng),
        speculative=speculative(rng),
        max_tokens=rng.randint(1, 20),
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randrange(2**62),
        ignore_eos=rng.random() < 0.2,
        grammar=grammar(rng),
        **others,
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([5, 17, 1024]), st.sampled_from([64, 4096]))
def test_outputs_under_grammars_are_those_of_the_naive_loop(seed: int, count: int, budget: int, kv_tokens: int) -> None:
    rng = random.Random(seed)
    harness = Harness(ToyBackend(three_models(kv_tokens=kv_tokens)), CoordinatorConfig(max_num_batched_tokens=budget))
    requests = [constrained(rng, f"r{i}") for i in range(count)]
    for req in requests:
        harness.submit(req)
    harness.drive()
    for req in requests:
        tokens, sampling = harness.tokens(req.request_id), req.generation.sampling
        assert tokens == naive(req)
        assert sampling.grammar is not None
        matching = PartialRegex(pattern_of(sampling.grammar), LetterVocabulary().decode)
        body = tokens[:-1] if tokens[-1] == EOS else tokens
        stopped = harness.last(req.request_id).finish_reason is FinishReason.STOP
        assert matching.is_complete(body) if stopped else matching.may_go_on(body)


def follow_for_ever(grammar: Grammar) -> None:
    """As another request whose output uses up the states that they share."""
    rng, other = random.Random(0), request("others", PROMPTS, grammar=grammar).matcher
    while other is not None:
        other.allowed()
        other.advance([rng.randrange(3)])


def test_an_answer_ends_with_its_grammar_without_an_end_token() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("r", PROMPTS, grammar=Grammar(of_regex(letters(7, 3, 9)), "p"), ignore_eos=True))
    harness.drive()
    assert harness.tokens("r") == [7, 3, 9]
    assert harness.last("r").finish_reason is FinishReason.STOP


def test_an_answer_ends_with_its_grammar_also_where_that_was_drafted() -> None:
    for seed in range(40):  # drafters guess the end now and then
        drafted = request(
            "r",
            PROMPTS,
            speculative=Speculative(num_tokens=4, min_confidence=0.0),
            grammar=Grammar(of_regex(f"[{letters(*range(60))}]{{2}}[{letters(*range(50))}]?"), "p"),
            ignore_eos=True,
            temperature=1.0,
            seed=seed,
        )
        harness = Harness(ToyBackend(three_models()))
        harness.submit(drafted)
        harness.drive()
        assert harness.last("r").failure is None
        assert harness.tokens("r") == naive(drafted)


def test_a_grammar_that_ends_before_min_tokens_is_an_error_of_its_request_only() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("r", PROMPTS, grammar=Grammar(of_regex(letters(7, 3)), "p.regex"), min_tokens=3))
    harness.submit(request("other", PROMPTS))
    harness.drive()
    failure = harness.last("r").failure
    assert failure is not None
    assert (failure.kind, failure.param) == ("InvalidRequestError", "min_tokens")
    assert "min_tokens, p.regex: no token is possible" in failure.message
    assert harness.tokens("other") == naive(request("other", PROMPTS))


def test_a_grammar_that_gets_too_complex_is_an_error_of_its_request_only() -> None:
    harness = Harness(ToyBackend(three_models()))
    one = letters(1)
    ambiguous = Grammar(f'start: e\ne: e e | "{one}" | e "{one}" e | e e e', "structured_outputs.grammar")
    harness.submit(request("r", PROMPTS, grammar=ambiguous, max_tokens=200, ignore_eos=True))
    harness.submit(request("other", PROMPTS))
    harness.drive()
    failure = harness.last("r").failure
    assert failure is not None
    assert (failure.kind, failure.param) == ("InvalidRequestError", "structured_outputs.grammar")
    assert "Too many items" in failure.message
    assert harness.tokens("other") == naive(request("other", PROMPTS))


def test_a_grammar_that_gets_too_complex_behind_a_drawn_token_is_an_error_of_its_request_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matcher, "MAX_OWN_S", -1.0)  # as if every grammar took long to compile
    states = Grammar(of_regex("[012]*0[012]{18}1[012]*"), "structured_outputs.regex")
    harness = Harness(ToyBackend(three_models()))
    harness.submit(one := request("r", PROMPTS, grammar=states, max_tokens=200, ignore_eos=True))
    harness.submit(request("other", PROMPTS, max_tokens=30))
    for _ in range(3):
        harness.loop.receive()
        harness.loop.step()
    assert one.matcher is not None
    with pytest.raises(InvalidRequestError):
        follow_for_ever(states)
    harness.loop._advance([one], [SamplerOutput([0])])
    harness.drive()
    failure = harness.last("r").failure
    assert failure is not None
    assert (failure.kind, failure.param) == ("InvalidRequestError", "structured_outputs.regex")
    assert harness.tokens("other") == naive(request("other", PROMPTS, max_tokens=30))


@pytest.mark.parametrize("definition", ["start: x", of_regex("["), of_regex("(?=a)b"), 'start: ""'])
def test_a_grammar_that_cannot_be_used_names_its_parameter(definition: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request("r", PROMPTS, grammar=Grammar(definition, "response_format"))
    assert caught.value.param == "response_format"


def test_an_output_that_left_its_grammar_is_not_masked_at_another_place_of_it() -> None:
    req = request("r", PROMPTS, grammar=Grammar(of_regex(letters(7, 3)), "p"))
    assert req.matcher is not None
    with pytest.raises(ValueError, match="token 9"):
        GrammarMask(req.matcher, [EOS])([7, 9], [], torch.zeros(1, EOS + 1))
