"""Log-probabilities of generated tokens in OpenAI's two shapes: of chats and of text completions."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

from eft_serve.types import TokenComponents

JsonObject = dict[str, Any]

IMPOSSIBLE = -9999.0  # vLLM's, for a probability of 0: JSON has no infinity


class LogprobsFormat(Protocol):
    """Formats the tokens of a response's choices; keeps how far each choice is."""

    def of(self, index: int, tokens: Sequence[TokenComponents]) -> JsonObject:
        """The next tokens of a choice."""
        ...

    def of_prompt(self, index: int, prompt: str, first_token_id: int, tokens: Sequence[TokenComponents]) -> JsonObject:
        """A choice's prompt, whose first token has no log-probability; before any other token of it.

        Args:
            prompt: its text, as the answer shows it.
        """
        ...


@dataclass(frozen=True, slots=True)
class ChatLogprobs:
    """`choices[].logprobs` of a chat."""

    num_top: int
    bytes_of: Callable[[int], bytes]

    def of(self, index: int, tokens: Sequence[TokenComponents]) -> JsonObject:
        """See `LogprobsFormat`."""
        content = [
            self._token(token) | {"top_logprobs": [self._token(other) for other in possible_top(token, self.num_top)]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def of_prompt(self, index: int, prompt: str, first_token_id: int, tokens: Sequence[TokenComponents]) -> JsonObject:
        """Chats do not echo."""
        raise NotImplementedError

    def _token(self, token: TokenComponents) -> JsonObject:
        own = self.bytes_of(token.token_id)
        return {"token": own.decode(errors="replace"), "logprob": finite_logprob(token), "bytes": list(own)}


class _Offset:
    """Characters of a choice's text so far."""

    def __init__(self) -> None:
        self.characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several tokens

    def add(self, text: bytes) -> None:
        self.characters += len(self._decoder.decode(text))


@dataclass(frozen=True, slots=True)
class CompletionLogprobs:
    """`choices[].logprobs` of a text completion; offsets are of the character that a token begins or goes on with."""

    num_top: int
    bytes_of: Callable[[int], bytes]
    hidden: frozenset[int]  # tokens that the text does not show
    _offsets: dict[int, _Offset] = field(default_factory=dict)  # by choice

    def of(self, index: int, tokens: Sequence[TokenComponents]) -> JsonObject:
        """See `LogprobsFormat`."""
        shown: JsonObject = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._add(shown, index, tokens)
        return shown

    def of_prompt(self, index: int, prompt: str, first_token_id: int, tokens: Sequence[TokenComponents]) -> JsonObject:
        """See `LogprobsFormat`."""
        text = self.bytes_of(first_token_id)
        ids = (first_token_id, *(token.token_id for token in tokens))
        whole = b"".join(self.bytes_of(token_id) for token_id in ids if token_id not in self.hidden).decode(
            errors="replace"
        )
        if whole.endswith(prompt):  # some tokenizers put a space before a text, which it does not have
            self._offset(index).characters = len(prompt) - len(whole)
        if first_token_id not in self.hidden:
            self._offset(index).add(text)
        shown: JsonObject = {
            "tokens": [text.decode(errors="replace")],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [0],
        }
        self._add(shown, index, tokens)
        return shown

    def _offset(self, index: int) -> _Offset:
        return self._offsets.setdefault(index, _Offset())

    def _add(self, shown: JsonObject, index: int, tokens: Sequence[TokenComponents]) -> None:
        offset = self._offset(index)
        for token in tokens:
            text = self._text(token)
            top: dict[str, float] = {}
            for other in possible_top(token, self.num_top):  # of tokens that read alike the most likely one is shown
                top.setdefault(self._text(other), other.logprob)
            shown["tokens"].append(text)
            shown["token_logprobs"].append(finite_logprob(token))
            shown["top_logprobs"].append(top | {text: finite_logprob(token)})
            shown["text_offset"].append(max(0, offset.characters))
            if token.token_id not in self.hidden:
                offset.add(self.bytes_of(token.token_id))

    def _text(self, token: TokenComponents) -> str:
        return self.bytes_of(token.token_id).decode(errors="replace")


def possible_top(token: TokenComponents, count: int | None) -> list[TokenComponents]:
    """The `count` most likely tokens that are possible at all; None: all of them that there are."""
    return [other for other in token.top[:count] if other.logprob > -inf]


def finite_logprob(token: TokenComponents) -> float:
    """As JSON has it."""
    return max(token.logprob, IMPOSSIBLE)
