"""Forced tokens are scored, and components are what the models say one by one, in the obvious way."""

from __future__ import annotations

import random
import time
from typing import Any

import msgspec
import pytest
import torch
from fake_models import EOS, VOCAB_SIZE, ToyBackend, toy_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_harness import Harness, LetterVocabulary, naive, prompts_for, request, some_tokens, three_models

from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.scheduler import FORCED_ROWS
from eft_serve.numerics.combine import combine
from eft_serve.numerics.truncate import truncate_weights
from eft_serve.types import (
    Combination,
    Failure,
    FinishReason,
    GenerationRequest,
    Reward,
    SamplingParams,
    SpecDecodeStats,
    Speculative,
    Term,
    TokenComponents,
)

KINDS: dict[str, tuple[dict[str, tuple[float, float]], float]] = {  # (coefficient, ratio) by model, top_p
    "up-scaling": ({"base": (1.0, 0.0), "reference": (-1.0, 0.0), "tuned": (1.0, 0.0)}, 1.0),
    "the tuned model": ({"base": (0.0, 0.0), "reference": (0.0, 0.0), "tuned": (1.0, 0.0)}, 1.0),
    "truncated": ({"base": (1.3, 1.3), "reference": (-1.3, -1.3), "tuned": (1.0, 0.0)}, 0.6),
    "nothing left of the reference": ({"base": (1.0, 1.0), "reference": (0.0, -1.0), "tuned": (0.0, 0.0)}, 0.6),
}
REWARDS = (Reward("helpful", "tuned", "reference", 0.7), Reward("odd", "base", "tuned", -0.2))


def scored(
    kind: str,
    prompts: dict[str, list[int]],
    components: int | None,
    tokens: list[int] | None = None,
    speculative: Speculative | None = None,
    only_counting: bool = False,
    request_id: str = "r",
    **sampling: object,
) -> Request:
    coefficients, top_p = KINDS[kind]
    terms = [Term(m, m, c, ratio=r, weight=float(m == "tuned")) for m, (c, r) in coefficients.items()]
    running = tuple(term for term in terms if term.counts or not only_counting)
    generation = GenerationRequest(
        request_id=request_id,
        combination=Combination(running, top_p, REWARDS if components is not None else ()),
        prompts=prompts,
        sampling=SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **sampling}),  # type: ignore[arg-type]
        speculative=speculative,
        forced_token_ids=tokens,
        components=components,
    )
    return Request.create(generation, time.monotonic())


def components(harness: Harness, request_id: str = "r") -> list[TokenComponents]:
    deltas = harness.deltas[request_id]
    assert all(len(d.components or ()) == len(d.token_ids) for d in deltas)
    return [c for delta in deltas for c in delta.components or ()]


def by_brute_force(req: Request, tokens: list[int]) -> list[TokenComponents]:
    """Whole log-softmaxes, one position and one model at a time."""
    found = []
    for position, token_id in enumerate(tokens):
        prompts, terms = req.generation.prompts, req.combination.terms
        logits = {t.name: toy_logits(t.model, prompts[t.name] + tokens[:position]) for t in terms}
        combined = combined_row([row[None] for row in logits.values()], req)
        logprobs = {name: torch.log_softmax(row, -1) for name, row in logits.items()}
        emulated = torch.log_softmax(combined, -1)

        likeliest = emulated.sort(descending=True).indices[: req.generation.components].tolist()
        one, *top = (_describe(token, logprobs, emulated) for token in [token_id, *likeliest])
        found.append(msgspec.structs.replace(one, top=top))
    return found


def combined_row(logits: list[torch.Tensor], req: Request) -> torch.Tensor:
    def column(attribute: str) -> torch.Tensor:
        return torch.tensor([[getattr(term, attribute)] for term in req.combination.terms])

    if req.combination.truncate_top_p < 1 and any(term.ratio for term in req.combination.terms):
        top_p = torch.tensor([req.combination.truncate_top_p])
        return truncate_weights(logits, column("unscaled"), column("ratio"), top_p)[0]
    return combine(logits, column("coefficient"))[0]


def _describe(token_id: int, logprobs: dict[str, torch.Tensor], emulated: torch.Tensor) -> TokenComponents:
    rewards = [float(logprobs[r.tuned][token_id] - logprobs[r.reference][token_id]) for r in REWARDS]
    total = sum(r.weight * value for r, value in zip(REWARDS, rewards, strict=True))
    models = [float(row[token_id]) for row in logprobs.values()]
    return TokenComponents(token_id, float(emulated[token_id]), models, rewards, total)


def flat(found: list[TokenComponents]) -> list[float]:
    return [n for c in found for n in (c.token_id, c.logprob, *c.models, *c.rewards, c.reward, *flat(c.top))]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10**6),
    st.sampled_from(sorted(KINDS)),
    st.booleans(),
    st.sampled_from([0, 1, 5]),
    st.sampled_from([3, 40, 1024]),
)
def test_components_are_what_each_model_says(seed: int, kind: str, is_forced: bool, num_top: int, budget: int) -> None:
    rng = random.Random(seed)
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(max_num_batched_tokens=budget))
    tokens = some_tokens(rng, 70) if is_forced else None
    speculative = rng.choice([None, Speculative(num_tokens=4)])
    sampling: dict[str, Any] = {"temperature": rng.choice([0.0, 1.5]), "top_p": rng.choice([0.3, 1.0]), "seed": seed}
    req = scored(kind, prompts_for(rng), num_top, tokens, speculative, **sampling)
    harness.submit(req)
    beside = scored(kind, prompts_for(rng), 2, tokens and some_tokens(rng, 70), request_id="beside", **sampling)
    harness.submit(beside)
    harness.submit(request("other", prompts_for(rng), max_tokens=6))
    harness.drive()
    assert harness.tokens("r") == (tokens or harness.tokens("r"))
    for each, count in ((req, num_top), (beside, 2)):
        got = components(harness, each.request_id)
        expected = by_brute_force(each, harness.tokens(each.request_id))
        assert flat(got) == pytest.approx(flat(expected), abs=2e-5)
        assert [len(c.top) for c in got] == [count] * len(got)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(sorted(KINDS)), st.sampled_from([0.0, 1.0]))
def test_looking_changes_no_token(seed: int, kind: str, temperature: float) -> None:
    """Not even where it makes models run that count for nothing."""
    rng = random.Random(seed)
    prompts = prompts_for(rng)
    said = []
    for wanted, only_counting in ((None, True), (2, False)):
        harness = Harness(ToyBackend(three_models()))
        looked_at: dict[str, Any] = {"temperature": temperature, "seed": seed, "max_tokens": 20}
        harness.submit(scored(kind, prompts, wanted, only_counting=only_counting, **looked_at))
        harness.drive()
        said.append(
            (harness.tokens("r"), "".join(d.text for d in harness.deltas["r"]), harness.last("r").finish_reason)
        )
    assert said[0] == said[1]


def test_a_model_that_counts_for_nothing_ends_no_text() -> None:
    harness = Harness(ToyBackend(three_models()))
    req = scored("the tuned model", prompts_for(random.Random(5)), 0, max_tokens=8, ignore_eos=False)
    [first] = naive(scored("the tuned model", req.generation.prompts, None, max_tokens=1))
    harness.loop.vocabularies = {
        model: LetterVocabulary(  # type: ignore[misc]
            eos_token_ids=frozenset([first] if model == "base" else [EOS])
        )
        for model in ("base", "reference", "tuned")
    }
    harness.submit(req)
    harness.drive()
    assert len(harness.tokens("r")) == len(naive(req)) > 1


def test_forced_tokens_are_taken_whatever_they_are_and_end_with_length() -> None:
    harness = Harness(ToyBackend(three_models()))
    tokens = [1, EOS, 2, 3]
    stop = LetterVocabulary().decode([2])
    harness.submit(request("r", prompts_for(random.Random(1)), forced_token_ids=tokens, max_tokens=1, stop=(stop,)))
    harness.drive()
    assert harness.tokens("r") == tokens
    assert "".join(d.text for d in harness.deltas["r"]) == LetterVocabulary().decode(tokens)
    assert harness.last("r").finish_reason == FinishReason.LENGTH


def test_forced_tokens_take_a_pass_for_so_many() -> None:
    harness = Harness(ToyBackend(three_models()))
    tokens = some_tokens(random.Random(3), 1) + [5] * (3 * FORCED_ROWS)
    steps = len(harness.backend.batches)
    harness.submit(
        request("r", {model: [1, 2, 3] for model in ("base", "reference", "tuned")}, forced_token_ids=tokens)
    )
    harness.drive()
    assert harness.tokens("r") == tokens
    assert len(harness.backend.batches) - steps == 1 + 3 + 1, (
        "the prompt, three chunks, and the engines hear of the end"
    )
    usage = harness.last("r").usage
    assert usage is not None
    assert usage.spec_decode == SpecDecodeStats(), "forced tokens are no draft tokens"


def test_scoring_does_not_delay_decoding_requests() -> None:
    """However many are scored, those that decode get their token with every step."""
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(max_num_batched_tokens=16))
    prompts = {model: [1, 2] for model in ("base", "reference", "tuned")}
    scored_before, after = range(3), range(3, 6)
    for i in scored_before:
        harness.submit(request(f"scored {i}", prompts, forced_token_ids=[i] * 60))
    decoding = request("decoding", prompts, max_tokens=30, ignore_eos=True)
    harness.submit(decoding)
    while "decoding" not in harness.deltas:
        harness.loop.receive()
        harness.loop.step()
    for i in after:
        harness.submit(request(f"scored {i}", prompts, forced_token_ids=[i] * 60))
    for _ in range(25):
        harness.loop.receive()
        before = len(decoding.output_token_ids)
        harness.loop.step()
        assert len(decoding.output_token_ids) == before + 1
    harness.drive()
    assert all(harness.tokens(f"scored {i}") == [i] * 60 for i in range(6))
    assert harness.backend.max_computed <= 16


def failure_of(harness: Harness, given: list[int]) -> Failure:
    harness.submit(request("r", {"base": [1] * 40}, {"base": 1.0}, forced_token_ids=given))
    harness.drive()
    failure = harness.last("r").failure
    assert failure is not None
    assert not harness.tokens("r")
    return failure


@pytest.mark.parametrize(
    ("tokens", "kind", "words"),
    [
        ([1, VOCAB_SIZE], "InvalidRequestError", f"{VOCAB_SIZE} is not in 0..{VOCAB_SIZE - 1}"),
        ([-1], "InvalidRequestError", "-1 is not in"),
        ([1] * 25, "ContextLengthError", "has 25 tokens, and after the prompt there is room for 24"),
    ],
)
def test_what_cannot_be_scored_is_refused(tokens: list[int], kind: str, words: str) -> None:
    failure = failure_of(Harness(ToyBackend(three_models(kv_tokens=64))), tokens)
    assert (failure.kind, failure.param) == (kind, "completion")
    assert words in failure.message


def test_a_model_that_is_only_looked_at_fails_its_request_when_it_says_nonsense() -> None:
    class Broken(ToyBackend):
        def _answer(self, replica_id: str, batch):  # type: ignore[no-untyped-def]
            result = super()._answer(replica_id, batch)
            for output in result.outputs if replica_id == "base-0" else ():
                if output.logits is not None:
                    output.logits.fill_(float("nan"))
            return result

    harness = Harness(Broken(three_models()))
    prompts = prompts_for(random.Random(2))
    harness.submit(scored("the tuned model", prompts, 0, request_id="looked at"))
    harness.submit(request("fine", prompts, {"tuned": 1.0}))
    harness.drive()
    failure = harness.last("looked at").failure
    assert failure is not None
    assert failure.kind == "EngineError"
    assert harness.tokens("fine")


def test_components_cross_the_wire_as_they_are() -> None:
    sent = TokenComponents(3, -1.5, [-1.0, -2.0], [0.5], 0.25, [TokenComponents(4, -2.5, [-3.0, -4.0], [1.0], 0.5)])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=TokenComponents) == sent
