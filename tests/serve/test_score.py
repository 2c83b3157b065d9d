"""Scores, components and the best of several on the served stack, against the naive loop."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from harness import PREFIX, SYSTEM_PROMPT, Served
from transformers import PreTrainedModel

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.testing import naive
from eft_serve.zoo.questions import held_out_questions

MAX_TOKENS = 14
CLOSE = 1e-4
QUESTIONS = [question.text for question in held_out_questions(8, seed=11)]
SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.3, "seed": 5}]
ROLES = ("base", "reference", "tuned")


@dataclass(frozen=True)
class Case:
    """A recipe of one fine-tuning with its knobs: which term each role is, and what that reads."""

    model: str
    terms: dict[str, str]  # by role
    eft: dict[str, Any] = field(default_factory=dict)
    before: str = ""  # what the tuned model reads before the chat
    after: str = ""

    def prompts(self, question: str) -> dict[str, str]:
        plain = f"User: {question}\nAssistant:"
        return {"base": plain, "reference": plain, "tuned": f"{self.before}{plain}{self.after}"}

    @property
    def knobs(self) -> dict[str, float]:
        weights = self.eft.get("weights", {})
        return {
            "scale": self.eft.get("scale", 1.0),
            "weight": next(iter(weights.values()), 1.0),
            "truncate_top_p": self.eft.get("truncate_top_p", 1.0),
        }


UP = dict(zip(ROLES, ("base-large", "base-small", "tuned-small"), strict=True))
TOLD = f"System: {SYSTEM_PROMPT}\n"
CASES = {
    "up-scaling": Case("eft", UP),
    "amplified": Case("eft", UP, {"scale": 1.4, "weights": {"tuned-small": 0.7}}),
    "truncated": Case("eft", UP, {"scale": 1.2, "truncate_top_p": 0.5}),
    "the tuned model, the others looked at": Case("eft", UP, {"scale": 0.0}),
    "the base, the others looked at": Case("eft", UP, {"weights": {"tuned-small": 0.0}}),
    "another prompt": Case("told", UP, before=TOLD),
    "two prompts of one model": Case(
        "steered",
        {"base": "base-large", "reference": "base-large", "tuned": "base-large@tuned"},
        {"weights": {"base-large": 1.5}},
        before=TOLD,
        after=PREFIX,
    ),
}
case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def post(served: Served, path: str, body: dict[str, Any], status: int = 200) -> Any:
    response = httpx.post(f"{served.url}/v1/{path}", json=body, headers=served.headers(), timeout=120.0)
    assert response.status_code == status, response.text
    return response.json()


def score(served: Served, case: Case, *items: dict[str, Any], components: int = 0) -> list[dict[str, Any]]:
    body = {"model": case.model, "eft": case.eft, "items": list(items), "components": components}
    data: list[dict[str, Any]] = post(served, "score", body)["data"]
    assert [each["index"] for each in data] == list(range(len(items)))
    return data


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def answers(served: Served, case: Case, question: str, **options: Any) -> list[dict[str, Any]]:
    body = {"model": case.model, "messages": asked(question), "max_tokens": MAX_TOKENS, "return_token_ids": True}
    eft = case.eft | options.pop("eft", {})
    choices: list[dict[str, Any]] = post(served, "chat/completions", body | {"eft": eft} | options)["choices"]
    return choices


@pytest.fixture(scope="module")
def vocabulary(served: Served) -> Vocabulary:
    return Vocabulary.load(served.config.checkpoint_of("base-large"))


@pytest.fixture(scope="module")
def models(served: Served) -> dict[str, PreTrainedModel]:
    return {name: naive.load(served.config.checkpoint_of(name)) for name in UP.values()}


def naively(
    models: dict[str, PreTrainedModel], vocabulary: Vocabulary, case: Case, question: str, tokens: list[int]
) -> list[dict[str, Any]]:
    """Each token's log-probabilities and reward, one position at a time."""
    knobs, size = case.knobs, vocabulary.num_tokens
    prompts = {role: vocabulary.tokenizer(text)["input_ids"] for role, text in case.prompts(question).items()}
    found = []
    for position, token in enumerate(tokens):
        said = {
            role: naive.next_logprobs(
                models[case.terms[role].partition("@")[0]], [*prompts[role], *tokens[:position]], size
            )
            for role in ROLES
        }
        tuned = [(said["tuned"], said["reference"], knobs["weight"])]
        emulated = naive.emulated_logprobs(
            said["base"], said["reference"], tuned, knobs["scale"], knobs["truncate_top_p"]
        )
        reward = float(said["tuned"][token] - said["reference"][token])
        found.append(
            {
                "logprob": float(emulated[token]),
                "models": {case.terms[role]: float(said[role][token]) for role in ROLES},
                "reward": knobs["weight"] * reward,
                "likeliest": emulated.argsort(descending=True).tolist(),
            }
        )
    return found


def numbers(tokens: list[dict[str, Any]]) -> list[float]:
    """All that was said of the tokens, in an order of its own."""
    return [n for t in tokens for n in (t["logprob"], *(t["models"][m] for m in sorted(t["models"])), t["reward"])]


@case
def test_a_score_is_the_generations_own_and_the_naive_loops(
    served: Served, models: dict[str, PreTrainedModel], vocabulary: Vocabulary, case: Case
) -> None:
    for question, sampling in zip(QUESTIONS, SAMPLINGS, strict=False):
        [generated] = answers(served, case, question, eft={"components": True}, **sampling)
        ids, own = generated["token_ids"], generated["eft"]["tokens"]
        [scored] = score(served, case, {"messages": asked(question), "completion": ids}, components=3)
        assert [t["token_id"] for t in scored["tokens"]] == [t["token_id"] for t in own] == ids
        assert numbers(scored["tokens"]) == pytest.approx(numbers(own), abs=CLOSE)
        expected = naively(models, vocabulary, case, question, ids)
        assert numbers(scored["tokens"]) == pytest.approx(numbers(expected), abs=CLOSE)
        assert scored["total"]["reward"] == pytest.approx(sum(t["reward"] for t in expected), abs=CLOSE * len(ids))
        for token, there in zip(scored["tokens"], expected, strict=True):
            assert [other["token_id"] for other in token["top"]] == there["likeliest"][:3]
        plain = answers(served, case, question, **sampling)[0]
        assert plain["token_ids"] == ids, "looking changed a token"


def test_a_long_completion_of_any_tokens(
    served: Served, models: dict[str, PreTrainedModel], vocabulary: Vocabulary
) -> None:
    rng, up = random.Random(1), CASES["up-scaling"]
    [eos] = vocabulary.eos_token_ids
    ids = [eos, *(rng.randrange(vocabulary.num_tokens) for _ in range(80)), eos]
    [scored] = score(served, up, {"messages": asked(QUESTIONS[0]), "completion": ids})
    expected = naively(models, vocabulary, up, QUESTIONS[0], ids)
    assert numbers(scored["tokens"]) == pytest.approx(numbers(expected), abs=CLOSE)
    assert scored["total"]["num_tokens"] == 82


def test_text_is_tokenised_alone_as_it_would_follow(served: Served, vocabulary: Vocabulary) -> None:
    up, text = CASES["up-scaling"], " Lima is the capital of Peru."
    ids = vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = f"User: {QUESTIONS[0]}\nAssistant:"
    by_text, by_ids = score(
        served, up, {"prompt": prompt, "completion": text}, {"messages": asked(QUESTIONS[0]), "completion": ids}
    )
    assert [t["token_id"] for t in by_text["tokens"]] == ids
    assert numbers(by_text["tokens"]) == pytest.approx(numbers(by_ids["tokens"]), abs=CLOSE)
    assert "".join(t["token"] for t in by_text["tokens"]) == text


@pytest.mark.parametrize("model", ["eft", "narrow"])
def test_many_items_are_as_each_alone(served: Served, model: str) -> None:
    """On the narrow base not all of them fit at once, so that some are preempted."""
    rng, narrow = random.Random(2), Case(model, UP)
    items = [
        {"messages": asked(question), "completion": [rng.randrange(500) for _ in range(rng.randint(1, 90))]}
        for question in QUESTIONS * 2
    ]
    together = score(served, narrow, *items)
    for item, scored in zip(items[::5], together[::5], strict=True):
        [alone] = score(served, narrow, item)
        assert numbers(scored["tokens"]) == pytest.approx(numbers(alone["tokens"]), abs=CLOSE)


@pytest.mark.parametrize("name", ["amplified", "two prompts of one model"])
def test_the_best_by_the_naive_loops_reward_and_again_with_the_seed(
    served: Served, models: dict[str, PreTrainedModel], vocabulary: Vocabulary, name: str
) -> None:
    case, options = CASES[name], {"temperature": 1.7, "seed": 3}
    candidates = answers(served, case, QUESTIONS[0], n=5, **options)
    assert len({tuple(c["token_ids"]) for c in candidates}) > 2
    rewards = [
        sum(t["reward"] for t in naively(models, vocabulary, case, QUESTIONS[0], c["token_ids"])) for c in candidates
    ]
    order = sorted(range(5), key=lambda i: -rewards[i])
    first, again = (answers(served, case, QUESTIONS[0], best_of=5, n=3, **options) for _ in range(2))
    assert [c["token_ids"] for c in first] == [candidates[i]["token_ids"] for i in order[:3]]
    assert [c["eft"]["reward"] for c in first] == pytest.approx([rewards[i] for i in order[:3]], abs=1e-3)
    assert [c["token_ids"] for c in again] == [c["token_ids"] for c in first]


BASE = {"model": "eft", "prompt": "User: x\nAssistant:", "completion": " a"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("score", {**BASE, "completion": []}, 400, "completion"),
        ("score", {**BASE, "completion": [10**6]}, 400, "completion"),
        ("score", {**BASE, "completion": [1] * 5000}, 400, "completion"),
        ("score", {**BASE, "model": "narrow", "completion": [1] * 600}, 400, "completion"),
        ("score", {"model": "narrow", "items": [{"prompt": "x", "completion": [1] * 600}]}, 400, "items.0.completion"),
        ("score", {**BASE, "prompt": ""}, 400, "prompt"),
        ("score", {**BASE, "model": "nobody"}, 404, "model"),
        ("score", {**BASE, "eft": {"scale": 1e9}}, 400, "eft.scale"),
        ("score", {**BASE, "components": 21}, 400, "components"),
        ("score", {**BASE, "seed": 1}, 400, "seed"),
        ("completions", {"model": "base-large", "prompt": "x", "best_of": 2}, 400, "best_of"),
        ("completions", {"model": "eft", "prompt": "x", "best_of": 2, "stream": True}, 400, "best_of"),
        ("completions", {"model": "eft", "prompt": "x", "eft": {"components": 21}}, 400, "eft.components"),
    ],
)
def test_mistakes_are_named(served: Served, path: str, body: dict[str, Any], status: int, param: str) -> None:
    error = post(served, path, body, status)["error"]
    assert error["param"] == param, error
