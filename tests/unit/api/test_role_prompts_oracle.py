"""Recipes whose roles the request prompts apart, from HTTP to tokens, against the naive loop.

What the application makes of the requests is decoded by a real decode loop over real engines of the embedded family,
all requests at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from api_fakes import Stack
from transformers import PreTrainedModel

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.config import ZOO_CHECKPOINTS, AppConfig, CoordinatorConfig, ModelConfig
from eft_serve.coordinator.decode_loop import DecodeLoop
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.coordinator.request import Request
from eft_serve.engine.engine import Engine
from eft_serve.evaluation.product import InProcess, endpoint_of
from eft_serve.testing import naive
from eft_serve.types import Delta, GenerationRequest
from eft_serve.zoo.questions import held_out_questions

MODELS = ("base-large", "base-small", "tuned-small")
MAX_TOKENS = 16
NUM_QUESTIONS = 8
GUIDED = {"base": "base-large", "reference": "base-large", "tuned": {"model": "tuned-small", "weight": 0}, "scale": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "guided": GUIDED,
    "tuned-too": GUIDED | {"tuned": {"model": "tuned-small", "weight": 0.5}},
    "steered": {"base": "base-large", "reference": "base-large", "tuned": {"model": "base-large", "weight": 0.7}},
    "up": {"base": "base-large", "reference": "base-small", "tuned": {"model": "tuned-small", "weight": 1}},
}


@dataclass(frozen=True)
class Case:
    """A recipe, the roles that the request prompts, and what is truncated."""

    recipe: str
    prompted: tuple[str, ...]
    truncate_top_p: float = 1.0

    @property
    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its recipe's, and those of the fine-tuning."""
        recipe = RECIPES[self.recipe]
        return recipe, recipe["tuned"]


CASES = [
    Case("guided", ("reference",)),
    Case("tuned-too", ("reference",)),
    Case("tuned-too", ("base", "tuned"), truncate_top_p=0.9),
    Case("steered", ("tuned",)),
    Case("steered", ("base", "reference", "tuned"), truncate_top_p=0.8),
    Case("up", ("tuned",)),
]
SPECULATIVE: list[dict[str, Any]] = [
    {"draft": "none"},
    {"num_tokens": 4, "min_confidence": 0},
    {"draft": "base-large", "num_tokens": 3},
]


class Family:
    """The embedded models as engines, as the naive loop has them, and behind the application."""

    def __init__(self) -> None:
        config = ModelConfig(path="zoo:base-large", kv_cache_tokens=4096)
        self.engines = {m: Engine.load(m, config.model_copy(update={"path": f"zoo:{m}"})) for m in MODELS}
        self.vocabularies = {m: Vocabulary.load(ZOO_CHECKPOINTS / m) for m in MODELS}
        self.naive: dict[str, PreTrainedModel] = {m: naive.load(ZOO_CHECKPOINTS / m) for m in MODELS}
        models = {m: {"path": f"zoo:{m}"} for m in MODELS}
        self.stack = Stack(AppConfig.parse({"models": models, "recipes": RECIPES}))

    def requests(self, bodies: Sequence[dict[str, Any]]) -> list[GenerationRequest]:
        """What the application asks a coordinator for."""
        self.stack.service.requests.clear()

        async def post() -> None:
            async with self.stack.client() as client:
                for body in bodies:
                    response = await client.post("/v1/chat/completions", json=body)
                    assert response.status_code == 200, response.text

        asyncio.run(post())
        return list(self.stack.service.requests)

    def decode(self, generations: Sequence[GenerationRequest]) -> tuple[list[list[int]], int]:
        """The tokens of each, all decoded together; and how many draft tokens were accepted."""
        tokens: dict[str, list[int]] = {each.request_id: [] for each in generations}

        def take(emitted: Sequence[tuple[Request, Delta]]) -> None:
            for request, delta in emitted:
                assert delta.failure is None, delta.failure
                tokens[request.request_id] += delta.token_ids

        config = CoordinatorConfig(max_num_batched_tokens=256)
        loop = DecodeLoop(config, InProcess(self.engines), self.vocabularies, take, CoordinatorMetrics())
        loop.set_replicas({name: endpoint_of(engine) for name, engine in self.engines.items()})
        requests = [Request.create(each, time.monotonic()) for each in generations]
        for request in requests:
            loop.submit(request)
        loop.receive()
        while loop.step() or loop.num_requests:
            loop.receive()
        return list(tokens.values()), sum(request.speculation.stats.num_accepted for request in requests)

    def expected(self, case: Case, prompts: dict[str, str]) -> list[int]:
        """By the naive loop, each role reading the text that is its own."""
        recipe, tuned = case.settings
        roles = {"base": recipe["base"], "reference": recipe["reference"], "tuned": tuned["model"]}
        vocabulary = self.vocabularies["base-large"]
        return naive.generate_emulated(
            {role: self.naive[model] for role, model in roles.items()},
            {role: vocabulary.tokenizer(text)["input_ids"] for role, text in prompts.items()},
            max_tokens=MAX_TOKENS,
            num_tokens=vocabulary.num_tokens,
            eos_token_ids=vocabulary.eos_token_ids,
            scale=recipe.get("scale", 1.0),
            weight=tuned["weight"],
            truncate_top_p=case.truncate_top_p,
        )


@pytest.fixture(scope="module")
def family() -> Iterator[Family]:
    family = Family()
    yield family
    for engine in family.engines.values():
        engine.close()


def question_for(role: str, index: int, prompted: Sequence[str]) -> str:
    questions = held_out_questions(4 * NUM_QUESTIONS, seed=3)
    return questions[4 * index + (1 + prompted.index(role) if role in prompted else 0)].text


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.recipe}: {', '.join(case.prompted)}")
def test_tokens_equal_the_naive_loop_with_and_without_draft_tokens(family: Family, case: Case) -> None:
    def asked(role: str, index: int) -> str:
        return question_for(role, index, case.prompted)

    expected = [
        family.expected(case, {r: f"User: {asked(r, i)}\nAssistant:" for r in ("base", "reference", "tuned")})
        for i in range(NUM_QUESTIONS)
    ]
    for speculative in SPECULATIVE:
        bodies = []
        for index in range(NUM_QUESTIONS):
            prompts: dict[str, Any] = {r: [{"role": "user", "content": asked(r, index)}] for r in case.prompted}
            last = case.prompted[-1]  # another form of prompt, with the same meaning
            prompts[last] = f"User: {asked(last, index)}\nAssistant:"
            eft = {"prompts": prompts, "truncate_top_p": case.truncate_top_p, "speculative": speculative}
            turn = {"role": "user", "content": asked("", index)}
            bodies.append(
                {"model": case.recipe, "messages": [turn], "max_tokens": MAX_TOKENS, "temperature": 0, "eft": eft}
            )
        got, num_accepted = family.decode(family.requests(bodies))
        assert got == expected, speculative
        drafts = {"none": False, "auto": case.settings[1]["weight"] > 0, "base-large": True}
        assert (num_accepted > 0) == drafts[str(speculative.get("draft", "auto"))]
    assert len(set(map(tuple, expected))) > NUM_QUESTIONS // 2, "the prompts must not all say the same"


def test_a_prompt_for_one_role_changes_what_is_said(family: Family) -> None:
    case = CASES[0]
    texts = [question_for(role, 0, case.prompted) for role in ("base", "reference")]
    asked, negative = (f"User: {text}\nAssistant:" for text in texts)
    same = family.expected(case, dict.fromkeys(("base", "reference", "tuned"), asked))
    assert family.expected(case, {"base": asked, "reference": negative, "tuned": asked}) != same
