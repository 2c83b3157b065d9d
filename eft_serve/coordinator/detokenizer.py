"""Incremental detokenization: never half a character, never part of a stop string.

Knows a tokenizer's `decode` and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are not, or not yet, a character
CONTEXT_TOKENS = 5  # from the prompt, so that the first token's leading space is decoded as in the whole text


class Decoder(Protocol):
    """Turns token ids into text."""

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(slots=True)
class Detokenizer:
    """Decodes a growing list of tokens through a short window, so that the cost per token stays constant.

    A token may end inside a character, and may change the text of its neighbours. So the window starts before the text
    that is already emitted, and a trailing replacement character is kept back until it is a whole character.
    """

    decoder: Decoder
    window: list[int]  # tokens decoded again each time: some that are emitted, then those that are not
    num_settled: int = field(init=False)  # tokens of the window whose text is emitted
    shown: str = field(init=False)  # text of the settled part, plus the emitted text of the rest

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
        """Append tokens; returns the text that can no longer change."""
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
        """The text that was kept back, at the end of the output."""
        rest = self._decoded()[len(self.shown) :]
        self.shown += rest
        return rest

    def _slide(self) -> None:
        """All text of the window is emitted: its newer tokens are enough context for the next ones."""
        self.window = self.window[self.num_settled :]
        self._settle()

    def _settle(self) -> None:
        self.num_settled = len(self.window)
        self.shown = self._decoded().rstrip(REPLACEMENT)

    def _decoded(self) -> str:
        return self.decoder.decode(self.window) if self.window else ""


@dataclass(slots=True)
class StopChecker:
    """Finds stop strings across token boundaries; keeps back text that may become one."""

    stops: tuple[str, ...]
    buffer: str = ""
    stopped: bool = False

    def push(self, text: str) -> str:
        """Text that can be emitted; sets `stopped` when a stop string was found (it and what follows are dropped)."""
        if not self.stops:
            return text
        self.buffer += text
        matches = [index for stop in self.stops if (index := self.buffer.find(stop)) >= 0]
        if matches:
            self.stopped = True
            return self._release(min(matches))
        return self._release(len(self.buffer) - self._longest_partial())

    def flush(self) -> str:
        """The text that was kept back: the output ended, so it is not a stop string."""
        return self._release(len(self.buffer))

    def _release(self, length: int) -> str:
        out, self.buffer = self.buffer[:length], "" if self.stopped else self.buffer[length:]
        return out

    def _longest_partial(self) -> int:
        """Length of the longest suffix of `buffer` that is a prefix of a stop string."""
        longest = min(len(self.buffer), max(map(len, self.stops)) - 1)
        sizes = range(longest, 0, -1)
        return next((size for size in sizes if any(stop.startswith(self.buffer[-size:]) for stop in self.stops)), 0)
