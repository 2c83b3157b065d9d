"""Logits processors: what a request changes of its combined logits before a token is sampled.

Each knows the rows of one request, and keeps what it has seen of the output. Their order is that of `SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


class LogitBias:
    """Adds a constant to the logits of some tokens."""

    def __init__(self, biases: Iterable[tuple[int, float]]) -> None:
        token_ids, values = zip(*biases, strict=True)
        self._token_ids, self._values = torch.tensor(token_ids), torch.tensor(values)

    def __call__(self, output_token_ids: Sequence[int], draft_token_ids: Sequence[int], logits: Tensor) -> None:
        """See `LogitsProcessor`."""
        logits[:, self._token_ids] += self._values.to(logits.device)


class Penalties:
    """Repetition (arXiv 1909.05858), presence and frequency penalties, as vLLM and OpenAI define them.

    Args:
        prompt_token_ids: count for the repetition penalty only.
    """

    def __init__(
        self,
        prompt_token_ids: Iterable[int],
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
    ) -> None:
        self._repetition, self._presence, self._frequency = repetition_penalty, presence_penalty, frequency_penalty
        prompt = dict.fromkeys(prompt_token_ids) if repetition_penalty != 1 else {}
        self._slots = {token_id: slot for slot, token_id in enumerate(prompt)}  # of each token that was seen
        self._token_ids = np.array([*prompt, *[0] * 64], np.int64)  # by slot; grows by doubling
        self._counts = np.zeros(len(self._token_ids), np.float32)  # in the output, by slot
        self._num_prompt_tokens = len(prompt)  # the first slots
        self._num_counted = 0  # output tokens

    def __call__(self, output_token_ids: Sequence[int], draft_token_ids: Sequence[int], logits: Tensor) -> None:
        """See `LogitsProcessor`."""
        for token_id in output_token_ids[self._num_counted :]:
            self._count(token_id, 1)
        self._num_counted = len(output_token_ids)
        counted = []  # draft tokens, which may be rejected
        try:
            for index, row in enumerate(logits):
                for token_id in draft_token_ids[max(0, index - 1) : index]:
                    self._count(token_id, 1)
                    counted.append(token_id)
                self._apply(row)
        finally:
            for token_id in counted:
                self._count(token_id, -1)

    def _count(self, token_id: int, change: int) -> None:
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._token_ids[slot] = token_id
        self._counts[slot] += change

    def _apply(self, row: Tensor) -> None:
        token_ids = torch.from_numpy(self._token_ids[: len(self._slots)]).to(row.device)
        counts = torch.from_numpy(self._counts[: len(self._slots)]).to(row.device)
        values, is_output = row[token_ids], counts > 0
        if self._repetition != 1:
            is_seen = is_output.clone()
            is_seen[: self._num_prompt_tokens] = True
            penalised = torch.where(values > 0, values / self._repetition, values * self._repetition)
            values = torch.where(is_seen, penalised, values)
        row[token_ids] = values - self._frequency * counts - self._presence * is_output


class Allowed:
    """Makes all tokens but these impossible."""

    def __init__(self, token_ids: Iterable[int], vocab_size: int) -> None:
        self._blocked = torch.ones(vocab_size, dtype=torch.bool)
        self._blocked[torch.tensor([*token_ids])] = False

    def __call__(self, output_token_ids: Sequence[int], draft_token_ids: Sequence[int], logits: Tensor) -> None:
        """See `LogitsProcessor`."""
        logits.masked_fill_(self._blocked.to(logits.device), -torch.inf)


class BadWords:
    """Makes the last token of a sequence impossible after the tokens before it."""

    def __init__(self, words: Iterable[Sequence[int]]) -> None:
        self._always: list[int] = []  # words of one token
        self._after: dict[int, list[tuple[list[int], int]]] = {}  # (beginning, last token) by the token before the last
        self._longest = 0
        for *beginning, last in words:
            self._longest = max(self._longest, len(beginning))
            if beginning:
                self._after.setdefault(beginning[-1], []).append((beginning, last))
            else:
                self._always.append(last)

    def __call__(self, output_token_ids: Sequence[int], draft_token_ids: Sequence[int], logits: Tensor) -> None:
        """See `LogitsProcessor`."""
        start = max(0, len(output_token_ids) - self._longest)
        before = [*output_token_ids[start:], *draft_token_ids[: len(logits) - 1]]
        num_output = len(output_token_ids) - start
        for index, row in enumerate(logits):
            tail = before[: num_output + index]
            candidates = self._after.get(tail[-1], ()) if tail else ()
            row[self._always + [last for begin, last in candidates if tail[-len(begin) :] == begin]] = -torch.inf


class MinTokens:
    """Makes end tokens impossible until the output has so many tokens."""

    def __init__(self, min_tokens: int, end_token_ids: Iterable[int]) -> None:
        self._min_tokens, self._ends = min_tokens, [*end_token_ids]

    def __call__(self, output_token_ids: Sequence[int], draft_token_ids: Sequence[int], logits: Tensor) -> None:
        """See `LogitsProcessor`."""
        missing = max(0, self._min_tokens - len(output_token_ids))
        if missing and self._ends:
            logits[:missing, self._ends] = -torch.inf
