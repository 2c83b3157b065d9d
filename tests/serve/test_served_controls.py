"""Controls and log-probabilities over HTTP against the naive loop: each alone and many together, with draft tokens, in
a crowd, preempted; one model is split over two ranks."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import Served
from test_oracle import ROLES
from transformers import PreTrainedModel

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.grammars.definitions import of_regex
from eft_serve.testing import naive
from eft_serve.types import Grammar, SamplingParams
from eft_serve.zoo.questions import held_out_questions

NUM_COMBINATIONS = 50
MAX_TOKENS = 14
WORDS = ("capital", "is", "The")
PATTERNS = (
    r'\{"answer": "[A-Za-z ]{1,16}", "sure": (true|false)\}',
    r" [A-Z][a-z]+( [a-z]+){0,5}\.",
    r"[0-9]{1,4}( [a-z]{2,8}){1,4}",
)


@dataclass(frozen=True)
class Case:
    """A request with controls, and what the naive loop says."""

    prompt: list[int]
    params: SamplingParams
    pattern: str | None
    words: tuple[str, ...]
    tokens: list[int]
    logprobs: list[float]

    def body(self, recipe: str, speculative: dict[str, Any]) -> dict[str, Any]:
        params = self.params
        rest = {
            "repetition_penalty": params.repetition_penalty,
            "allowed_token_ids": None if params.allowed_token_ids is None else list(params.allowed_token_ids),
            "bad_words": list(self.words),
            "min_tokens": params.min_tokens,
            "stop_token_ids": list(params.stop_token_ids),
            "structured_outputs": None if self.pattern is None else {"regex": self.pattern},
        }
        return {
            "model": recipe,
            "prompt": self.prompt,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
            "logprobs": 2,
            "logit_bias": {str(token): value for token, value in params.logit_bias},
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "extra_body": {"eft": {"speculative": speculative}, "return_token_ids": True, **rest},
        }


@pytest.fixture(scope="module")
def vocabulary(served: Served) -> Vocabulary:
    return Vocabulary.load(served.config.checkpoint_of("base-large"))


@pytest.fixture(scope="module")
def models(served: Served) -> dict[str, PreTrainedModel]:
    return {role: naive.load(served.config.checkpoint_of(name)) for role, name in ROLES.items()}


@pytest.fixture(scope="module")
def prompts(vocabulary: Vocabulary) -> list[list[int]]:
    texts = [f"User: {question.text}\nAssistant:" for question in held_out_questions(NUM_COMBINATIONS, seed=7)]
    return [vocabulary.tokenizer(text)["input_ids"] for text in texts]


def controls(rng: random.Random, num_tokens: int) -> dict[str, Any]:
    """One value of each control, by the names of `SamplingParams`; `words` are bad words, `pattern` is a grammar."""
    return {
        "logit_bias": tuple((token, rng.uniform(-5, 5)) for token in rng.sample(range(num_tokens), 50)),
        "repetition_penalty": rng.choice([0.9, 1.2]),
        "presence_penalty": rng.choice([-0.5, 1.5]),
        "frequency_penalty": rng.choice([-0.3, 0.8]),
        "allowed_token_ids": tuple(sorted(rng.sample(range(num_tokens), num_tokens // 2))),
        "min_tokens": rng.randint(5, MAX_TOKENS),
        "stop_token_ids": tuple(rng.sample(range(num_tokens), 20)),
        "words": WORDS,
        "pattern": rng.choice(PATTERNS),
    }


def combined(rng: random.Random, num_tokens: int) -> dict[str, Any]:
    """Some of the controls that go together: a grammar may need each token, and an end before `min_tokens`."""
    found = {name: value for name, value in controls(rng, num_tokens).items() if rng.random() < 0.4}
    if "pattern" in found:
        for name in ("allowed_token_ids", "min_tokens", "stop_token_ids", "words"):
            found.pop(name, None)
    return found


@pytest.fixture(scope="module")
def cases(vocabulary: Vocabulary, models: dict[str, PreTrainedModel], prompts: list[list[int]]) -> list[Case]:
    rng, num_tokens = random.Random(7), vocabulary.num_tokens
    wanted: list[dict[str, Any]] = [{name: value} for name, value in controls(rng, num_tokens).items()]
    wanted += [combined(rng, num_tokens) for _ in range(NUM_COMBINATIONS)]
    assert sum(len(each) > 1 for each in wanted) > NUM_COMBINATIONS // 2, "most of them must have several controls"

    def solved(number: int, own: dict[str, Any]) -> Case:
        pattern, words = own.pop("pattern", None), own.pop("words", ())
        texts = [text for word in words for text in (word, f" {word}")]
        params = SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=number % 2,
            seed=number,
            bad_words=tuple(tuple(vocabulary.tokenizer.encode(text, add_special_tokens=False)) for text in texts),
            grammar=None if pattern is None else Grammar(of_regex(pattern), "structured_outputs.regex"),
            **own,
        )
        prompt = prompts[number % len(prompts)]
        tokens, logprobs = naive.generate_controlled(
            models,
            prompt,
            params,
            num_tokens=num_tokens,
            eos_token_ids=vocabulary.eos_token_ids,
            grammar=None if pattern is None else naive.PartialRegex(pattern, vocabulary.decode),
        )
        return Case(prompt, params, pattern, tuple(words), tokens, logprobs)

    return [solved(number, own) for number, own in enumerate(wanted)]


@pytest.mark.parametrize(
    ("recipe", "speculative"),
    [
        ("eft", {"draft": "none"}),
        ("eft", {"num_tokens": 4, "min_confidence": 0}),
        ("eft", {}),
        ("narrow", {"num_tokens": 4, "min_confidence": 0}),  # with little room, so that requests are preempted
    ],
)
def test_controlled_tokens_and_their_logprobs_equal_the_naive_loop(
    served: Served, cases: list[Case], recipe: str, speculative: dict[str, Any]
) -> None:
    before = served.total("eft_preemptions_total")

    async def answer() -> list[Any]:
        async with served.async_client() as client:
            bodies = [case.body(recipe, speculative) for case in cases]
            answers = await asyncio.gather(*(client.completions.create(**body) for body in bodies))
            return [answer.choices[0] for answer in answers]

    for case, choice in zip(cases, asyncio.run(answer()), strict=True):
        assert choice.model_extra["token_ids"] == case.tokens, case.params
        assert choice.logprobs.token_logprobs == pytest.approx(case.logprobs, abs=1e-4)
    if recipe == "narrow":
        assert served.total("eft_preemptions_total") > before, "nobody was preempted"


def test_an_echo_has_the_naive_log_probabilities_of_its_prompt(
    served: Served, vocabulary: Vocabulary, models: dict[str, PreTrainedModel], prompts: list[list[int]]
) -> None:
    async def answers(chosen: list[list[int]]) -> list[Any]:
        async with served.async_client() as client:
            extra = {"return_token_ids": True, "prompt_logprobs": 2}
            fields: dict[str, Any] = {"model": "eft", "logprobs": 2, "temperature": 1, "seed": 5, "max_tokens": 6}
            echoed = await client.completions.create(prompt=chosen, echo=True, extra_body=extra, **fields)
            plain = await client.completions.create(prompt=chosen, extra_body=extra, **fields)
            return [*echoed.choices, *plain.choices]

    chosen = [*prompts[:6], [token for prompt in prompts[:12] for token in prompt]]
    found = asyncio.run(answers(chosen))
    for prompt, echo, plain in zip(chosen, found, found[len(chosen) :], strict=False):
        assert echo.model_extra["token_ids"] == plain.model_extra["token_ids"], "it is sampled as without an echo"
        assert echo.text == vocabulary.tokenizer.decode(prompt) + plain.text
        rows = naive.emulated_prompt_logprobs(models, prompt, vocabulary.num_tokens)
        own = [float(row[token]) for row, token in zip(rows, prompt[1:], strict=True)]
        assert echo.logprobs.token_logprobs[0] is None
        assert echo.logprobs.token_logprobs[1 : len(prompt)] == pytest.approx(own, abs=1e-4)
        shown = echo.model_extra["prompt_logprobs"]
        assert [each and each.keys() for each in shown] == [
            each and each.keys() for each in plain.model_extra["prompt_logprobs"]
        ]
        for row, token, described in zip(rows, prompt[1:], shown[1:], strict=True):
            rank = 1 + int((row > row[token]).sum())
            assert described[str(token)]["rank"] == rank
            assert {str(t) for t in torch.topk(row, 2).indices.tolist()} <= described.keys()
