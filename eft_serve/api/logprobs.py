"""Log-probabilities of generated tokens in OpenAI's two shapes: of chats and of text completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from eft_serve.types import TokenComponents

JsonObject = dict[str, Any]


class LogprobsFormat(Protocol):
    """Formats the tokens of a response's choices; keeps how far each choice is."""

    def of(self, index: int, tokens: Sequence[TokenComponents]) -> JsonObject:
        """The next tokens of a choice."""
        ...


@dataclass(frozen=True, slots=True)
class ChatLogprobs:
    """`choices[].logprobs` of a chat."""

    num_top: int
    bytes_of: Callable[[int], bytes]

    def of(self, index: int, tokens: Sequence[TokenComponents]) -> JsonObject:
        """See `LogprobsFormat`."""
        content = [
            self._token(token) | {"top_logprobs": [self._token(other) for other in token.top[: self.num_top]]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: TokenComponents) -> JsonObject:
        own = self.bytes_of(token.token_id)
        return {"token": own.decode(errors="replace"), "logprob": token.logprob, "bytes": list(own)}


@dataclass(frozen=True, slots=True)
class CompletionLogprobs:
    """`choices[].logprobs` of a text completion; offsets count the characters of the tokens before."""

    num_top: int
    bytes_of: Callable[[int], bytes]
    _offsets: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))  # by choice

    def of(self, index: int, tokens: Sequence[TokenComponents]) -> JsonObject:
        """See `LogprobsFormat`."""
        shown: JsonObject = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text = self._text(token)
            # Likelier first: of tokens that read alike, as broken characters do, the likelier one is shown.
            top = {self._text(other): other.logprob for other in reversed(token.top[: self.num_top])}
            shown["tokens"].append(text)
            shown["token_logprobs"].append(token.logprob)
            shown["top_logprobs"].append({text: token.logprob} | dict(reversed(top.items())))
            shown["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(text)
        return shown

    def _text(self, token: TokenComponents) -> str:
        return self.bytes_of(token.token_id).decode(errors="replace")
