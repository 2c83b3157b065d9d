"""Incremental detokenization: never half a character, never part of a stop string.

Knows a tokenizer's `decode` and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are not, or not yet, a character
CONTEXT_TOKENS = 5  # from the prompt, so that the first token's leading space is decoded as in the whole text
MAX_PENDING = 3  # tokens of an incomplete character: its last byte would complete it
MAX_SILENT = 8  # tokens that gave no text and are kept, in case the next one gives theirs


class Decoder(Protocol):
    """Turns token ids into text."""

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(slots=True)
class Detokenizer:
    """Decodes a growing list of tokens through a short window, so that the cost per token stays constant.

    A token may end inside a character, and may change the text of its neighbours. So the window starts before the text
    that is already emitted, and a trailing replacement character is kept back until it is a whole character, or can
    no longer become one. With tokens for single bytes (a byte fallback) one broken byte makes a replacement character
    of each byte beside it, also of those of whole characters; then the bytes are decoded apart.
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
        text = self._decoded([*self.window, *token_ids])
        if not text.startswith(self.shown) or REPLACEMENT in text[len(self.shown) :]:
            return "".join(map(self._push_one, token_ids))
        self.window += token_ids
        return self._show(text)

    def _push_one(self, token_id: int) -> str:
        self.window.append(token_id)
        text = self._decoded(self.window)
        if not text.startswith(self.shown):  # a broken byte after a whole character
            self._restart(self.window[self.num_settled :])
            text = self._decoded(self.window)
        fresh = self._show(text)
        size = self._num_open(text) if text.endswith(REPLACEMENT) else 0
        if size:
            before, after, shown = self._decoded(self.window[:-size]), self.window[-size:], self.shown
            fresh += before[len(shown) :]
            self._restart(after)
            self.shown = shown[len(before) :]
            fresh += self._show(self._decoded(after))
        return fresh

    def _num_open(self, text: str) -> int:
        """How many of the last tokens are to be decoded apart, because those before cannot change; 0 for none."""
        num_pending = len(self.window) - self.num_settled
        sizes = range(min(MAX_PENDING, num_pending - 1), 0, -1)
        parts = [(size, self._decoded(self.window[:-size]), self._decoded(self.window[-size:])) for size in sizes]
        for size, _, after in parts:
            if after and REPLACEMENT not in after:  # a whole character behind broken bytes
                return size
        if num_pending > MAX_PENDING:
            return next((size for size, before, after in parts if before + after == text), 0)
        return 0

    def _show(self, text: str) -> str:
        """The part of the window's text that is new and can no longer change."""
        whole = text.rstrip(REPLACEMENT)
        fresh = whole[len(self.shown) :]
        self.shown += fresh
        if len(whole) == len(text):
            if fresh:
                self._restart(self.window[self.num_settled :])
                self._settle()
            else:
                del self.window[self.num_settled : -MAX_SILENT]
        return fresh

    def _restart(self, window: list[int]) -> None:
        """Go on with these tokens, of which nothing is emitted."""
        self.window, self.num_settled, self.shown = window, 0, ""

    def flush(self) -> str:
        """The text that was kept back, at the end of the output."""
        rest = self._decoded(self.window)[len(self.shown) :]
        self.shown += rest
        return rest

    def _settle(self) -> None:
        """All text of the window is emitted; it is the context of the next tokens."""
        self.num_settled = len(self.window)
        self.shown = self._decoded(self.window).rstrip(REPLACEMENT)

    def _decoded(self, token_ids: list[int]) -> str:
        return self.decoder.decode(token_ids) if token_ids else ""


@dataclass(slots=True)
class StopChecker:
    """Finds stop strings across token boundaries; keeps back text that may become one."""

    stops: tuple[str, ...]
    shows_stop: bool = False  # the stop string is part of the text
    buffer: str = ""
    stopped: bool = False

    def push(self, text: str) -> str:
        """Text that can be emitted; sets `stopped` when a stop string was found (it and what follows are dropped)."""
        if not self.stops:
            return text
        self.buffer += text
        matches = [(index, len(stop)) for stop in self.stops if (index := self.buffer.find(stop)) >= 0]
        if matches:
            self.stopped = True
            start, length = min(matches)
            return self._release(start + length if self.shows_stop else start)
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
