"""How many prompt tokens a step may take along beside those that decode, learnt from the steps so far.

A prefill beside decoding requests makes all of them wait. What a token costs depends on the models and their devices,
so it is measured: a chunk may make a decode step so many times slower as the configuration says, and no more.
"""

from __future__ import annotations

SMALLEST_CHUNK = 16  # tokens; a prefill goes on, however slow it is, and fewer tell nothing about their cost
FIRST_CHUNK = 64  # tokens, while nothing is known
_STEADY = 0.1  # weight of one more step
_SLOWER, _QUICKER = 0.5, 0.05  # of a prefill that took longer, or less long, than thought: a cached prefix looks quick


class Pacer:
    """Times steps and sizes chunks; all times in seconds.

    Args:
        slowdown: of a decode step, by the prefill beside it; more than 1.
        most: tokens of the largest chunk.
    """

    def __init__(self, slowdown: float, most: int) -> None:
        self._slowdown = slowdown
        self._most = most
        self._decode_s: float | None = None
        self._token_s: float | None = None

    @property
    def chunk(self) -> int:
        """Prompt tokens that a step may compute beside decodes, for each replica."""
        if self._decode_s is None or self._token_s is None:
            return min(FIRST_CHUNK, self._most)
        affordable = int((self._slowdown - 1) * self._decode_s / self._token_s)
        return min(max(SMALLEST_CHUNK, affordable), self._most)

    def observe(self, seconds: float, num_prefill_tokens: int) -> None:
        """A step took so long, with so many prompt tokens on its busiest replica."""
        if num_prefill_tokens == 0:
            self._decode_s = _moved(self._decode_s, seconds, _STEADY)
        elif self._decode_s is not None and num_prefill_tokens >= SMALLEST_CHUNK:
            token_s = max(seconds - self._decode_s, 1e-6) / num_prefill_tokens
            slower = self._token_s is not None and token_s > self._token_s
            self._token_s = _moved(self._token_s, token_s, _SLOWER if slower else _QUICKER)


def _moved(estimate: float | None, seen: float, weight: float) -> float:
    return seen if estimate is None else estimate + weight * (seen - estimate)
