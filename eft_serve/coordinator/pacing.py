"""How many prompt tokens a step may prefill beside decoding requests, learnt from the steps so far.

A prefill beside decoding requests makes all of them wait. What a token costs depends on the models and their devices,
so it is measured: a chunk may slow a decode step down by the configured factor and no more.
"""

from __future__ import annotations

SMALLEST_CHUNK = 16  # tokens; a prefill makes progress, however slow it is
FIRST_CHUNK = 64  # tokens, before anything is measured
PLAIN_EVERY = 8  # steps; one in so many is decode only, to measure its time
_KEPT_PLAIN, _KEPT_MIXED = 0.7, 0.9  # of the previous estimate, with each further step of the kind


class Pacer:
    """Sizes prefill chunks by measured step times, in seconds.

    Args:
        slowdown: allowed for a decode step by the prefill beside it; more than 1.
        most: tokens of the largest chunk.
    """

    def __init__(self, slowdown: float, most: int) -> None:
        self._slowdown = slowdown
        self._most = most
        self._decode_s: float | None = None
        self._extra_s, self._tokens = 0.0, 0.0  # of prefills, decayed alike: a ratio of sums is robust to noise
        self._num_mixed = 0  # since the last decode-only step

    @property
    def chunk(self) -> int:
        """Prompt tokens that a step may compute beside decodes, per replica; 0 for a decode-only step."""
        if self._num_mixed >= PLAIN_EVERY - 1:
            return 0
        if self._decode_s is None or self._tokens == 0.0:
            return min(FIRST_CHUNK, self._most)
        affordable = (self._slowdown - 1) * self._decode_s * self._tokens / max(self._extra_s, 1e-9)
        return min(max(SMALLEST_CHUNK, int(min(affordable, self._most))), self._most)

    def observe(self, seconds: float, num_prefill_tokens: int, *, maybe_cached: bool = False) -> None:
        """Record a step's time and the prompt tokens of its busiest replica; some may not have been computed."""
        if num_prefill_tokens == 0:
            self._num_mixed = 0
            known = seconds if self._decode_s is None else self._decode_s
            self._decode_s = _KEPT_PLAIN * known + (1 - _KEPT_PLAIN) * seconds
            return
        self._num_mixed += 1
        if self._decode_s is not None and not maybe_cached:
            self._extra_s = _KEPT_MIXED * self._extra_s + seconds - self._decode_s
            self._tokens = _KEPT_MIXED * self._tokens + num_prefill_tokens
