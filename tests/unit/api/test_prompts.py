"""Each model's own template and special tokens; token ids only where they mean one thing."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from api_fakes import CHAT_TEMPLATE, save_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from eft_serve.api.model_tokenizer import PIECE_CHARACTERS, Message, ModelTokenizer, plain_chat
from eft_serve.api.prompts import INLINE_CHARACTERS, PromptRenderer, Prompts
from eft_serve.api.reader import Given
from eft_serve.config import AppConfig
from eft_serve.config_recipes import AS_ITSELF, PromptConfig
from eft_serve.ensemble import Ensemble
from eft_serve.errors import CheckpointError, ConfigError, ContextLengthError, InvalidRequestError
from eft_serve.types import Combination, Term

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


Told = tuple[Term, PromptConfig]


def terms(*models: str) -> list[Told]:
    return [(Term(model, model, 1.0), AS_ITSELF) for model in models]


def told(model: str, **prompting: Any) -> Told:
    return Term(f"{model}@told", model, 1.0), PromptConfig(**prompting)


async def chat(renderer: PromptRenderer, readers: Sequence[Told], messages: Sequence[Message]) -> Prompts:
    prompting = {term.name: prompting for term, prompting in readers}
    return await renderer.chat([term for term, _ in readers], prompting, messages)


async def complete(renderer: PromptRenderer, readers: Sequence[Told], prompt: str | Sequence[int]) -> Prompts:
    prompting = {term.name: prompting for term, prompting in readers}
    return await renderer.completion([term for term, _ in readers], prompting, prompt)


async def given_tokens(
    renderer: PromptRenderer, readers: Sequence[Told], completion: str | Sequence[int], prompt: str = "x"
) -> Given:
    prompting = {term.name: prompting for term, prompting in readers}
    return await renderer.given(Combination(tuple(term for term, _ in readers)), prompting, completion, prompt)


def text_of(tokenizer: ModelTokenizer, ids: list[int]) -> str:
    return str(tokenizer.tokenizer.decode(ids))


def test_the_plain_format_is_one_line_a_turn() -> None:
    assert plain_chat(MESSAGES) == "System: Be brief.\nUser: Hi\nAssistant: Yes?\nUser: Bye\nAssistant:"


async def test_each_model_is_prompted_by_its_own_template(tokenizers: dict[str, ModelTokenizer]) -> None:
    prompts = await chat(PromptRenderer(tokenizers), terms("base", "chat", "other"), MESSAGES)
    assert list(prompts) == ["base", "chat", "other"]
    assert text_of(tokenizers["base"], prompts["base"]) == "<s>" + plain_chat(MESSAGES)
    rendered = "<|system|>Be brief.\n<|user|>Hi\n<|assistant|>Yes?\n<|user|>Bye\n<|assistant|>"
    assert text_of(tokenizers["chat"], prompts["chat"]) == rendered
    assert text_of(tokenizers["other"], prompts["other"]) == rendered.replace("|", "!")


async def test_an_adapter_is_prompted_like_the_model_that_it_adapts(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "small")
    models = {"small": {"path": str(path)}, "law": {"model": "small", "adapter": str(tmp_path / "law")}}
    config = AppConfig.parse({"models": models})
    ensembles = [Ensemble.find(config, name) for name in models]
    both = [(term, e.prompting[term.name]) for e in ensembles if e is not None for term in e.resolve().terms]
    prompts = await chat(PromptRenderer.load(config, lambda model: 512), both, MESSAGES)
    assert list(prompts) == ["small", "law"]
    assert prompts["law"] == prompts["small"]


async def test_a_refusing_template_names_the_messages(tokenizers: dict[str, ModelTokenizer]) -> None:
    with pytest.raises(InvalidRequestError, match="system comes first") as caught:
        await chat(PromptRenderer(tokenizers), terms("chat"), MESSAGES[1:] + MESSAGES[:1])
    assert caught.value.param == "messages"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.text())
async def test_a_prompt_decodes_to_itself_after_the_special_token(
    tokenizers: dict[str, ModelTokenizer], text: str
) -> None:
    if "<s>" in text:
        return
    prompts = await complete(PromptRenderer(tokenizers), terms("base"), text)
    assert text_of(tokenizers["base"], prompts["base"]) == "<s>" + text


async def test_long_prompts_leave_the_event_loop_free_and_encode_alike(
    tokenizers: dict[str, ModelTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whose thread works: how often the loop gets to run meanwhile is the machine's affair."""
    renderer = PromptRenderer(tokenizers)
    text = "x" * (50 * INLINE_CHARACTERS)
    encode, working_threads = ModelTokenizer.encode, set[int]()

    def noted(tokenizer: ModelTokenizer, text: str, add_special_tokens: bool, param: str, max_tokens: int) -> list[int]:
        working_threads.add(threading.get_ident())
        return encode(tokenizer, text, add_special_tokens, param, max_tokens)

    monkeypatch.setattr(ModelTokenizer, "encode", noted)
    several = await asyncio.gather(*(complete(renderer, terms("base", "chat"), text) for _ in range(4)))
    assert working_threads
    assert threading.get_ident() not in working_threads
    assert {len(ids) for prompts in several for ids in prompts.values()} == {len(text) + 1}


async def test_each_term_has_its_own_instructions(tokenizers: dict[str, ModelTokenizer]) -> None:
    instructed = told("chat", system_prompt="No jokes.", response_prefix=" Well")
    for messages, system in ((MESSAGES, "No jokes.\n\nBe brief."), (MESSAGES[1:], "No jokes.")):
        prompts = await chat(PromptRenderer(tokenizers), [*terms("chat"), instructed], messages)
        without, with_them = (text_of(tokenizers["chat"], ids) for ids in prompts.values())
        rest = "<|user|>Hi\n<|assistant|>Yes?\n<|user|>Bye\n<|assistant|>"
        assert without == ("<|system|>Be brief.\n" if messages is MESSAGES else "") + rest
        assert with_them == f"<|system|>{system}\n{rest} Well"


async def test_the_plain_format_is_instructed_alike(tokenizers: dict[str, ModelTokenizer]) -> None:
    instructed = told("base", system_prompt="No jokes.", response_prefix=" Well")
    prompts = await chat(PromptRenderer(tokenizers), [instructed], MESSAGES[1:2])
    assert text_of(tokenizers["base"], prompts["base@told"]) == "<s>System: No jokes.\nUser: Hi\nAssistant: Well"


async def test_an_empty_system_prompt_is_a_system_message_all_the_same(tokenizers: dict[str, ModelTokenizer]) -> None:
    """Templates that have a system prompt of their own give way to it."""
    prompts = await chat(PromptRenderer(tokenizers), [told("chat", system_prompt="")], MESSAGES[1:2])
    assert text_of(tokenizers["chat"], prompts["chat@told"]) == "<|system|>\n<|user|>Hi\n<|assistant|>"


async def test_the_system_prompt_of_a_text_is_the_line_before(tokenizers: dict[str, ModelTokenizer]) -> None:
    instructed = told("base", system_prompt="No jokes.", response_prefix=" we")
    prompts = await complete(PromptRenderer(tokenizers), [*terms("base"), instructed], "Once")
    assert text_of(tokenizers["base"], prompts["base"]) == "<s>Once"
    assert text_of(tokenizers["base"], prompts["base@told"]) == "<s>No jokes.\nOnce we"


@pytest.mark.parametrize("prompting", [{"system_prompt": "No jokes."}, {"response_prefix": " we"}])
async def test_token_ids_take_no_system_prompt(
    tokenizers: dict[str, ModelTokenizer], prompting: dict[str, str]
) -> None:
    with pytest.raises(InvalidRequestError, match="base@told") as caught:
        await complete(PromptRenderer(tokenizers), [*terms("base"), told("base", **prompting)], [1, 2])
    assert caught.value.param == "prompt"


async def test_a_template_in_a_file_replaces_the_models_own(
    tokenizers: dict[str, ModelTokenizer], tmp_path: Path
) -> None:
    path = tmp_path / "template.jinja"
    template = "{% for m in messages %}{{ m.role[0] }}={{ m.content }};{% endfor %}"
    renderer = PromptRenderer(tokenizers, {path: template})
    prompts = await chat(renderer, [told("chat", chat_template=path), *terms("chat")], MESSAGES[1:3])
    assert text_of(tokenizers["chat"], prompts["chat@told"]) == "u=Hi;a=Yes?;"
    assert text_of(tokenizers["chat"], prompts["chat"]) == "<|user|>Hi\n<|assistant|>Yes?\n<|assistant|>"
    on_base = await chat(renderer, [told("base", chat_template=path)], MESSAGES[1:3])
    assert text_of(tokenizers["base"], on_base["base@told"]) == "u=Hi;a=Yes?;", "the template brings its special tokens"


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content + 1 }}", "{{ 1 // 0 }}", "{{ ().__class__.__base__.__subclasses__() }}", "{{ nobody.x }}"],
)
async def test_a_template_that_breaks_over_a_chat_names_the_messages(
    tokenizers: dict[str, ModelTokenizer], tmp_path: Path, template: str
) -> None:
    path = tmp_path / "template.jinja"
    with pytest.raises(InvalidRequestError, match="messages: the chat template") as caught:
        await chat(PromptRenderer(tokenizers, {path: template}), [told("chat", chat_template=path)], MESSAGES)
    assert caught.value.param == "messages"


def test_the_templates_of_recipes_are_read_with_the_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    save_tokenizer(tmp_path / "m")
    recipe = {"base": "m", "reference": "m", "tuned": {"model": "m", "chat_template": str(path)}}
    config = AppConfig.parse({"models": {"m": {"path": str(tmp_path / "m")}}, "recipes": {"r": recipe}})
    with pytest.raises(ConfigError, match=r"template\.jinja cannot be read"):
        PromptRenderer.load(config, lambda model: 512)
    path.write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match=r"template\.jinja is no chat template"):
        PromptRenderer.load(config, lambda model: 512)


async def test_token_ids_need_one_vocabulary_and_its_range(tokenizers: dict[str, ModelTokenizer]) -> None:
    renderer = PromptRenderer(tokenizers)
    assert await complete(renderer, terms("base", "other"), [0, 256]) == {"base": [0, 256], "other": [0, 256]}
    assert await complete(renderer, terms("wider"), [257]) == {"wider": [257]}
    with pytest.raises(InvalidRequestError, match="one vocabulary"):
        await complete(renderer, terms("base", "wider"), [1])
    for wrong in (-1, 257, 2**40):
        with pytest.raises(InvalidRequestError, match=str(wrong)):
            await complete(renderer, terms("base", "other"), [1, wrong])


async def test_a_tokenizer_that_would_cut_does_not(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "cutting")
    import tokenizers as rust

    backend = rust.Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    backend.save(str(path / "tokenizer.json"))
    assert len(ModelTokenizer.load(path).encode("x" * 10, True, "prompt", 512)) == 11


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        ModelTokenizer.load(tmp_path)


async def test_a_token_that_only_the_tokenizer_has_is_refused_by_name(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "padded")
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "[PAD]"}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 257}))
    padded = ModelTokenizer.load(path)
    assert padded.num_ids == 257
    renderer = PromptRenderer({"padded": padded})
    for call, param in (
        (chat(renderer, terms("padded"), [{"role": "user", "content": "a[PAD]b"}]), "messages"),
        (complete(renderer, terms("padded"), "a[PAD]b"), "prompt"),
        (given_tokens(renderer, terms("padded"), "a[PAD]b"), "completion"),
    ):
        with pytest.raises(InvalidRequestError, match=rf"{param}: '\[PAD\]' is token 257") as refusal:
            await call
        assert refusal.value.param == param
    with pytest.raises(InvalidRequestError, match=r"257 is not in 0\.\.256"):
        await complete(renderer, terms("padded"), [1, 257])
    assert await complete(renderer, terms("padded"), "ab")


async def test_tokenizers_that_differ_beyond_the_models_tokens_are_one_vocabulary(tmp_path: Path) -> None:
    paths = {"plain": save_tokenizer(tmp_path / "plain"), "padded": save_tokenizer(tmp_path / "padded")}
    file = paths["padded"] / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "[PAD]"}))
    for path in paths.values():
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 257}))
    renderer = PromptRenderer({name: ModelTokenizer.load(path) for name, path in paths.items()})
    assert await complete(renderer, terms("plain", "padded"), [1, 2]) == {"plain": [1, 2], "padded": [1, 2]}


@pytest.mark.parametrize("characters", [5_000, 40_000, 4_000_000])
async def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    tokenizers: dict[str, ModelTokenizer], monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    encoded = 0
    encode = ModelTokenizer._encode

    def noted(tokenizer: ModelTokenizer, text: str, add_special_tokens: bool) -> list[int]:
        nonlocal encoded
        encoded += len(text)
        return encode(tokenizer, text, add_special_tokens)

    monkeypatch.setattr(ModelTokenizer, "_encode", noted)
    renderer = PromptRenderer(tokenizers, max_model_len=lambda model: 20_000)
    text = "x" * characters
    for call, param in (
        (complete(renderer, terms("base"), text), "prompt"),
        (chat(renderer, terms("chat"), [{"role": "user", "content": text}]), "messages"),
        (given_tokens(renderer, terms("base"), text), "completion"),
    ):
        encoded = 0
        if characters < 20_000:
            await call
            continue
        with pytest.raises(ContextLengthError, match=rf"{param}: .* more than 20000 tokens") as refusal:
            await call
        assert refusal.value.param == param
        assert encoded <= 3 * PIECE_CHARACTERS


async def test_too_many_token_ids_are_refused_by_their_number(tokenizers: dict[str, ModelTokenizer]) -> None:
    renderer = PromptRenderer(tokenizers, max_model_len=lambda model: 5)
    with pytest.raises(ContextLengthError, match="prompt: has 6 tokens, and the context of 'base' is 5"):
        await complete(renderer, terms("base"), [-1] * 6)
    with pytest.raises(ContextLengthError, match="completion: has 6 tokens"):
        await given_tokens(renderer, terms("base"), [-1] * 6)
    assert await complete(renderer, terms("base"), [1] * 5)


async def test_a_long_text_leaves_the_interpreter_to_others(tokenizers: dict[str, ModelTokenizer]) -> None:
    renderer = PromptRenderer(tokenizers)
    started = last = time.perf_counter()
    encoding = asyncio.ensure_future(complete(renderer, terms("base"), "The capital of Peru is Lima. " * 40_000))
    longest = 0.0
    while not encoding.done():
        await asyncio.sleep(0.001)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    assert longest < (last - started) / 2, "the event loop stood still while a text was encoded"


def test_a_models_own_chat_template_that_cannot_be_parsed_is_an_error_at_the_start(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "broken", template="{% for m in messages %}{{ m['content'] }}")
    with pytest.raises(CheckpointError, match="the tokenizer's chat_template is no chat template"):
        ModelTokenizer.load(path)


def test_special_tokens_are_known_by_their_text(tokenizers: dict[str, ModelTokenizer]) -> None:
    assert tokenizers["base"].special == {"<s>": 0}


async def test_an_adapters_own_chat_template_renders_its_prompt(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "small")
    for name, template in (("asks", "{% for m in messages %}Q: {{ m['content'] }}{% endfor %}"), ("plain", None)):
        (tmp_path / name).mkdir()
        if template:
            (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    adapters = {name: {"model": "small", "adapter": str(tmp_path / name)} for name in ("asks", "plain")}
    config = AppConfig.parse({"models": {"small": {"path": str(tmp_path / "small")}, **adapters}})
    renderer = PromptRenderer.load(config, lambda model: 512)
    adapted = [Term(name, "small", 1.0, adapter=name) for name in adapters]
    prompts = await renderer.chat(adapted, dict.fromkeys(adapters, AS_ITSELF), [{"role": "user", "content": "Hi"}])
    tokenizer = ModelTokenizer.load(tmp_path / "small")
    assert text_of(tokenizer, prompts["asks"]) == "Q: Hi"
    assert text_of(tokenizer, prompts["plain"]) == "<|user|>Hi\n<|assistant|>"
    (tmp_path / "asks" / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is no chat template"):
        PromptRenderer.load(config, lambda model: 512)


def save_words(path: Path) -> Path:
    """A tokenizer of whole words that puts a space before a text, as sentencepiece does."""
    import tokenizers as rust

    pieces = ["<s>", "\u2581", "\u2581Lima", "Li", "ma", "\u2581is", "\u2581Lim", "a", "\n", "\u2581\n"]
    backend = rust.Tokenizer(rust.models.Unigram([(piece, -len(pieces) / len(piece)) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = rust.pre_tokenizers.Metaspace()
    backend.decoder = rust.decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("prompt", "completion", "pieces", "split"),
    [
        ("is", " Lima", ["\u2581Lima"], None),
        ("is Li", "ma", ["ma"], " Lima"),
        ("is Lima", "a", ["a"], None),
        ("is ", "Lima", ["Li", "ma"], " Lima"),
    ],
)
async def test_a_completion_is_tokenised_as_it_follows_its_prompt(
    tmp_path: Path, prompt: str, completion: str, pieces: list[str], split: str | None
) -> None:
    words = ModelTokenizer.load(save_words(tmp_path / "words"))
    found = await given_tokens(PromptRenderer({"words": words}), terms("words"), completion, prompt)
    assert [words.tokenizer.convert_ids_to_tokens(token_id) for token_id in found.token_ids] == pieces
    assert found.split_token == split
