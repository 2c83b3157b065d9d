"""From messages or text to token ids, by each term's own tokenizer, chat template and instructions.

The terms of a combination may be prompted differently (a base model knows no chat template, a recipe may instruct one
and not another) but share one vocabulary. What several terms have in common is rendered and encoded once.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from eft_serve.api.model_tokenizer import Message, ModelTokenizer
from eft_serve.checkpoints.chat_template import directory_template, read_template
from eft_serve.checkpoints.json_file import BrokenFileError
from eft_serve.checkpoints.vocabulary import check_range
from eft_serve.config import AdapterConfig, AppConfig
from eft_serve.config_recipes import PromptConfig
from eft_serve.errors import ConfigError, ContextLengthError, InvalidRequestError
from eft_serve.types import Combination, Grammar, Term

NUM_THREADS = 2  # that render and encode; more texts wait, so that their memory is bounded
INLINE_CHARACTERS = 2048  # one or two milliseconds of work; more runs in a thread, or it would stall every stream

T = TypeVar("T")
Prompts = dict[str, list[int]]  # by term
Prompting = Mapping[str, PromptConfig]  # by term


@dataclass(frozen=True, slots=True)
class Text:
    """A text to encode."""

    text: str
    add_special_tokens: bool
    param: str  # of the request, that it is of


@dataclass(frozen=True, slots=True)
class Given:
    """The tokens of an output that is given."""

    token_ids: list[int]
    split_token: str | None = None  # of prompt and output together, the token across the cut; None: the cut is clean


@dataclass(frozen=True, slots=True)
class Reader:
    """How one term of a combination is prompted."""

    tokenizer: ModelTokenizer
    prompting: PromptConfig
    template: str | None  # of a file; None: the model's own
    max_tokens: int  # of the model's context

    @property
    def key(self) -> Hashable:
        """Readers of equal key make equal prompts."""
        template = self.tokenizer.template if self.template is None else self.template
        return self.tokenizer.fingerprint, template, self.prompting.system_prompt, self.prompting.response_prefix

    def chat(self, messages: Sequence[Message]) -> Text:
        """The text of a chat; a template brings its special tokens, the plain format gets the tokenizer's."""
        text = self.tokenizer.render(_instructed(messages, self.prompting.system_prompt), self.template)
        is_plain = self.template is None and self.tokenizer.template is None
        return Text(text + (self.prompting.response_prefix or ""), is_plain, "messages")

    def completion(self, prompt: str) -> Text:
        """The text of a prompt: the system prompt on a line before it, the answer's beginning right after it."""
        before = f"{self.prompting.system_prompt}\n" if self.prompting.system_prompt else ""
        return Text(before + prompt + (self.prompting.response_prefix or ""), True, "prompt")

    def encode(self, text: Text) -> list[int]:
        """Its token ids; raises as `ModelTokenizer.encode`."""
        return self.tokenizer.encode(text.text, text.add_special_tokens, text.param, self.max_tokens)

    def continuation(self, before: Text, completion: str) -> Given:
        """The tokens of a text as they follow another one in the tokens of both together.

        If one of these is across the cut, the completion is encoded alone, but not as the beginning of a text: some
        tokenizers put a space before that.
        """
        plain = replace(before, add_special_tokens=False)  # some tokenizers add them at the end too
        own = self.encode(plain)
        whole = self.encode(replace(plain, text=before.text + completion, param="completion"))
        if whole[: len(own)] == own:
            return Given(whole[len(own) :])
        across = next(a for a, b in zip_longest(whole, own) if a != b)
        line = Text("\n", False, "completion")
        joined, start = (self.encode(replace(line, text=text)) for text in (line.text + completion, line.text))
        alone = joined[len(start) :] if joined[: len(start)] == start else self.encode(replace(line, text=completion))
        return Given(alone, None if across is None else self.tokenizer.bytes_of(across).decode(errors="replace"))


def _before(reader: Reader, prompt: str | Sequence[int] | Sequence[Message]) -> Text:
    if isinstance(prompt, str):
        return reader.completion(prompt)
    messages = [each for each in prompt if not isinstance(each, int)]
    return reader.chat(messages) if messages else Text("", False, "completion")


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
        max_model_len: a model's context in tokens; it may raise `UnavailableError`.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, ModelTokenizer],
        templates: Mapping[Path, str] | None = None,
        max_model_len: Callable[[str], int] = lambda model: sys.maxsize,
    ) -> None:
        self._tokenizers = dict(tokenizers)
        self._templates = dict(templates or {})
        self._max_model_len = max_model_len
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenizer")

    @classmethod
    def load(cls, config: AppConfig, max_model_len: Callable[[str], int]) -> PromptRenderer:
        """Read the tokenizer of every model of the application; models of one directory share it.

        Raises:
            CheckpointError: a tokenizer cannot be read.
            ConfigError: a recipe's chat template cannot be read.
        """
        paths = {name: config.checkpoint_of(name) for name in config.models}
        loaded = {path: ModelTokenizer.load(path) for path in set(paths.values())}
        tokenizers = {name: loaded[path] for name, path in paths.items()}
        adapters = {name: model for name, model in config.models.items() if isinstance(model, AdapterConfig)}
        files = {role.chat_template for recipe in config.recipes.values() for _, role in recipe.roles}
        try:
            templates = {path: read_template(path) for path in files if path is not None}
            for name, adapter in adapters.items():
                if (own := directory_template(adapter.directory)) is not None:
                    tokenizers[name] = replace(tokenizers[name], own_template=own)
        except BrokenFileError as error:
            raise ConfigError(f"chat_template: {error}", param="recipes") from error
        return cls(tokenizers, templates, max_model_len)

    async def chat(self, terms: Sequence[Term], prompting: Prompting, messages: Sequence[Message]) -> Prompts:
        """Each term's prompt for a chat: its own template (`plain_chat` where there is none) and its own instructions.

        Raises:
            InvalidRequestError: a template refuses the messages.
        """
        characters = sum(len(m["content"]) for m in messages)
        return await self._each(terms, prompting, lambda reader: reader.encode(reader.chat(messages)), characters)

    async def completion(self, terms: Sequence[Term], prompting: Prompting, prompt: str | Sequence[int]) -> Prompts:
        """Each term's prompt for a text completion, with the special tokens that its tokenizer adds by default.

        Raises:
            InvalidRequestError: token ids are out of range, mean different things to the models, or cannot be
                preceded or followed by a term's own text.
        """
        if isinstance(prompt, str):
            return await self._each(
                terms, prompting, lambda reader: reader.encode(reader.completion(prompt)), len(prompt)
            )
        self._check_ids(terms, prompting, prompt)
        return {term.name: list(prompt) for term in terms}

    async def given(
        self,
        combination: Combination,
        prompting: Prompting,
        completion: str | Sequence[int],
        prompt: str | Sequence[int] | Sequence[Message],
    ) -> Given:
        """The tokens of an output that all terms share.

        Text is tokenised as it follows the prompt of the first term with a coefficient; after token ids, alone.

        Raises:
            InvalidRequestError: it is empty, token ids are out of range, or the models' vocabularies differ.
        """
        terms = combination.terms
        tokenizer = self._one_vocabulary(terms, "completion")
        if isinstance(completion, str):
            reader = self._reader(combination.counted, prompting[combination.counted.name])

            def work() -> Given:
                reader.tokenizer.check_length(completion, reader.max_tokens, "completion")
                return reader.continuation(_before(reader, prompt), completion)

            given = await self._run(work, len(completion) + len(prompt))
        else:
            self._check_count(terms, len(completion), "completion")
            given = Given(list(completion))
            check_range("completion", given.token_ids, tokenizer.num_ids)
        if not given.token_ids:
            raise InvalidRequestError("completion: must hold at least one token", param="completion")
        return given

    def tokenizer(self, model: str) -> ModelTokenizer:
        """The tokenizer of this model."""
        return self._tokenizers[model]

    async def words(self, terms: Sequence[Term], words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word, at the beginning of a text and after a space."""
        if not words:
            return ()
        tokenizer = self._one_vocabulary(terms, "bad_words")

        def encode() -> tuple[tuple[int, ...], ...]:
            texts = [text for word in words for text in (word, f" {word.lstrip()}")]
            encoded = (tokenizer.encode(text, False, "bad_words", sys.maxsize) for text in texts)
            return tuple(dict.fromkeys(tuple(ids) for ids in encoded if ids))

        return await self._run(encode, sum(map(len, words)))

    async def grammar(self, combination: Combination, define: Callable[[], Grammar | None]) -> Grammar | None:
        """The grammar that an answer has to follow, once it is known that it can.

        Args:
            define: makes it; raises `InvalidRequestError`.

        Raises:
            InvalidRequestError: it is wrong, too complex or has no text, or the model's tokens have no known bytes.
        """
        tokenizer = self._tokenizers[combination.counted.model]

        def compile_it() -> Grammar | None:
            grammar = define()
            if grammar is not None:
                tokenizer.grammars.matcher(grammar)
            return grammar

        return await asyncio.get_running_loop().run_in_executor(self._threads, compile_it)

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
        self._check_count(terms, len(ids), "prompt")
        check_range("prompt", ids, self._one_vocabulary(terms, "prompt").num_ids)

    def _check_count(self, terms: Sequence[Term], count: int, param: str) -> None:
        """Before anything is done for each of so many tokens."""
        context, model = min((self._max_model_len(term.model), term.model) for term in terms)
        if count > context:
            message = f"{param}: has {count} tokens, and the context of {model!r} is {context}; shorten it"
            raise ContextLengthError(message, param=param)

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
        readers = {term.name: self._reader(term, prompting[term.name]) for term in terms}
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

        return await self._run(work, characters + own)

    async def _run(self, work: Callable[[], T], characters: int) -> T:
        if characters <= INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _reader(self, term: Term, prompting: PromptConfig) -> Reader:
        template = prompting.chat_template
        return Reader(
            self._tokenizers.get(term.adapter or term.model, self._tokenizers[term.model]),
            prompting,
            None if template is None else self._templates[template],
            self._max_model_len(term.model),
        )
