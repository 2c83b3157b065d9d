"""Controls and log-probabilities in the whole loop, against the naive loop; their tokens are in test_decode_loop.py."""

from __future__ import annotations

import math
import random
from typing import Any, Literal

import pytest
import torch
from fake_models import EOS, VOCAB_SIZE, ToyBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_harness import (
    EFT,
    Harness,
    LetterVocabulary,
    combined_logits,
    controls,
    naive,
    prompts_for,
    request,
    speculative,
    three_models,
)

from eft_serve.coordinator.controls import processors
from eft_serve.coordinator.sampler import Sampler, SamplerOutput
from eft_serve.numerics.backends import CpuBackend
from eft_serve.testing.naive import control
from eft_serve.types import SamplingParams, Speculative

PROMPTS = {model: [1, 2] for model in EFT}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(["raw_logprobs", "processed_logprobs"]))
def test_logprobs_are_those_of_the_combination_before_its_controls_or_after(
    seed: int, mode: Literal["raw_logprobs", "processed_logprobs"]
) -> None:
    rng = random.Random(seed)
    req = request(
        "r",
        prompts_for(rng),
        speculative=speculative(rng),
        logprobs=3,
        logprobs_mode=mode,
        temperature=rng.choice([0.0, 0.7]),
        top_k=rng.choice([0, 5]),
        top_p=rng.choice([0.8, 1.0]),
        min_p=rng.choice([0.0, 0.05]),
        max_tokens=20,
        **controls(rng),
    )
    harness = Harness(ToyBackend(three_models()))
    harness.submit(req)
    harness.drive()
    tokens = harness.tokens("r")
    assert tokens == naive(req)
    sampling, prompt = req.generation.sampling, req.generation.prompts["base"]
    ends = {EOS, *sampling.stop_token_ids}
    described = [c for d in harness.deltas["r"] for c in d.components or ()]
    assert [c.token_id for c in described] == tokens
    for place, component in enumerate(described):
        logits = combined_logits(req, tokens[:place])
        if mode == "processed_logprobs":
            control(logits, sampling, prompt, tokens[:place], ends)
            narrow(logits, sampling)
        expected = torch.log_softmax(logits, -1)
        assert component.logprob == pytest.approx(float(expected[component.token_id]), abs=1e-4)
        assert component.models == []
        top = expected.topk(3)
        assert [other.logprob for other in component.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def narrow(logits: torch.Tensor, sampling: SamplingParams) -> None:
    """Temperature, top-k, top-p of the rest, and min-p, token by token."""
    if sampling.temperature == 0:
        return
    logits /= sampling.temperature
    order = sorted(range(len(logits)), key=lambda token: -float(logits[token]))
    order = order[: sampling.top_k or len(order)]
    probs = torch.softmax(logits[order].double(), 0).tolist()
    kept = [token for place, token in enumerate(order) if sum(probs[:place]) < sampling.top_p or place == 0]
    least = float(logits.max()) + (math.log(sampling.min_p) if sampling.min_p else -math.inf)
    for token in range(len(logits)):
        if token not in kept or float(logits[token]) < least:
            logits[token] = -torch.inf


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"logit_bias": ((VOCAB_SIZE, 1.0),)}, "logit_bias"),
        ({"allowed_token_ids": (1, -1)}, "allowed_token_ids"),
        ({"bad_words": ((1, VOCAB_SIZE),)}, "bad_words"),
        ({"stop_token_ids": (2**40,)}, "stop_token_ids"),
    ],
)
def test_a_control_of_a_token_that_the_models_do_not_have_is_refused_by_field(
    sampling: dict[str, Any], param: str
) -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("bad", PROMPTS, **sampling))
    harness.submit(request("good", PROMPTS))
    harness.drive()
    failure = harness.last("bad").failure
    assert failure is not None
    assert (failure.kind, failure.param) == ("InvalidRequestError", param)
    assert harness.tokens("good") == naive(request("good", PROMPTS))


def test_controls_that_leave_no_token_end_their_own_request() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("bad", PROMPTS, allowed_token_ids=(5,), bad_words=((5,),)))
    harness.submit(request("good", PROMPTS))
    harness.drive()
    failure = harness.last("bad").failure
    assert failure is not None
    assert (failure.kind, failure.param) == ("InvalidRequestError", "allowed_token_ids")
    assert failure.message == "allowed_token_ids, bad_words: no token is possible with these together"
    assert harness.tokens("good") == naive(request("good", PROMPTS))


def test_a_row_behind_a_draft_token_that_cannot_be_drawn_does_no_harm() -> None:
    """Drafters do not know the controls: after a token that they do not allow, nothing may be possible."""
    never = next(token for token in range(3, VOCAB_SIZE))
    allowed: dict[str, Any] = {"allowed_token_ids": (1, 2), "bad_words": ((never, 1), (never, 2)), "ignore_eos": True}
    req = request("r", PROMPTS, max_tokens=3, **allowed)
    req.draft_token_ids = [never]
    rows = torch.zeros(2, VOCAB_SIZE)
    req.num_ids = VOCAB_SIZE
    req.processors = processors(req, [LetterVocabulary()] * 3)  # type: ignore[list-item]
    for sequence in req.sequences:
        sequence.rows = rows
    (output,) = Sampler(CpuBackend(), 1, lambda *_: None).sample([req])
    assert isinstance(output, SamplerOutput)
    assert output.token_ids == [1]


def test_forced_tokens_are_described_as_the_combination_has_them() -> None:
    req = request("r", PROMPTS, forced_token_ids=[3, 4], logprobs=0, logit_bias=((3, 9.0),))
    harness = Harness(ToyBackend(three_models()))
    harness.submit(req)
    harness.drive()
    (first, _) = [c for d in harness.deltas["r"] for c in d.components or ()]
    assert first.logprob == pytest.approx(float(torch.log_softmax(combined_logits(req, []), -1)[3]), abs=1e-4)


def test_a_request_without_controls_has_no_processors() -> None:
    req = request("r", PROMPTS)
    req.num_ids = VOCAB_SIZE
    assert processors(req, [LetterVocabulary()] * 3) == ()  # type: ignore[list-item]


def test_scored_tokens_do_not_count_as_generated() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("scored", PROMPTS, forced_token_ids=[3, 4, 5]))
    harness.submit(request("drawn", PROMPTS, max_tokens=2, ignore_eos=True))
    harness.drive()
    value = harness.metrics.registry.get_sample_value
    assert (value("eft_generated_tokens_total"), value("eft_scored_tokens_total")) == (2, 3)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("end", ["max_tokens", "stop_token_ids"])
def test_nothing_has_to_be_possible_behind_the_end_of_an_output_that_was_drafted(overlap: bool, end: str) -> None:
    alone = {"base": 0.0, "tuned": 1.0}  # all that the drafter drafts is accepted
    speculative = Speculative(num_tokens=4, min_confidence=0, overlap=overlap)
    first = naive(request("r", PROMPTS, alone, max_tokens=4))
    ending: dict[str, Any] = {"max_tokens": 4} if end == "max_tokens" else {"stop_token_ids": first[-1:]}
    dead_end = tuple((*first, token) for token in range(VOCAB_SIZE))
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("r", PROMPTS, alone, speculative=speculative, bad_words=dead_end, **ending))
    harness.submit(request("goes on", PROMPTS, alone, speculative=speculative, bad_words=dead_end))
    harness.drive()
    assert harness.tokens("r") == harness.tokens("goes on") == first
    assert harness.last("r").failure is None
    failure = harness.last("goes on").failure
    assert failure is not None
    assert failure.param == "bad_words"
