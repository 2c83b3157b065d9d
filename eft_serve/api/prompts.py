"""From messages or text to token ids, by each term's own tokenizer, chat template and instructions.

The terms of a combination may be prompted differently (a base model knows no chat template, a recipe may instruct one
and not another) but share one vocabulary. What several terms have in common is rendered and encoded once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eft_serve.checkpoints.chat_template import read_template
from eft_serve.checkpoints.json_file import BrokenFileError
from eft_serve.checkpoints.tokenizer import load_tokenizer
from eft_serve.checkpoints.vocabulary import head_rows, known_tokens
from eft_serve.config import AppConfig
from eft_serve.config_recipes import PromptConfig
from eft_serve.errors import CheckpointError, ConfigError, InvalidRequestError
from eft_serve.types import Term

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INLINE_CHARACTERS = 2048  # one or two milliseconds of work; more runs in a thread, or it would stall every stream

Prompts = dict[str, list[int]]  # by term
Prompting = Mapping[str, PromptConfig]  # by term
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
    num_ids: int  # of the tokens that the model has: 0 <= id < num_ids
    has_unknown: bool = False  # the tokenizer has tokens beyond these

    @classmethod
    def load(cls, path: Path) -> ModelTokenizer:
        """Read a model directory; raises `CheckpointError` when it has no fast tokenizer."""
        tokenizer = load_tokenizer(path)
        if not tokenizer.is_fast:
            raise CheckpointError(f"{path}: has no tokenizer.json; save it once with a fast tokenizer")
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # a prompt is refused when it is too long, never cut
        backend.no_padding()
        vocabulary = tokenizer.get_vocab()
        try:
            known = known_tokens(vocabulary, head_rows(path))
        except BrokenFileError as error:
            raise CheckpointError(str(error), param="models") from error
        return cls(
            tokenizer,
            vocabulary=_digest(json.dumps(known, sort_keys=True)),
            fingerprint=_digest(backend.to_str()),
            num_ids=max(known.values()) + 1,
            has_unknown=len(known) < len(vocabulary),
        )

    def encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of `text`, which is the parameter `param`; raises `InvalidRequestError`, see `check_known`."""
        # The Rust tokenizer itself: its wrapper sets truncation on every call, which fails under concurrent use.
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if self.has_unknown:
            self.check_known(ids, param)
        return ids

    def check_known(self, ids: Sequence[int], param: str) -> None:
        """Raises `InvalidRequestError` that names the first token that the tokenizer has and the model has not."""
        unknown = next((i for i in ids if i >= self.num_ids), None)
        if unknown is not None:
            token = self.tokenizer.backend_tokenizer.id_to_token(unknown)
            message = f"{param}: {token!r} is token {unknown}, and the model has tokens up to {self.num_ids - 1} only"
            raise InvalidRequestError(f"{message}; leave it out", param=param)

    def check_range(self, ids: Sequence[int], param: str) -> None:
        """Raises `InvalidRequestError` that names the first id that is not one of its tokens."""
        wrong = next((i for i in ids if not 0 <= i < self.num_ids), None)
        if wrong is not None:
            raise InvalidRequestError(f"{param}: token id {wrong} is not in 0..{self.num_ids - 1}", param=param)

    @property
    def template(self) -> str | None:
        """The model's own chat template, to see whether two models render alike."""
        template = self.tokenizer.chat_template
        return template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)

    def render(self, messages: Sequence[Message], template: str | None = None) -> str:
        """The chat as text, by this template or, without one, by the model's own.

        Raises:
            InvalidRequestError: the template refuses the messages (with its own message) or fails.
        """
        if template is None and self.template is None:
            return plain_chat(messages)
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise any exception
            message = f"messages: the chat template refuses them: {error}"
            raise InvalidRequestError(message, param="messages") from error
        return str(text)


@dataclass(frozen=True, slots=True)
class Reader:
    """How one term of a combination is prompted."""

    tokenizer: ModelTokenizer
    prompting: PromptConfig
    template: str | None  # of a file; None: the model's own

    @property
    def key(self) -> Hashable:
        """Readers of equal key make equal prompts."""
        template = self.tokenizer.template if self.template is None else self.template
        return self.tokenizer.fingerprint, template, self.prompting.system_prompt, self.prompting.response_prefix

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat; a template brings its special tokens, the plain format gets the tokenizer's."""
        text = self.tokenizer.render(_instructed(messages, self.prompting.system_prompt), self.template)
        is_plain = self.template is None and self.tokenizer.template is None
        text += self.prompting.response_prefix or ""
        return self.tokenizer.encode(text, add_special_tokens=is_plain, param="messages")

    def encode_text(self, prompt: str) -> list[int]:
        """Token ids of a text: the system prompt on a line before it, the answer's beginning right after it."""
        before = f"{self.prompting.system_prompt}\n" if self.prompting.system_prompt else ""
        text = before + prompt + (self.prompting.response_prefix or "")
        return self.tokenizer.encode(text, add_special_tokens=True, param="prompt")


def _instructed(messages: Sequence[Message], system_prompt: str | None) -> Sequence[Message]:
    """The chat with this system prompt; a leading system message is appended to it."""
    if system_prompt is None:
        return messages
    own = [m["content"] for m in messages[:1] if m["role"] == "system"]
    content = "\n\n".join(part for part in (system_prompt, *own) if part)
    return [{"role": "system", "content": content}, *messages[len(own) :]]


class PromptRenderer:
    """The tokenizers of all models, and the chat templates of all recipes.

    Args:
        tokenizers: by model.
        templates: text by file.
    """

    def __init__(self, tokenizers: Mapping[str, ModelTokenizer], templates: Mapping[Path, str] | None = None) -> None:
        self._tokenizers = dict(tokenizers)
        self._templates = dict(templates or {})

    @classmethod
    def load(cls, config: AppConfig) -> PromptRenderer:
        """Read the tokenizer of every model of the application; models of one directory share it.

        Raises:
            CheckpointError: a tokenizer cannot be read.
            ConfigError: a recipe's chat template cannot be read.
        """
        paths = {name: config.checkpoint_of(name) for name in config.models}
        loaded = {path: ModelTokenizer.load(path) for path in set(paths.values())}
        tokenizers = {name: loaded[path] for name, path in paths.items()}
        files = {role.chat_template for recipe in config.recipes.values() for _, role in recipe.roles}
        try:
            templates = {path: read_template(path) for path in files if path is not None}
        except BrokenFileError as error:
            raise ConfigError(f"chat_template: {error}", param="recipes") from error
        return cls(tokenizers, templates)

    async def chat(self, terms: Sequence[Term], prompting: Prompting, messages: Sequence[Message]) -> Prompts:
        """Each term's prompt for a chat: its own template (`plain_chat` where there is none) and its own instructions.

        Raises:
            InvalidRequestError: a template refuses the messages.
        """
        characters = sum(len(m["content"]) for m in messages)
        return await self._each(terms, prompting, lambda reader: reader.encode_chat(messages), characters)

    async def completion(self, terms: Sequence[Term], prompting: Prompting, prompt: str | Sequence[int]) -> Prompts:
        """Each term's prompt for a text completion, with the special tokens that its tokenizer adds by default.

        Raises:
            InvalidRequestError: token ids are out of range, mean different things to the models, or cannot be
                preceded or followed by a term's own text.
        """
        if isinstance(prompt, str):
            return await self._each(terms, prompting, lambda reader: reader.encode_text(prompt), len(prompt))
        self._check_ids(terms, prompting, prompt)
        return {term.name: list(prompt) for term in terms}

    async def given(self, terms: Sequence[Term], completion: str | Sequence[int]) -> list[int]:
        """The tokens of an output that all terms share; text is tokenised alone, without special tokens.

        Raises:
            InvalidRequestError: it is empty, token ids are out of range, or the models' vocabularies differ.
        """
        tokenizer = self._one_vocabulary(terms, "completion")
        if isinstance(completion, str):
            encode = partial(tokenizer.encode, completion, add_special_tokens=False, param="completion")
            ids = encode() if len(completion) <= INLINE_CHARACTERS else await asyncio.to_thread(encode)
        else:
            ids = list(completion)
            tokenizer.check_range(ids, "completion")
        if not ids:
            raise InvalidRequestError("completion: must hold at least one token", param="completion")
        return ids

    def token_decoder(self, model: str) -> Callable[[int], str]:
        """Decodes single tokens of this model, special tokens included."""
        decode = self._tokenizers[model].tokenizer.backend_tokenizer.decode
        return lambda token_id: str(decode([token_id], skip_special_tokens=False))

    def _check_ids(self, terms: Sequence[Term], prompting: Prompting, ids: Sequence[int]) -> None:
        for term in terms:
            if prompting[term.name].system_prompt or prompting[term.name].response_prefix:
                raise InvalidRequestError(
                    f"prompt: token ids leave no place for the system_prompt or response_prefix of {term.name!r}; "
                    "send text",
                    param="prompt",
                )
        self._one_vocabulary(terms, "prompt").check_range(ids, "prompt")

    def _one_vocabulary(self, terms: Sequence[Term], param: str) -> ModelTokenizer:
        tokenizers = [self._tokenizers[term.model] for term in terms]
        if len({t.vocabulary for t in tokenizers}) > 1:
            models = [term.model for term in terms]
            raise InvalidRequestError(
                f"{param}: token ids need one vocabulary, and the models {models} have several; send text",
                param=param,
            )
        return tokenizers[0]

    async def _each(
        self, terms: Sequence[Term], prompting: Prompting, encode: Callable[[Reader], list[int]], characters: int
    ) -> Prompts:
        """`encode` once for all terms that are prompted alike; in a thread when there is much to encode."""
        readers = {term.name: self._reader(term.model, prompting[term.name]) for term in terms}
        own = sum(
            len(r.prompting.system_prompt or "") + len(r.prompting.response_prefix or "") for r in readers.values()
        )

        def work() -> Prompts:
            done: dict[Hashable, list[int]] = {}
            prompts: Prompts = {}
            for name, reader in readers.items():
                key = reader.key
                prompts[name] = done[key] if key in done else done.setdefault(key, encode(reader))
            return prompts

        return work() if characters + own <= INLINE_CHARACTERS else await asyncio.to_thread(work)

    def _reader(self, model: str, prompting: PromptConfig) -> Reader:
        template = prompting.chat_template
        return Reader(self._tokenizers[model], prompting, None if template is None else self._templates[template])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
