"""From messages or text to token ids, by each term's own tokenizer, chat template and instructions.

The terms of a combination may be prompted differently (a base model knows no chat template, a recipe may instruct one
and not another) but share one vocabulary. What several terms have in common is rendered and encoded once.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from msgspec import structs

from eft_serve.api.model_tokenizer import Message, ModelTokenizer
from eft_serve.api.prompt_options import DEFAULT_OPTIONS, PromptOptions
from eft_serve.api.reader import Asked, Given, Reader
from eft_serve.api.strict_json import MOST_SHOWN
from eft_serve.checkpoints.chat_template import directory_template, read_template
from eft_serve.checkpoints.json_file import BrokenFileError
from eft_serve.checkpoints.vocabulary import check_range
from eft_serve.config import AdapterConfig, AppConfig
from eft_serve.config_recipes import PromptConfig
from eft_serve.errors import ConfigError, ContextLengthError, InvalidRequestError
from eft_serve.grammars.trial import TRIAL
from eft_serve.types import Combination, Grammar, Term

NUM_THREADS = 2  # that render and encode; more texts wait, so that their memory is bounded
INLINE_CHARACTERS = 2048  # one or two milliseconds of work; more runs in a thread, or it would stall every stream

T = TypeVar("T")
Prompts = dict[str, list[int]]  # by term
Prompting = Mapping[str, PromptConfig]  # by term
OwnPrompts = Mapping[str, Asked]  # by term; the others read the request's own prompt
NO_PROMPTS: OwnPrompts = {}


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
        self._grammar_threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammars")

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

    async def chat(
        self,
        terms: Sequence[Term],
        prompting: Prompting,
        messages: Sequence[Message],
        own: OwnPrompts = NO_PROMPTS,
        options: PromptOptions = DEFAULT_OPTIONS,
        param: str = "messages",
    ) -> Prompts:
        """Each term's prompt for a chat: its own template (`plain_chat` where there is none) and its own instructions.

        Raises:
            InvalidRequestError: a template refuses the messages; or as `completion`, for prompts of single terms.
        """
        return await self._read(terms, prompting, Asked(messages, param), own, options)

    async def completion(
        self,
        terms: Sequence[Term],
        prompting: Prompting,
        prompt: str | Sequence[int],
        own: OwnPrompts = NO_PROMPTS,
        options: PromptOptions = DEFAULT_OPTIONS,
        param: str = "prompt",
    ) -> Prompts:
        """Each term's prompt for a text completion, with the special tokens that its tokenizer adds by default.

        Raises:
            InvalidRequestError: token ids are out of range, mean different things to the models, or cannot be
                preceded or followed by a term's own text; or as `chat`, for prompts of single terms.
        """
        return await self._read(terms, prompting, Asked(prompt, param), own, options)

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
            asked = Asked(prompt, "prompt" if isinstance(prompt, str) else "messages")

            def work() -> Given:
                reader.tokenizer.check_length(completion, reader.max_tokens, "completion")
                return reader.continuation(reader.text(asked), completion)

            given = await self._run(work, len(completion) + len(prompt))
        else:
            self._check_count(terms, len(completion), "completion")
            given = Given(list(completion))
            check_range("completion", given.token_ids, tokenizer.num_ids)
        if not given.token_ids:
            raise InvalidRequestError("completion: must hold at least one token", param="completion")
        return given

    async def tokenize(
        self,
        term: Term,
        prompting: PromptConfig,
        asked: Asked,
        options: PromptOptions,
        max_tokens: int,
        *,
        with_strs: bool,
    ) -> tuple[list[int], list[str] | None]:
        """A term's prompt, however long up to `max_tokens`, and its tokens as the vocabulary has them if wanted.

        Raises:
            InvalidRequestError: as `chat` and `completion`.
        """
        reader = replace(self._reader(term, prompting), max_tokens=max_tokens)
        _check_kwargs(options.template_kwargs, [reader])

        def work() -> tuple[list[int], list[str] | None]:
            ids = reader.read(asked, options)
            return ids, [str(reader.tokenizer.token(token_id)) for token_id in ids] if with_strs else None

        return await self._run(work, asked.num_characters)

    async def detokenize(self, term: Term, token_ids: Sequence[int]) -> str:
        """The text of tokens, special tokens included; raises as `check_range`."""
        tokenizer = self.tokenizer(term.model)

        def work() -> str:
            check_range("tokens", token_ids, tokenizer.num_ids)
            return tokenizer.decode(token_ids)

        return await self._run(work, len(token_ids))

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

    async def grammar(
        self, combination: Combination, define: Callable[[], Grammar | None], salt: str
    ) -> Grammar | None:
        """The grammar that an answer has to follow, once it is known that it can.

        Args:
            define: makes it; raises `InvalidRequestError`.
            salt: see `Grammar`.

        Raises:
            InvalidRequestError: it is wrong, too complex or has no text, or the model's tokens have no known bytes.
        """
        tokenizer = self._tokenizers[combination.counted.model]

        def compile_it() -> Grammar | None:
            defined = define()
            grammar = None if defined is None else structs.replace(defined, salt=salt)
            if grammar is not None:
                if not tokenizer.grammars.has_compiled(grammar):
                    TRIAL.check(grammar)
                tokenizer.grammars.matcher(grammar)
            return grammar

        return await asyncio.get_running_loop().run_in_executor(self._grammar_threads, compile_it)

    def token_decoder(self, model: str) -> Callable[[int], str]:
        """Decodes single tokens of this model, special tokens included."""
        decode = self._tokenizers[model].tokenizer.backend_tokenizer.decode
        return lambda token_id: str(decode([token_id], skip_special_tokens=False))

    def _check_ids(self, terms: Sequence[Term], prompting: Prompting, asked: Asked, options: PromptOptions) -> None:
        param = asked.param
        for term in terms:
            if prompting[term.name].system_prompt or prompting[term.name].response_prefix:
                raise InvalidRequestError(
                    f"{param}: token ids leave no place for the system_prompt or response_prefix of {term.name!r}; "
                    "send text",
                    param=param,
                )
        if options.truncation is None:
            self._check_count(terms, len(asked.prompt), param)
        self._one_vocabulary(terms, param)

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

    async def _read(
        self, terms: Sequence[Term], prompting: Prompting, default: Asked, own: OwnPrompts, options: PromptOptions
    ) -> Prompts:
        """Each term's tokens, made once for all terms that are prompted alike; in a thread when there is much to do."""
        asked = {term.name: own.get(term.name, default) for term in terms}
        readers = {term.name: self._reader(term, prompting[term.name]) for term in terms}
        several = {each.param: each for each in asked.values()}
        for param, each in several.items():
            if each.has_ids:
                self._check_ids([term for term in terms if asked[term.name].param == param], prompting, each, options)
        _check_kwargs(options.template_kwargs, (readers[name] for name, each in asked.items() if each.messages))
        if options.tool_param is not None:
            for name, reader in readers.items():
                _check_knows_tools(name, reader, options.tool_param)
        if options.suffix and any(each.has_ids for each in several.values()):
            message = "suffix: there is no place for it in token ids; send the prompt as text"
            raise InvalidRequestError(message, param="suffix")
        characters = (
            len(options.suffix or "")
            + sum(each.num_characters for each in several.values())
            + sum(
                len(r.prompting.system_prompt or "") + len(r.prompting.response_prefix or "") for r in readers.values()
            )
        )

        def work() -> Prompts:
            done: dict[Hashable, list[int]] = {}
            prompts: Prompts = {}
            for name, reader in readers.items():
                key = (reader.key, reader.keep(options), asked[name].param)
                prompts[name] = done[key] if key in done else done.setdefault(key, reader.read(asked[name], options))
            return prompts

        return await self._run(work, characters)

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


def _check_knows_tools(name: str, reader: Reader, param: str) -> None:
    if not {"tools", "tool_calls"} & set(re.findall(r"\w+", reader.chat_template or "")):
        message = f"the chat template of {name!r} knows no tools; give it another by chat_template, or leave them out"
        raise InvalidRequestError(f"{param}: {message}", param=param)


def _check_kwargs(kwargs: Mapping[str, object], readers: Iterable[Reader]) -> None:
    """Raises `InvalidRequestError` for the first argument that no chat template reads."""
    if not kwargs:
        return
    words = {word for reader in readers for word in re.findall(r"\w+", reader.chat_template or "")}
    if unread := sorted(kwargs.keys() - words):
        param = f"chat_template_kwargs.{unread[0][:MOST_SHOWN]}"
        raise InvalidRequestError(f"{param}: no chat template of this model reads it; leave it out", param=param)
