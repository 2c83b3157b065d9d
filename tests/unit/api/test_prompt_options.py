"""How requests want their prompts made: continued messages, arguments of templates, truncation, special tokens."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from api_fakes import CHAT_TEMPLATE, Stack, make_config, save_tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from eft_serve.api.model_tokenizer import PIECE_CHARACTERS, ModelTokenizer
from eft_serve.api.prompt_options import RESERVED_KWARGS, PromptOptions, Truncation
from eft_serve.api.prompts import PromptRenderer
from eft_serve.config import AppConfig
from eft_serve.config_recipes import AS_ITSELF
from eft_serve.errors import InvalidRequestError
from eft_serve.types import Term

USER = {"role": "user", "content": "hi"}
THINKING = CHAT_TEMPLATE + "{% if thinking is defined %}<think {{ thinking }}>{% endif %}"


def said(text: str) -> list[dict[str, str]]:
    return [USER, {"role": "assistant", "content": text}]


@pytest.fixture
def stack(tmp_path: Path, request: pytest.FixtureRequest) -> Stack:
    return Stack(make_config(tmp_path, template=getattr(request, "param", CHAT_TEMPLATE)))


async def post(stack: Stack, path: str = "chat/completions", model: str = "small", **body: Any) -> Any:
    async with stack.client() as client:
        return await client.post(f"/v1/{path}", json={"model": model} | body)


async def prompt_of(stack: Stack, term: str = "small", **body: Any) -> str:
    """The text of a term's prompt."""
    response = await post(stack, **body)
    assert response.status_code == 200, response.text
    tokenizer = stack.app.state.context.renderer.tokenizer(term).tokenizer
    return str(tokenizer.decode(stack.service.requests[-1].prompts[term]))


async def refusal_of(stack: Stack, **body: Any) -> dict[str, Any]:
    response = await post(stack, **body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["message"].startswith(error["param"])
    return error


TRIMMING = CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
ENDING = CHAT_TEMPLATE.replace("}}\\n", "}}<|end of turn|>\\n\\n")


@pytest.mark.parametrize(
    "stack", [CHAT_TEMPLATE, TRIMMING, ENDING], indirect=True, ids=["plain", "trims", "ends turns"]
)
@pytest.mark.parametrize(
    "text", ["It is", "OK!\n", "OK! ", "a", "hi", "<|assistant|>", "<|end of turn|>", "x\n<|user|>y"]
)
async def test_a_continued_message_ends_where_its_text_ends(stack: Stack, text: str) -> None:
    prompt = await prompt_of(stack, messages=said(text), continue_final_message=True)
    assert prompt.endswith(f"<|assistant|>{text}")
    assert prompt.startswith("<|user|>hi")
    assert (
        await prompt_of(stack, messages=said(text), continue_final_message=True, add_generation_prompt=False) == prompt
    )


@pytest.mark.parametrize("stack", [TRIMMING], indirect=True)
async def test_space_that_a_template_trims_from_the_beginning_stays_trimmed(stack: Stack) -> None:
    assert await prompt_of(stack, messages=said(" It is "), continue_final_message=True) == (
        "<|user|>hi\n<|assistant|>It is "
    )


@pytest.mark.parametrize(
    "stack",
    [
        CHAT_TEMPLATE.replace("m['content']", "m['content'] | upper"),
        CHAT_TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]"),
        "{{ messages[-1]['content'] }}" + CHAT_TEMPLATE,
        "{% for m in messages[:-1] %}{{ m['content'] }}{% endfor %}",
    ],
    indirect=True,
    ids=["another text", "a part of it", "twice", "not at all"],
)
async def test_a_message_that_the_template_changes_is_not_continued(stack: Stack) -> None:
    error = await refusal_of(stack, messages=said("<think>a</think>b"), continue_final_message=True)
    assert error["param"] == "messages"
    assert "cannot be continued" in error["message"]


@pytest.mark.parametrize("messages", [[USER], said("")])
async def test_only_an_assistants_text_is_continued(stack: Stack, messages: list[dict[str, str]]) -> None:
    assert (await refusal_of(stack, messages=messages, continue_final_message=True))["param"] == "messages"


async def test_a_continued_message_and_a_generation_prompt_contradict_one_another(stack: Stack) -> None:
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert (await refusal_of(stack, messages=said("a"), **both))["param"] == "add_generation_prompt"


async def test_the_plain_format_is_continued_and_closed_alike(stack: Stack) -> None:
    plain = {"model": "large", "term": "large"}
    assert await prompt_of(stack, **plain, messages=said("It is"), continue_final_message=True) == (
        "<s>User: hi\nAssistant: It is"
    )
    assert await prompt_of(stack, **plain, messages=said(" It."), add_generation_prompt=False) == (
        "<s>User: hi\nAssistant: It.\n"
    )


async def test_a_role_with_messages_of_its_own_continues_its_own(stack: Stack) -> None:
    own = {"prompts": {"reference": said("Bad ")}}
    body = {"model": "up", "messages": said("Good "), "continue_final_message": True, "eft": own}
    assert await prompt_of(stack, "small-chat", **body) == "<|user|>hi\n<|assistant|>Good "
    assert await prompt_of(stack, "small", **body) == "<|user|>hi\n<|assistant|>Bad "
    assert await prompt_of(stack, "large", **body) == "<s>User: hi\nAssistant: Good "
    error = await refusal_of(stack, **body | {"eft": {"prompts": {"reference": [USER]}}})
    assert error["param"] == "eft.prompts.reference"


async def test_a_recipe_that_begins_the_answer_itself_continues_no_message(tmp_path: Path) -> None:
    config = make_config(tmp_path).model_dump()
    recipe = {"base": "small", "reference": "small", "tuned": {"model": "small", "response_prefix": " It"}}
    stack = Stack(AppConfig.parse(config | {"recipes": {"prefixed": recipe}}))
    error = await refusal_of(stack, model="prefixed", messages=said("a"), continue_final_message=True)
    assert error["param"] == "continue_final_message"


async def test_without_a_generation_prompt_a_chat_ends_with_its_last_message(stack: Stack) -> None:
    assert await prompt_of(stack, messages=[USER], add_generation_prompt=False) == "<|user|>hi\n"


@pytest.mark.parametrize("stack", [THINKING], indirect=True)
async def test_template_arguments_reach_every_roles_template(stack: Stack) -> None:
    kwargs = {"thinking": {"budget": 3}}
    body = {"model": "up", "messages": [USER], "chat_template_kwargs": kwargs}
    for term in ("small", "small-chat"):
        assert (await prompt_of(stack, term, **body)).endswith("<|assistant|><think {'budget': 3}>")
    assert "think" not in await prompt_of(stack, "large", **body), "it has no template"
    assert "think" not in await prompt_of(stack, messages=[USER])


@pytest.mark.parametrize("stack", [THINKING + "{{ bos_token }}"], indirect=True)
@pytest.mark.parametrize(
    ("kwargs", "param", "said"),
    [
        ({"enable_thinking": False}, ".enable_thinking", "no chat template of this model reads it"),
        ({"messages": []}, ".messages", "leave it out"),
        ({"add_generation_prompt": True}, ".add_generation_prompt", "leave it out"),
        ({"continue_final_message": True}, ".continue_final_message", "leave it out"),
        ({"tools": []}, ".tools", "leave it out"),
        ({"tokenize": True}, ".tokenize", "leave it out"),
        ({"self": 1}, ".self", "leave it out"),
        ({"bos_token": "x"}, ".bos_token", "the tokenizer's own"),
        ({"thinking": "x" * 20_000}, "", "characters of JSON are more than 16384"),
        ({f"k{i}": 1 for i in range(33)}, "", "at most 32"),
        ([], "", "dictionary"),
    ],
)
async def test_a_wrong_template_argument_is_named(stack: Stack, kwargs: Any, param: str, said: str) -> None:
    error = await refusal_of(stack, messages=[USER], chat_template_kwargs=kwargs)
    assert error["param"] == f"chat_template_kwargs{param}"
    assert said in error["message"]


def test_all_that_rendering_takes_itself_is_reserved() -> None:
    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        assert set(inspect.signature(function).parameters) - {"kwargs"} <= RESERVED_KWARGS


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ({"prompt": "abcdef", "truncate_prompt_tokens": 3}, "def"),
        ({"prompt": "abcdef", "truncate_prompt_tokens": 1}, "f"),
        ({"prompt": "abcdef", "truncate_prompt_tokens": 7}, "<s>abcdef"),
        ({"prompt": [3] * 600 + [1, 2], "truncate_prompt_tokens": 2}, '!"'),
        ({"prompt": "x" * 600 + "end", "truncate_prompt_tokens": -1, "max_tokens": 508}, "xend"),
        ({"prompt": "x" * 600 + "end", "truncate_prompt_tokens": -1}, "x" * 493 + "end"),
        ({"prompt": "x" * 100_000 + "end", "truncate_prompt_tokens": 4}, "xend"),
    ],
)
async def test_truncation_keeps_the_last_tokens(stack: Stack, body: dict[str, Any], kept: str) -> None:
    assert await prompt_of(stack, path="completions", **body) == kept


async def test_truncation_cuts_each_roles_prompt(stack: Stack) -> None:
    body = {"messages": [USER], "model": "up", "truncate_prompt_tokens": 5, "eft": {"prompts": {"tuned": [1] * 9}}}
    await prompt_of(stack, "large", **body)
    [request] = stack.service.requests
    assert [len(prompt) for prompt in request.prompts.values()] == [5, 5, 5]
    assert request.prompts["small-chat"] == [1] * 5


@pytest.mark.parametrize(
    "body",
    [
        {"truncate_prompt_tokens": 0},
        {"truncate_prompt_tokens": -2},
        {"truncate_prompt_tokens": 1.5},
        {"truncate_prompt_tokens": 512},
        {"truncate_prompt_tokens": 2**31},
        {"truncate_prompt_tokens": 413, "max_tokens": 100},
    ],
)
async def test_truncation_out_of_range_is_refused(stack: Stack, body: dict[str, Any]) -> None:
    error = await refusal_of(stack, path="completions", prompt="a", **body)
    assert error["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        (Truncation(num_tokens=-1), 99),
        (Truncation(num_tokens=-1, max_tokens=40), 60),
        (Truncation(num_tokens=-1, default_max_tokens=16), 84),
        (Truncation(num_tokens=-1, max_tokens=40, default_max_tokens=16), 60),
        (Truncation(num_tokens=-1, default_max_tokens=2048), 99),
        (Truncation(num_tokens=60, max_tokens=40), 60),
    ],
)
def test_what_is_kept_leaves_room_for_the_answer(truncation: Truncation, kept: int) -> None:
    assert truncation.keep(100) == kept
    with pytest.raises(InvalidRequestError, match="leaves beside an answer of 1;"):
        Truncation(num_tokens=100).keep(100)


async def test_of_a_text_that_is_cut_only_its_end_is_encoded(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = 0, ModelTokenizer._encode

    def noted(tokenizer: ModelTokenizer, text: str, add_special_tokens: bool) -> list[int]:
        nonlocal encoded
        encoded += len(text)
        return encode(tokenizer, text, add_special_tokens)

    monkeypatch.setattr(ModelTokenizer, "_encode", noted)
    body: dict[str, Any] = {"prompt": "x" * 4_000_000 + "end", "truncate_prompt_tokens": 400, "max_tokens": 9}
    assert await prompt_of(stack, path="completions", **body) == "x" * 397 + "end"
    assert encoded <= 5 * PIECE_CHARACTERS


async def test_special_tokens_are_added_as_the_request_says(stack: Stack) -> None:
    text = {"path": "completions", "prompt": "hi"}
    assert [await prompt_of(stack, **text, add_special_tokens=add) for add in (None, True, False)] == [
        "<s>hi",
        "<s>hi",
        "hi",
    ]
    rendered = "<|user|>hi\n<|assistant|>"
    assert [await prompt_of(stack, messages=[USER], add_special_tokens=add) for add in (None, True, False)] == [
        rendered,
        f"<s>{rendered}",
        rendered,
    ]
    plain = "<s>User: hi\nAssistant:"
    for add in (None, True, False):
        assert await prompt_of(stack, "large", model="large", messages=[USER], add_special_tokens=add) == plain


@pytest.mark.parametrize("field", [{"chat_template": "x"}, {"documents": [{"text": "x"}]}, {"reasoning_effort": "low"}])
async def test_what_would_change_the_prompt_and_is_not_served_is_refused(stack: Stack, field: dict[str, Any]) -> None:
    assert (await refusal_of(stack, messages=[USER], **field))["param"] == next(iter(field))
    assert await prompt_of(stack, messages=[USER], reasoning_effort="none")


async def test_models_of_other_contexts_keep_what_their_own_has_room_for(tmp_path: Path) -> None:
    tokenizers = {name: ModelTokenizer.load(save_tokenizer(tmp_path / name)) for name in ("long", "short")}
    renderer = PromptRenderer(tokenizers, max_model_len={"long": 9, "short": 5}.__getitem__)
    terms = [Term(name, name, 1.0) for name in tokenizers]
    options = PromptOptions(truncation=Truncation(num_tokens=-1))
    for prompt in ("abcdefghijkl", list(range(65, 77))):
        prompts = await renderer.completion(terms, dict.fromkeys(tokenizers, AS_ITSELF), prompt, options=options)
        assert {name: len(ids) for name, ids in prompts.items()} == {"long": 8, "short": 4}
