"""Speculative decoding on the served stack: the same tokens with every drafter, and counters that say how many."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from harness import Served

from eft_serve.zoo.questions import held_out_questions, long_prompts

QUESTIONS = [question.text for question in [*held_out_questions(24, seed=3), *long_prompts(8, seed=3)]]
SIDES: dict[str, dict[str, Any]] = {
    **{f"{k} at a time": {"num_tokens": k} for k in (1, 2, 4, 8, 16)},
    "default": {},
    "no overlap": {"num_tokens": 4, "overlap": False},
}


def ask_all(served: Served, speculative: dict[str, Any], **sampling: Any) -> list[Any]:
    """Every question at once; whole answers."""

    async def run() -> list[Any]:
        async with served.async_client() as client:
            asked = [
                client.chat.completions.create(
                    model="eft",
                    messages=[{"role": "user", "content": question}],
                    max_tokens=80,
                    extra_body={"return_token_ids": True, "eft": {"speculative": speculative, "report": True}},
                    **sampling,
                )
                for question in QUESTIONS
            ]
            return await asyncio.gather(*asked)

    return asyncio.run(run())


def token_ids(answers: list[Any]) -> list[list[int]]:
    return [answer.choices[0].model_extra["token_ids"] for answer in answers]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "seeded"])
def test_tokens_are_the_same_for_every_drafter(served: Served, sampling: dict[str, Any]) -> None:
    plain = ask_all(served, {"draft": "none"}, **sampling)
    assert all(answer.usage.model_extra["eft"]["drafted"] == 0 for answer in plain)
    for name, side in SIDES.items():
        answers = ask_all(served, side, **sampling)
        assert token_ids(answers) == token_ids(plain), name
        reports = [answer.usage.model_extra["eft"] for answer in answers]
        assert sum(report["accepted"] for report in reports) > 0, name
        if side.get("num_tokens") in (4, 8, 16):
            assert sum(r["tokens_per_base_pass"] for r in reports) > 1.5 * len(reports), name


def test_usage_and_metrics_tell_what_became_of_the_draft_tokens(served: Served) -> None:
    names = ("eft_drafted_tokens_total", "eft_accepted_tokens_total", "eft_decode_passes_total")
    before = [served.total(name) for name in names]
    answers = ask_all(served, {"num_tokens": 4}, temperature=0)
    after = [served.total(name) for name in names]
    drafted, accepted, passes = (int(b - a) for a, b in zip(before, after, strict=True))
    details = [answer.usage.completion_tokens_details for answer in answers]
    assert accepted == sum(d.accepted_prediction_tokens for d in details) > 0
    assert drafted == accepted + sum(d.rejected_prediction_tokens for d in details)
    per_pass = [answer.usage.model_extra["eft"]["tokens_per_base_pass"] for answer in answers]
    counted = sum(answer.usage.completion_tokens / n for answer, n in zip(answers, per_pass, strict=True))
    assert passes == pytest.approx(counted)


def test_a_stream_reports_with_its_usage_and_only_when_asked(served: Served) -> None:
    request: dict[str, Any] = {
        "model": "eft",
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    *_, asked = served.client().chat.completions.create(**request, extra_body={"eft": {"report": True}})
    *_, unasked = served.client().chat.completions.create(**request)
    assert set(asked.usage.model_extra["eft"]) == {"drafted", "accepted", "acceptance_rate", "tokens_per_base_pass"}
    assert "eft" not in unasked.usage.model_extra


@pytest.mark.parametrize(
    ("speculative", "param"),
    [
        ({"num_tokens": 0}, "eft.speculative.num_tokens"),
        ({"num_tokens": 17}, "eft.speculative.num_tokens"),
        ({"num_tokens": "4"}, "eft.speculative.num_tokens"),
        ({"draft": "nobody"}, "eft.speculative.draft"),
        ({"draft": "base-narrow"}, "eft.speculative.draft"),  # a model, but not of this recipe
        ({"min_confidence": 1.5}, "eft.speculative.min_confidence"),
        ({"method": "keyed"}, "eft.speculative.method"),
        ({"draft": "ngram"}, "eft.speculative.draft"),
        ({"depth": 4}, "eft.speculative.depth"),
    ],
)
def test_bad_input_is_named(served: Served, speculative: dict[str, Any], param: str) -> None:
    body = {
        "model": "eft",
        "messages": [{"role": "user", "content": "hi"}],
        "eft": {"speculative": speculative},
    }
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=served.headers(), timeout=30.0)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
