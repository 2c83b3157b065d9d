"""The served stack against the naive loop: the same tokens at temperature 0, in a crowd, with a replica killed."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, replace
from typing import Any

import openai
import pytest
from harness import NARROW_TOKENS, Served
from transformers import PreTrainedModel

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.testing import naive
from eft_serve.zoo.questions import held_out_questions, long_prompts

ROLES = {"base": "base-large", "reference": "base-small", "tuned": "tuned-small"}
NUM_PROMPTS = 60


@dataclass(frozen=True)
class Case:
    """A prompt as tokens, and how the recipe is to be run over it."""

    prompt_token_ids: list[int]
    max_tokens: int
    scale: float = 1.0
    weight: float = 1.0
    recipe: str = "eft"
    ignore_eos: bool = False

    @property
    def body(self) -> dict[str, Any]:
        return {
            "model": self.recipe,
            "prompt": self.prompt_token_ids,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "extra_body": {
                "eft": {"scale": self.scale, "weights": {"tuned-small": self.weight}},
                "ignore_eos": self.ignore_eos,
                "return_token_ids": True,
            },
        }


@pytest.fixture(scope="module")
def vocabulary(served: Served) -> Vocabulary:
    return Vocabulary.load(served.config.checkpoint_of("base-large"))


@pytest.fixture(scope="module")
def models(served: Served) -> dict[str, PreTrainedModel]:
    return {role: naive.load(served.config.checkpoint_of(name)) for role, name in ROLES.items()}


def expected_tokens(case: Case, models: dict[str, PreTrainedModel], vocabulary: Vocabulary) -> list[int]:
    return naive.generate_emulated(
        models,
        case.prompt_token_ids,
        max_tokens=case.max_tokens,
        num_tokens=vocabulary.num_tokens,
        eos_token_ids=frozenset() if case.ignore_eos else vocabulary.eos_token_ids,
        scale=case.scale,
        weight=case.weight,
    )


def cases(vocabulary: Vocabulary, count: int, seed: int = 0) -> list[Case]:
    """Questions in the chat format, prose to go on with, and some long ones; short and long outputs."""
    rng = random.Random(seed)
    texts = [f"User: {question.text}\nAssistant:" for question in held_out_questions(count, seed=seed)]
    texts += [f"User: {question.text}\nAssistant:" for question in long_prompts(count // 4, seed=seed)]
    chosen = rng.sample(texts, count)
    found = []
    for index, text in enumerate(chosen):
        token_ids = vocabulary.tokenizer(text)["input_ids"]
        if index % 5 == 0:  # a prompt of several hundred tokens
            token_ids = [t for other in rng.choices(texts, k=12) for t in vocabulary.tokenizer(other)["input_ids"]]
        knobs = (rng.choice([0.5, 1.5]), rng.choice([0.0, 0.5])) if index % 6 == 1 else (1.0, 1.0)
        found.append(Case(token_ids, rng.choice([4, 12, 32]), *knobs))
    return found


async def served_tokens(served: Served, wanted: list[Case]) -> list[list[int]]:
    async with served.async_client() as client:

        async def one(case: Case) -> list[int]:
            completion = await client.completions.create(**case.body)
            extra = completion.choices[0].model_extra or {}
            token_ids: list[int] = extra["token_ids"]
            assert completion.usage is not None
            assert completion.usage.completion_tokens == len(token_ids)
            return token_ids

        return list(await asyncio.gather(*map(one, wanted)))


def test_tokens_equal_the_naive_loop(
    served: Served, models: dict[str, PreTrainedModel], vocabulary: Vocabulary
) -> None:
    wanted = cases(vocabulary, NUM_PROMPTS)
    found = asyncio.run(served_tokens(served, wanted))
    drawn = served.by_process("eft_generated_tokens_total")
    assert len(drawn) == 2
    assert min(drawn.values()) > 0, "a coordinator was idle"
    computed = served.by_process("eft_engine_tokens_computed_total", model="tuned-small")
    assert len(computed) == 2
    assert min(computed.values()) > 0, "a replica was idle"
    expected = [expected_tokens(case, models, vocabulary) for case in wanted]
    assert found == expected
    assert len({tuple(tokens) for tokens in expected}) > NUM_PROMPTS // 3, "the prompts must not all say the same"


def test_with_three_times_as_many_tokens_as_there_is_room_for(
    served: Served, models: dict[str, PreTrainedModel], vocabulary: Vocabulary
) -> None:
    # Every output is 40 tokens long, so that requests that fit together when they start outgrow the room.
    wanted = [
        replace(case, recipe="narrow", max_tokens=40, ignore_eos=True)
        for case in cases(vocabulary, NUM_PROMPTS, seed=4)
    ]
    assert sum(len(case.prompt_token_ids) + case.max_tokens for case in wanted) > 3 * NARROW_TOKENS
    before = served.total("eft_preemptions_total")
    found = asyncio.run(served_tokens(served, wanted))
    assert served.total("eft_preemptions_total") > before, "nobody was preempted"
    assert found == [expected_tokens(case, models, vocabulary) for case in wanted]


def test_plain_models_equal_themselves(
    served: Served, models: dict[str, PreTrainedModel], vocabulary: Vocabulary
) -> None:
    for case in cases(vocabulary, 6, seed=1):
        for role, name in ROLES.items():
            completion = served.client().completions.create(
                model=name,
                prompt=case.prompt_token_ids,
                max_tokens=case.max_tokens,
                temperature=0,
                extra_body={"return_token_ids": True},
            )
            assert completion.choices[0].model_extra["token_ids"] == naive.generate_plain(  # type: ignore[index]
                models[role],
                case.prompt_token_ids,
                max_tokens=case.max_tokens,
                num_tokens=vocabulary.num_tokens,
                eos_token_ids=vocabulary.eos_token_ids,
            )


def test_a_killed_replica_changes_no_token(
    served: Served, models: dict[str, PreTrainedModel], vocabulary: Vocabulary
) -> None:
    rng = random.Random(5)
    wanted = [
        Case(case.prompt_token_ids[-40:], max_tokens=48, scale=rng.choice([1.0, 0.5]))
        for case in cases(vocabulary, 24, seed=2)
    ]

    async def kill_half_way() -> list[list[int]]:
        generation = asyncio.create_task(served_tokens(served, wanted))
        await asyncio.sleep(0.4)
        assert not generation.done(), "too fast to be disturbed: ask for more"
        victim = served.replicas("model-tuned-small")[0]
        victim.kill()
        return await generation

    failures = "eft_replica_failures_total"
    before = served.total(failures, model="tuned-small")
    found = asyncio.run(kill_half_way())
    assert served.total(failures, model="tuned-small") > before, "the victim was idle"
    assert found == [expected_tokens(case, models, vocabulary) for case in wanted]


def test_a_killed_coordinator_changes_no_token(
    served: Served, models: dict[str, PreTrainedModel], vocabulary: Vocabulary
) -> None:
    wanted = [
        Case(case.prompt_token_ids[-40:], max_tokens=48, ignore_eos=True) for case in cases(vocabulary, 16, seed=3)
    ]

    async def streamed(client: openai.AsyncOpenAI, case: Case) -> tuple[list[int], str, float]:
        """Tokens, text, and the longest pause in seconds."""
        token_ids, text, pause, last = list[int](), "", 0.0, time.monotonic()
        async for chunk in await client.completions.create(**case.body, stream=True):
            token_ids += (chunk.choices[0].model_extra or {}).get("token_ids", ())
            text += chunk.choices[0].text
            pause, last = max(pause, time.monotonic() - last), time.monotonic()
        return token_ids, text, pause

    async def kill_half_way() -> list[tuple[list[int], str, float]]:
        async with served.async_client() as client:
            answers = [asyncio.create_task(streamed(client, case)) for case in wanted]
            await asyncio.sleep(0.5)
            assert not any(answer.done() for answer in answers), "too fast to be disturbed: ask for more"
            served.replicas("coordinator")[0].kill()
            return list(await asyncio.gather(*answers))

    found = asyncio.run(kill_half_way())
    assert [token_ids for token_ids, _, _ in found] == [expected_tokens(case, models, vocabulary) for case in wanted]
    assert [text for _, text, _ in found] == [vocabulary.decode(token_ids) for token_ids, _, _ in found]
    assert max(pause for _, _, pause in found) < 10.0
