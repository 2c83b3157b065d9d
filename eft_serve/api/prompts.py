"""From messages or text to token ids, by each model's own tokenizer and chat template.

The models of a recipe may be prompted differently (a base model knows no chat template) but share one vocabulary. What
is equal for several models is rendered and encoded once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eft_serve.config import AppConfig
from eft_serve.errors import CheckpointError, InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INLINE_CHARACTERS = 2048  # a millisecond or two of work; more goes to a thread, or every stream would stall

Prompts = dict[str, list[int]]
Message = Mapping[str, str]


def plain_chat(messages: Sequence[Message]) -> str:
    """The prompt of a model without a chat template: one `Role: text` line per turn, then `Assistant:`."""
    return "".join(f"{m['role'].capitalize()}: {m['content']}\n" for m in messages) + "Assistant:"


@dataclass(frozen=True, slots=True, eq=False)
class ModelTokenizer:
    """One model's tokenizer; safe to use from several threads."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: str  # digest of token -> id
    fingerprint: str  # digest of all that turns text into ids
    num_ids: int  # ids are 0 <= id < num_ids

    @classmethod
    def load(cls, path: Path) -> ModelTokenizer:
        """Read a model directory; raises `CheckpointError` when it has no fast tokenizer."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: no tokenizer can be read: {error}") from error
        if not tokenizer.is_fast:
            raise CheckpointError(f"{path}: has no tokenizer.json; save it once with a fast tokenizer")
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # a prompt is refused when it is too long, never cut
        backend.no_padding()
        vocabulary = tokenizer.get_vocab()
        return cls(
            tokenizer,
            vocabulary=_digest(json.dumps(vocabulary, sort_keys=True)),
            fingerprint=_digest(backend.to_str()),
            num_ids=max(vocabulary.values()) + 1,
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""
        # The Rust tokenizer itself: its wrapper sets truncation on every call, which fails under concurrent use.
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    @property
    def template(self) -> str | None:
        """The chat template, for telling whether two models render alike."""
        template = self.tokenizer.chat_template
        return template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as text; raises `InvalidRequestError` with the template's own words when it refuses."""
        from jinja2 import TemplateError

        if self.template is None:
            return plain_chat(messages)
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise InvalidRequestError(f"messages: the chat template refuses them: {error}", param="messages") from error
        return str(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat; the template brings its special tokens, the plain format gets the tokenizer's."""
        return self.encode(self.render(messages), add_special_tokens=self.template is None)


class PromptRenderer:
    """The tokenizers of all models.

    Args:
        tokenizers: by model.
    """

    def __init__(self, tokenizers: Mapping[str, ModelTokenizer]) -> None:
        self._tokenizers = dict(tokenizers)

    @classmethod
    def load(cls, config: AppConfig) -> PromptRenderer:
        """Read the tokenizer of every model of the application; models of one directory share it."""
        paths = {model.checkpoint for model in config.models.values()}
        loaded = {path: ModelTokenizer.load(path) for path in paths}
        return cls({name: loaded[model.checkpoint] for name, model in config.models.items()})

    async def chat(self, models: Iterable[str], messages: Sequence[Message]) -> Prompts:
        """Each model's prompt for a chat, by its own template (`plain_chat` where it has none).

        Raises:
            InvalidRequestError: a template refuses the messages.
        """
        characters = sum(len(m["content"]) for m in messages)
        return await self._each(models, lambda t: t.encode_chat(messages), characters, key=lambda t: t.template)

    async def completion(self, models: Iterable[str], prompt: str | Sequence[int]) -> Prompts:
        """Each model's prompt for a text completion, with the special tokens that its tokenizer adds by default.

        Raises:
            InvalidRequestError: it is empty, or token ids are out of range or mean different things to the models.
        """
        models = list(models)
        if isinstance(prompt, str):
            return await self._each(models, lambda t: t.encode(prompt, add_special_tokens=True), len(prompt))
        self._check_ids(models, prompt)
        return {model: list(prompt) for model in models}

    def _check_ids(self, models: Sequence[str], ids: Sequence[int]) -> None:
        tokenizers = [self._tokenizers[m] for m in models]
        if len({t.vocabulary for t in tokenizers}) > 1:
            raise InvalidRequestError(
                f"prompt: token ids need one vocabulary, and the models {list(models)} have several; send text",
                param="prompt",
            )
        num_ids = tokenizers[0].num_ids
        wrong = next((i for i in ids if not 0 <= i < num_ids), None)
        if wrong is not None:
            raise InvalidRequestError(f"prompt: token id {wrong} is not in 0..{num_ids - 1}", param="prompt")

    async def _each(
        self,
        models: Iterable[str],
        encode: Callable[[ModelTokenizer], list[int]],
        characters: int,
        key: Callable[[ModelTokenizer], Any] = lambda _: None,
    ) -> Prompts:
        """`encode` once for all models that agree in tokenizer and `key`; in a thread when there is much to encode."""

        def work() -> Prompts:
            done: dict[tuple[str, Any], list[int]] = {}
            prompts: Prompts = {}
            for model in models:
                tokenizer = self._tokenizers[model]
                same = (tokenizer.fingerprint, key(tokenizer))
                prompts[model] = done[same] if same in done else done.setdefault(same, encode(tokenizer))
            return prompts

        return work() if characters <= INLINE_CHARACTERS else await asyncio.to_thread(work)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
