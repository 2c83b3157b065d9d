"""Controls and log-probabilities over HTTP against the naive loop, beside one another and with draft tokens."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from harness import Served
from test_oracle import ROLES

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.testing import naive
from eft_serve.types import SamplingParams
from eft_serve.zoo.questions import held_out_questions

NUM_PROMPTS = 24
MAX_TOKENS = 14


def controls(rng: random.Random, num_tokens: int) -> dict[str, Any]:
    """Some of the controls of a request, as `SamplingParams` has them."""
    drawn = {
        "logit_bias": tuple((token, rng.uniform(-5, 5)) for token in rng.sample(range(num_tokens), 50)),
        "repetition_penalty": rng.choice([0.9, 1.2]),
        "presence_penalty": rng.choice([-0.5, 1.5]),
        "frequency_penalty": rng.choice([-0.3, 0.8]),
        "allowed_token_ids": tuple(sorted(rng.sample(range(num_tokens), num_tokens // 2))),
        "min_tokens": rng.randint(5, MAX_TOKENS),
        "stop_token_ids": tuple(rng.sample(range(num_tokens), 20)),
    }
    return {name: value for name, value in drawn.items() if rng.random() < 0.4}


def body_of(prompt: list[int], sampling: dict[str, Any], speculative: dict[str, Any]) -> dict[str, Any]:
    own = {name: sampling.get(name) for name in ("presence_penalty", "frequency_penalty")}
    bias = {str(token): value for token, value in sampling.get("logit_bias", ())}
    rest = {name: value for name, value in sampling.items() if name not in (*own, "logit_bias")}
    return {
        "model": "eft",
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "logprobs": 2,
        "logit_bias": bias,
        **{name: value for name, value in own.items() if value is not None},
        "extra_body": {"eft": {"speculative": speculative}, "return_token_ids": True, **rest},
    }


@pytest.mark.parametrize("speculative", [{"draft": "none"}, {"num_tokens": 4, "min_confidence": 0}, {}])
def test_controlled_tokens_and_their_logprobs_equal_the_naive_loop(served: Served, speculative: dict[str, Any]) -> None:
    vocabulary = Vocabulary.load(served.config.checkpoint_of("base-large"))
    models = {role: naive.load(served.config.checkpoint_of(name)) for role, name in ROLES.items()}
    rng = random.Random(7)
    questions = held_out_questions(NUM_PROMPTS, seed=7)
    prompts = [vocabulary.tokenizer(f"User: {question.text}\nAssistant:")["input_ids"] for question in questions]
    wanted = [controls(rng, vocabulary.num_tokens) for _ in prompts]

    async def served_choices() -> list[Any]:
        async with served.async_client() as client:
            bodies = [body_of(p, c, speculative) for p, c in zip(prompts, wanted, strict=True)]
            answers = await asyncio.gather(*(client.completions.create(**body) for body in bodies))
            return [answer.choices[0] for answer in answers]

    different = 0
    for prompt, sampling, choice in zip(prompts, wanted, asyncio.run(served_choices()), strict=True):
        params = SamplingParams(max_tokens=MAX_TOKENS, **sampling)
        expected, logprobs = naive.generate_controlled(
            models, prompt, params, num_tokens=vocabulary.num_tokens, eos_token_ids=vocabulary.eos_token_ids
        )
        assert choice.model_extra["token_ids"] == expected, sampling
        assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)
        different += bool(sampling)
    assert different > NUM_PROMPTS // 2, "most of them must have controls"
