"""From tokens to text, as they come: never half a character, never a part of a stop string.

Knows a tokenizer's `decode` and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are no character, or not yet one
CONTEXT_TOKENS = 5  # of the prompt, so that the first token's leading space is decoded as in the whole text


class Decoder(Protocol):
    """A tokenizer's way back."""

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(slots=True)
class Detokenizer:
    """Decodes a growing list of tokens through a short window, so that the cost per token stays constant.

    A token may end inside a character, and may change the text of its neighbours; so the window starts before the text
    that is already out, and what decodes to a trailing replacement character is kept back until it is whole.
    """

    decoder: Decoder
    window: list[int]  # tokens decoded again each time: some that are out, then those that are not
    num_settled: int = field(init=False)  # of the window, tokens whose text is out
    shown: str = field(init=False)  # text of the settled part, plus what is already out of the rest

    def __post_init__(self) -> None:
        self._settle()

    @classmethod
    def after_prompt(cls, decoder: Decoder, prompt_token_ids: Sequence[int]) -> Detokenizer:
        """Begin with the prompt's last tokens as context, from where a character begins."""
        context = list(prompt_token_ids[-CONTEXT_TOKENS:])
        while context and decoder.decode(context).startswith(REPLACEMENT):
            context = context[1:]
        return cls(decoder, context)

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens make certain."""
        self.window += token_ids
        text = self._decoded()
        whole = text.rstrip(REPLACEMENT)
        if not whole.startswith(self.shown):
            return ""
        fresh = whole[len(self.shown) :]
        self.shown += fresh
        if fresh and len(whole) == len(text):
            self._slide()
        return fresh

    def flush(self) -> str:
        """Text that was kept back, as it is; nothing follows."""
        rest = self._decoded()[len(self.shown) :]
        self.shown += rest
        return rest

    def _slide(self) -> None:
        """Everything in the window is out: its newer tokens are context enough for what comes."""
        self.window = self.window[self.num_settled :]
        self._settle()

    def _settle(self) -> None:
        self.num_settled = len(self.window)
        self.shown = self._decoded().rstrip(REPLACEMENT)

    def _decoded(self) -> str:
        return self.decoder.decode(self.window) if self.window else ""


@dataclass(slots=True)
class StopChecker:
    """Finds stop strings across token borders; keeps back text that may yet become one."""

    stops: tuple[str, ...]
    buffer: str = ""
    stopped: bool = False

    def push(self, text: str) -> str:
        """Text that can go out; sets `stopped` when a stop string was found (it and what follows is dropped)."""
        if not self.stops:
            return text
        self.buffer += text
        matches = [index for stop in self.stops if (index := self.buffer.find(stop)) >= 0]
        if matches:
            self.stopped = True
            return self._release(min(matches))
        return self._release(len(self.buffer) - self._longest_partial())

    def flush(self) -> str:
        """What was kept back: the stream ended, so it is no stop string."""
        return self._release(len(self.buffer))

    def _release(self, length: int) -> str:
        out, self.buffer = self.buffer[:length], "" if self.stopped else self.buffer[length:]
        return out

    def _longest_partial(self) -> int:
        """Length of the longest end of `buffer` that begins a stop string."""
        longest = min(len(self.buffer), max(map(len, self.stops)) - 1)
        sizes = range(longest, 0, -1)
        return next((size for size in sizes if any(stop.startswith(self.buffer[-size:]) for stop in self.stops)), 0)
