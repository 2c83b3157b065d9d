"""Several prompts in one request, `echo`, and `prompt_logprobs`."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from api_fakes import Stack, chat, events, make_config

from eft_serve.api.logprobs import CompletionLogprobs
from eft_serve.api.model_tokenizer import ModelTokenizer
from eft_serve.config import AppConfig
from eft_serve.types import Delta, FinishReason, GenerationRequest, TokenComponents

MODEL = "small"  # with a template, and `<s>` before every text
BOS = 0


def described(token_id: int, logprob: float, rank: int = 1, *top: tuple[int, float]) -> TokenComponents:
    others = [TokenComponents(i, value, [], [], 0.0) for i, value in top]
    return TokenComponents(token_id, logprob, [], [], 0.0, others, rank)


def answer(request: GenerationRequest) -> Iterable[Delta]:
    """Scores the prompt in two parts if that is asked for, then says `Hi`, or the seed."""
    prompt = request.prompts[MODEL]
    wants = request.prompt_logprobs
    scored = [] if wants is None else [described(t, -i / 4, 2, (t + 1, -0.1)) for i, t in enumerate(prompt[1:], 1)]
    if request.sampling.max_tokens == 0:
        yield Delta(text="", token_ids=[], prompt_logprobs=scored, finish_reason=FinishReason.LENGTH)
        return
    if scored:
        yield Delta(text="", token_ids=[], prompt_logprobs=scored[:2])
        yield Delta(text="", token_ids=[], prompt_logprobs=scored[2:])
    letters = [token_of("H"), token_of("i")]
    components = None if request.logprobs is None else [described(t, -1.5, 0, (t, -1.5)) for t in letters]
    yield Delta(text="Hi", token_ids=letters, components=components, finish_reason=FinishReason.STOP)


def token_of(letter: str) -> int:
    return ord(letter) - ord("a") + 65 if letter != " " else 221


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path), answer)


async def complete(stack: Stack, **fields: Any) -> Any:
    async with stack.client() as client:
        response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "abc", **fields})
    return response.json() if response.status_code == 200 else (response.status_code, response.json()["error"])


async def test_an_echo_has_the_prompt_and_its_log_probabilities_before_the_answer(stack: Stack) -> None:
    body = await complete(stack, echo=True, logprobs=1)
    (choice,) = body["choices"]
    assert choice["text"] == "abcHi"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<s>", "a", "b", "c", "H", "i"]
    assert logprobs["token_logprobs"] == [None, -0.25, -0.5, -0.75, -1.5, -1.5]
    assert logprobs["top_logprobs"] == [
        None,
        {"a": -0.25, "b": -0.1},
        {"b": -0.5, "c": -0.1},
        {"c": -0.75, "d": -0.1},
        {"H": -1.5},
        {"i": -1.5},
    ]
    assert logprobs["text_offset"] == [0, 0, 1, 2, 3, 4]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (4, 2)


async def test_an_echo_without_tokens_to_generate_is_the_scored_prompt(stack: Stack) -> None:
    body = await complete(stack, echo=True, logprobs=0, max_tokens=0)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.5, -0.75]
    assert body["usage"]["completion_tokens"] == 0
    assert stack.service.requests[0].sampling.max_tokens == 0


async def test_an_echo_of_token_ids_is_their_text(stack: Stack) -> None:
    body = await complete(stack, prompt=[BOS, 65, 66], echo=True)
    assert body["choices"][0]["text"] == "abHi"
    assert body["choices"][0]["logprobs"] is None
    assert stack.service.requests[0].prompt_logprobs is None, "nobody wants them"
    shown = await complete(stack, prompt=[BOS, 65, 66], echo=True, skip_special_tokens=False)
    assert shown["choices"][0]["text"] == "<s>abHi"


@pytest.mark.parametrize("fields", [{"prompt": [65], "logprobs": 1}, {"prompt": "abc"}])
async def test_an_echo_that_needs_no_model_asks_none(stack: Stack, fields: dict[str, Any]) -> None:
    body = await complete(stack, echo=True, max_tokens=0, **fields)
    assert body["choices"][0]["text"] == "a" if fields["prompt"] == [65] else "abc"
    assert stack.service.requests == []


async def test_a_streamed_echo_comes_first(stack: Stack) -> None:
    async with stack.client() as client:
        fields = {"prompt": ["abc", "d"], "echo": True, "logprobs": 0, "stream": True}
        response = await client.post("/v1/completions", json={"model": MODEL, **fields})
    parts = [event["choices"][0] for event in events(response) if event != "[DONE]"]
    for index, prompt in enumerate(["abc", "d"]):
        own = [part for part in parts if part["index"] == index]
        assert [part["text"] for part in own] == [prompt, "Hi"]
        assert own[0]["logprobs"]["tokens"] == ["<s>", *prompt]
        assert own[1]["logprobs"]["text_offset"] == [len(prompt), len(prompt) + 1]


async def test_prompt_logprobs_have_vllms_shape(stack: Stack) -> None:
    body = await complete(stack, prompt_logprobs=1)
    (choice,) = body["choices"]
    assert choice["text"] == "Hi"
    assert choice["prompt_logprobs"][:2] == [
        None,
        {
            "65": {"logprob": -0.25, "rank": 2, "decoded_token": "a"},
            "66": {"logprob": -0.1, "rank": 1, "decoded_token": "b"},
        },
    ]
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(model=MODEL, prompt_logprobs=0))
    assert [p and len(p) for p in response.json()["prompt_logprobs"]] == [
        None,
        *[1] * (len("<|user|>hi\n<|assistant|>") - 1),
    ]
    assert "prompt_logprobs" not in response.json()["choices"][0]


@pytest.mark.parametrize("prompts", [["a", "bc"], [[65], [66, 67]]])
async def test_several_prompts_are_answered_in_their_order(stack: Stack, prompts: list[Any]) -> None:
    body = await complete(stack, prompt=prompts, n=2, seed=7, echo=True)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == ["aHi", "aHi", "bcHi", "bcHi"]
    seeds = [request.sampling.seed for request in stack.service.requests]
    assert seeds[:2] == seeds[2:], "each prompt has the seeds that it has alone"
    has_bos = isinstance(prompts[0], str)
    assert body["usage"]["prompt_tokens"] == 3 + 2 * has_bos
    assert body["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "20"),
        ({"prompt": []}, "prompt", "token"),
        ({"prompt": [[65], [9999]]}, "prompt.1", "9999"),
        ({"prompt": [[65], ["a"]]}, "prompt.1", "string"),
        ({"prompt": ["a", [65.5]]}, "prompt.1", "string"),
        ({"prompt": ["a"] * 129}, "prompt", "128"),
        ({"prompt": ["a"] * 100, "n": 3}, "prompt", "256"),
        ({"prompt": ["a", "b" * 600]}, "prompt.1", "512"),
    ],
)
async def test_what_cannot_be_echoed_is_named(
    stack: Stack, tmp_path: Path, fields: dict[str, Any], param: str, says: str
) -> None:
    status, error = await complete(stack, **fields)
    assert (status, error["param"]) == (400, param), error
    assert says in error["message"]


@pytest.mark.parametrize(
    ("recipe", "says"), [({}, "different prompts"), ({"system_prompt": "Be brief."}, "text of its own")]
)
async def test_a_prompt_that_the_terms_do_not_share_has_no_log_probabilities(
    tmp_path: Path, recipe: dict[str, str], says: str
) -> None:
    config = make_config(tmp_path).model_dump(mode="json")
    role = {"model": "small", **recipe}
    tuned = {"model": "small-chat", **recipe}
    config["recipes"] = {"up": {"base": role if recipe else "large", "reference": role, "tuned": tuned}}
    stack = Stack(AppConfig.parse(config), answer)
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(prompt_logprobs=0))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "prompt_logprobs")
    assert says in error["message"]


@pytest.mark.parametrize(
    "fields",
    [{"echo": True, "logprobs": 1}, {"prompt_logprobs": 1}, {"echo": True, "logprobs": 1, "stream": True}],
    ids=["echo", "prompt_logprobs", "stream"],
)
async def test_a_long_prompt_s_log_probabilities_are_worded_beside_the_event_loop(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    threads: dict[int, threading.Thread] = {}
    bytes_of = ModelTokenizer.bytes_of

    def seen(tokenizer: ModelTokenizer, token_id: int) -> bytes:
        threads[token_id] = threading.current_thread()
        return bytes_of(tokenizer, token_id)

    monkeypatch.setattr(ModelTokenizer, "bytes_of", seen)
    async with stack.client() as client:
        body = {"model": MODEL, "prompt": [token_of("a")] * 300, **fields}
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert threads[token_of("a")] is not threading.main_thread()


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"truncate_prompt_tokens": 2}, "bcHi"), ({"skip_special_tokens": False}, "<s>abcHi")],
    ids=["truncated", "special tokens"],
)
async def test_an_echo_is_the_text_of_the_tokens_that_are_described(
    stack: Stack, fields: dict[str, Any], text: str
) -> None:
    (choice,) = (await complete(stack, echo=True, logprobs=0, **fields))["choices"]
    assert choice["text"] == text
    tokens, offsets = (choice["logprobs"][name] for name in ("tokens", "text_offset"))
    assert [text[offset : offset + len(token)] for token, offset in zip(tokens, offsets, strict=True)] == tokens


def test_offsets_leave_out_the_space_that_a_tokenizer_puts_before_a_text() -> None:
    texts = {BOS: b"<s>", 1: b" caf", 2: b"\xc3", 3: b"\xa9", 4: b" au"}
    shown = CompletionLogprobs(0, texts.__getitem__, frozenset([BOS])).of_prompt(
        0, "café au", BOS, [described(token_id, -1.0) for token_id in (1, 2, 3, 4)]
    )
    assert shown["text_offset"] == [0, 0, 3, 3, 4]
