"""How many prompt tokens a step may take along beside those that decode, learnt from the steps so far.

A prefill beside decoding requests makes all of them wait. What a token costs depends on the models and their devices,
so it is measured: a chunk may make a decode step so many times slower as the configuration says, and no more.
"""

from __future__ import annotations

SMALLEST_CHUNK = 16  # tokens; a prefill goes on, however slow it is
FIRST_CHUNK = 64  # tokens, while nothing is known
_KEPT = 0.9  # of what was known, with each further step


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
        self._extra_s, self._tokens = 0.0, 0.0  # of prefills, both fading alike: a ratio of sums forgives noise

    @property
    def chunk(self) -> int:
        """Prompt tokens that a step may compute beside decodes, for each replica."""
        if self._decode_s is None or self._tokens == 0.0:
            return min(FIRST_CHUNK, self._most)
        affordable = (self._slowdown - 1) * self._decode_s * self._tokens / max(self._extra_s, 1e-9)
        return min(max(SMALLEST_CHUNK, int(min(affordable, self._most))), self._most)

    def observe(self, seconds: float, num_prefill_tokens: int) -> None:
        """A step took so long, and computed so many prompt tokens on its busiest replica."""
        if num_prefill_tokens == 0:
            known = seconds if self._decode_s is None else self._decode_s
            self._decode_s = _KEPT * known + (1 - _KEPT) * seconds
        elif self._decode_s is not None:
            self._extra_s = _KEPT * self._extra_s + seconds - self._decode_s
            self._tokens = _KEPT * self._tokens + num_prefill_tokens
