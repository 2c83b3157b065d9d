"""Each model's own template and special tokens; token ids only where they mean one thing."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

import pytest
from api_fakes import CHAT_TEMPLATE, save_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eft_serve.api.prompts import INLINE_CHARACTERS, ModelTokenizer, PromptRenderer, plain_chat
from eft_serve.errors import CheckpointError, InvalidRequestError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelTokenizer]:
    directory = tmp_path_factory.mktemp("tokenizers")
    return {
        "base": ModelTokenizer.load(save_tokenizer(directory / "base", template=None)),
        "chat": ModelTokenizer.load(save_tokenizer(directory / "chat")),
        "other": ModelTokenizer.load(save_tokenizer(directory / "other", template=CHAT_TEMPLATE.replace("|", "!"))),
        "wider": ModelTokenizer.load(save_tokenizer(directory / "wider", extra_tokens=["<extra>"])),
    }


def text_of(tokenizer: ModelTokenizer, ids: list[int]) -> str:
    return str(tokenizer.tokenizer.decode(ids))


def test_the_plain_format_is_one_line_a_turn() -> None:
    assert plain_chat(MESSAGES) == "System: Be brief.\nUser: Hi\nAssistant: Yes?\nUser: Bye\nAssistant:"


async def test_each_model_is_prompted_by_its_own_template(tokenizers: dict[str, ModelTokenizer]) -> None:
    prompts = await PromptRenderer(tokenizers).chat(["base", "chat", "other"], MESSAGES)
    assert list(prompts) == ["base", "chat", "other"]
    assert text_of(tokenizers["base"], prompts["base"]) == "<s>" + plain_chat(MESSAGES)
    rendered = "<|system|>Be brief.\n<|user|>Hi\n<|assistant|>Yes?\n<|user|>Bye\n<|assistant|>"
    assert text_of(tokenizers["chat"], prompts["chat"]) == rendered
    assert text_of(tokenizers["other"], prompts["other"]) == rendered.replace("|", "!")


async def test_a_refusing_template_names_the_messages(tokenizers: dict[str, ModelTokenizer]) -> None:
    with pytest.raises(InvalidRequestError, match="system comes first") as caught:
        await PromptRenderer(tokenizers).chat(["chat"], MESSAGES[1:] + MESSAGES[:1])
    assert caught.value.param == "messages"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.text())
async def test_a_prompt_decodes_to_itself_after_the_special_token(
    tokenizers: dict[str, ModelTokenizer], text: str
) -> None:
    if "<s>" in text:
        return
    prompts = await PromptRenderer(tokenizers).completion(["base"], text)
    assert text_of(tokenizers["base"], prompts["base"]) == "<s>" + text


async def test_long_prompts_leave_the_event_loop_free_and_encode_alike(
    tokenizers: dict[str, ModelTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whose thread works: how often the loop gets to run meanwhile is the machine's affair."""
    renderer = PromptRenderer(tokenizers)
    text = "x" * (50 * INLINE_CHARACTERS)
    encode, working_threads = ModelTokenizer.encode, set[int]()

    def noted(tokenizer: ModelTokenizer, text: str, add_special_tokens: bool) -> list[int]:
        working_threads.add(threading.get_ident())
        return encode(tokenizer, text, add_special_tokens)

    monkeypatch.setattr(ModelTokenizer, "encode", noted)
    several = await asyncio.gather(*(renderer.completion(["base", "chat"], text) for _ in range(4)))
    assert working_threads
    assert threading.get_ident() not in working_threads
    assert {len(ids) for prompts in several for ids in prompts.values()} == {len(text) + 1}


async def test_token_ids_need_one_vocabulary_and_its_range(tokenizers: dict[str, ModelTokenizer]) -> None:
    renderer = PromptRenderer(tokenizers)
    assert await renderer.completion(["base", "other"], [0, 256]) == {"base": [0, 256], "other": [0, 256]}
    assert await renderer.completion(["wider"], [257]) == {"wider": [257]}
    with pytest.raises(InvalidRequestError, match="one vocabulary"):
        await renderer.completion(["base", "wider"], [1])
    for wrong in (-1, 257, 2**40):
        with pytest.raises(InvalidRequestError, match=str(wrong)):
            await renderer.completion(["base", "other"], [1, wrong])


async def test_a_tokenizer_that_would_cut_does_not(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "cutting")
    import tokenizers as rust

    backend = rust.Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    backend.save(str(path / "tokenizer.json"))
    assert len(ModelTokenizer.load(path).encode("x" * 10, add_special_tokens=True)) == 11


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        ModelTokenizer.load(tmp_path)
