"""A LoRA adapter on the served stack: the merged checkpoint's tokens, from the deployment of the model it adapts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from harness import Served
from transformers import PreTrainedModel

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.testing import lora, naive
from eft_serve.zoo.questions import held_out_questions

MAX_TOKENS = 14
PROMPTS = [f"User: {question.text}\nAssistant:" for question in held_out_questions(10, seed=4)]


@pytest.fixture(scope="module")
def vocabulary(served: Served) -> Vocabulary:
    return Vocabulary.load(served.config.checkpoint_of("base-large"))


@pytest.fixture(scope="module")
def models(served: Served) -> dict[str, PreTrainedModel]:
    merged = lora.merge(served.config.checkpoint_of("tuned-small"), served.config.adapters_of("tuned-small")["adapted"])
    plain = {name: naive.load(served.config.checkpoint_of(name)) for name in ("base-large", "tuned-small")}
    return {**plain, "adapted": merged}


def all_at_once(served: Served, asked: list[dict[str, Any]]) -> list[list[int]]:
    async def run() -> list[Any]:
        async with served.async_client() as client:
            return await asyncio.gather(*(client.completions.create(**body) for body in asked))

    return [completion.choices[0].model_extra["token_ids"] for completion in asyncio.run(run())]


def body(model: str, prompt: str, **eft: Any) -> dict[str, Any]:
    extra = {"return_token_ids": True, "eft": eft} if eft else {"return_token_ids": True}
    return {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "extra_body": extra}


def test_adapter_its_model_and_a_recipe_of_both_run_side_by_side(
    served: Served, models: dict[str, PreTrainedModel], vocabulary: Vocabulary
) -> None:
    sides: list[dict[str, Any]] = [{}, {"speculative": {"num_tokens": 4}}, {"speculative": {"draft": "none"}}]
    asked = [body(name, prompt) for prompt in PROMPTS for name in ("adapted", "tuned-small")]
    asked += [body("adapted-eft", prompt, **side) for prompt in PROMPTS for side in sides]
    found = iter(all_at_once(served, asked))
    limits: dict[str, Any] = {
        "max_tokens": MAX_TOKENS,
        "num_tokens": vocabulary.num_tokens,
        "eos_token_ids": vocabulary.eos_token_ids,
    }
    roles = {"base": models["base-large"], "reference": models["tuned-small"], "tuned": models["adapted"]}
    ids = [vocabulary.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    alone = {
        name: [naive.generate_plain(models[name], i, **limits) for i in ids] for name in ("adapted", "tuned-small")
    }
    assert alone["adapted"] != alone["tuned-small"]
    for index in range(len(PROMPTS)):
        for name in ("adapted", "tuned-small"):
            assert next(found) == alone[name][index]
    for i in ids:
        expected = naive.generate_emulated(roles, dict.fromkeys(roles, i), **limits)
        assert [next(found) for _ in sides] == [expected] * len(sides)


def test_an_adapter_is_a_model_without_a_deployment_of_its_own(served: Served) -> None:
    assert "adapted" in {model.id for model in served.client().models.list()}
    assert served.replicas("model-tuned-small")
    assert not served.replicas("model-adapted")
