"""How one term of a combination reads a prompt: its own template, instructions and tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from eft_serve.api.model_tokenizer import Message, ModelTokenizer
from eft_serve.api.prompt_options import DEFAULT_OPTIONS, PromptOptions
from eft_serve.checkpoints.vocabulary import check_range
from eft_serve.config_recipes import PromptConfig
from eft_serve.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt of a request: a text, token ids, or the messages of a chat."""

    prompt: str | Sequence[int] | Sequence[Message]
    param: str  # what it is called in errors

    @property
    def text(self) -> str | None:
        return self.prompt if isinstance(self.prompt, str) else None

    @property
    def has_ids(self) -> bool:
        """Whether it is token ids; so is what is empty."""
        return self.text is None and (not self.prompt or isinstance(self.prompt[0], int))

    @property
    def messages(self) -> list[Message]:
        return [] if self.has_ids else [each for each in self.prompt if not isinstance(each, int | str)]

    def token_ids(self, keep: int | None = None) -> list[int]:
        """All of them, or the last ones."""
        return [each for each in self.prompt[-keep if keep else 0 :] if isinstance(each, int)]

    @property
    def num_characters(self) -> int:
        """To render and to encode."""
        return len(self.prompt) if self.text is not None else sum(len(m.get("content", "")) for m in self.messages)


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
        """Readers of equal key make equal prompts, if they keep as much of them."""
        settings = self.prompting
        return self.tokenizer.fingerprint, self.chat_template, settings.system_prompt, settings.response_prefix

    @property
    def chat_template(self) -> str | None:
        """The template of its chats; None: the plain format."""
        return self.tokenizer.template if self.template is None else self.template

    def keep(self, options: PromptOptions) -> int | None:
        """How many tokens of a prompt are kept, its last ones; None: all. Raises as `Truncation.keep`."""
        return None if options.truncation is None else options.truncation.keep(self.max_tokens)

    def read(self, asked: Asked, options: PromptOptions = DEFAULT_OPTIONS) -> list[int]:
        """The tokens of a prompt; raises as `chat`, `keep`, `ModelTokenizer.encode` and `check_range` do."""
        keep = self.keep(options)
        if asked.has_ids:
            ids = asked.token_ids(keep)
            check_range(asked.param, ids, self.tokenizer.num_ids)
            return ids
        text = self.text(asked, options)
        if keep is None:
            return self.encode(text)
        end = self.tokenizer.end_of(text.text, keep)
        return self.tokenizer.encode(end, text.add_special_tokens, text.param, sys.maxsize)[-keep:]

    def text(self, asked: Asked, options: PromptOptions = DEFAULT_OPTIONS) -> Text:
        """What is encoded of a text or of messages; of token ids, nothing."""
        if asked.text is not None:
            return self.completion(asked.text, asked.param, options)
        return Text("", False, asked.param) if asked.has_ids else self.chat(asked.messages, asked.param, options)

    def chat(self, messages: Sequence[Message], param: str, options: PromptOptions) -> Text:
        """The text of a chat; a template brings its special tokens, the plain format gets the tokenizer's.

        Raises:
            InvalidRequestError: see `ModelTokenizer.render`; or the beginnings of the answer by the request and by the
                recipe cannot both come first.
        """
        prefix = self.prompting.response_prefix
        if prefix and options.continue_final_message:
            message = "this recipe begins the answer itself, by a response_prefix; leave it out"
            raise InvalidRequestError(f"continue_final_message: {message}", param="continue_final_message")
        instructed = _instructed(messages, self.prompting.system_prompt)
        text = self.tokenizer.render(instructed, self.template, options, param)
        add_special_tokens = self.chat_template is None or options.special_tokens_in_chats
        return Text(text + (prefix or ""), add_special_tokens, param)

    def completion(self, prompt: str, param: str, options: PromptOptions) -> Text:
        """The text of a prompt: the system prompt on a line before it, the answer's beginning right after it.

        Raises:
            InvalidRequestError: the middle before a suffix is wanted, and the tokenizer has no tokens for that.
        """
        before = f"{self.prompting.system_prompt}\n" if self.prompting.system_prompt else ""
        text = before + prompt
        if options.suffix:
            if (tokens := self.tokenizer.fill_in_the_middle) is None:
                message = "suffix: a model of these has no fill-in-the-middle tokens; leave it out"
                raise InvalidRequestError(message, param="suffix")
            front, behind, middle = tokens
            text = f"{front}{text}{behind}{options.suffix}{middle}"
        return Text(text + (self.prompting.response_prefix or ""), options.special_tokens_in_texts, param)

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


def _instructed(messages: Sequence[Message], system_prompt: str | None) -> Sequence[Message]:
    """The chat with this system prompt; a leading system message is appended to it."""
    if system_prompt is None:
        return messages
    own = [m["content"] for m in messages[:1] if m["role"] == "system"]
    content = "\n\n".join(part for part in (system_prompt, *own) if part)
    return [{"role": "system", "content": content}, *messages[len(own) :]]
