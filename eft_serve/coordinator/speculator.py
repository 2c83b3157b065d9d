"""How far to guess ahead: as far as it has paid so far, for each request and for the batch as a whole.

A guess costs a draft forward and a row to verify, whatever becomes of it. What that is in seconds depends on models,
devices and batch, so it is measured: a step of each depth is timed, by batch size, and the depth is chosen that gives
most tokens a second at the requests' own acceptance. Now and then a neighbouring depth is tried, less often the longer
it does not help.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from eft_serve.coordinator.request import Request
from eft_serve.coordinator.speculation import NGRAM, look_up

DEPTHS = (0, 2, 3, 4, 6, 8, 12, 16)  # guesses at a time
FIRST_ACCEPTANCE = 0.7  # believed of requests of which nothing is known
TRIAL_STEPS = (
    4  # a depth is tried for so many steps, the first of which is not counted: it ends what the last one began
)
FIRST_TRIAL, LAST_TRIAL = 16, 256  # steps between two trials
LISTEN_EVERY = 8  # steps; without guesses, one of so many asks for one that costs no forward, to know what would stand
FIRST_SLOPE = 0.1  # believed cost of a guess, of a plain step
_KEPT = 0.8  # of a known time, with each further step
_KEPT_ACCEPTANCE = 0.98  # of a recipe's, with each guess that was put to the test
_OUTLIER = 2.0  # times what is known; more is not believed


def tokens_per_step(acceptance: float, depth: int, *, overlap: bool) -> float:
    """Expected tokens of a request's step in the long run.

    With overlap a step verifies the guesses left from the one before, `depth - 1` of them if all stood and else none.
    Without it, a step that guesses is followed by one that only verifies, if the first guess stood.
    """
    if depth == 0:
        return 1.0
    a = acceptance
    verified = sum(a**i for i in range(depth))
    if not overlap:
        return (1 + a * verified) / (1 + a)
    full = a / (1 + a - a**depth)  # how often a step has guesses to verify
    return full * verified + (1 - full)


@dataclass(slots=True)
class _Times:
    """Seconds of a step at one batch size, by depth."""

    known: dict[int, float] = field(default_factory=dict)

    def add(self, depth: int, seconds: float) -> None:
        known = self.known.get(depth, seconds)
        self.known[depth] = _KEPT * known + (1 - _KEPT) * min(seconds, _OUTLIER * known)

    def expect(self, depth: int) -> float:
        """What is known, or goes on straight from what is."""
        if depth in self.known:
            return self.known[depth]
        plain = self.known.get(0) or min(self.known.values(), default=1.0)
        others = [(d, t) for d, t in self.known.items() if d > 0]
        if not others:
            return plain * (1 + FIRST_SLOPE * depth)
        nearest, seconds = min(others, key=lambda item: abs(item[0] - depth))
        return plain + max(0.0, seconds - plain) * depth / nearest


class Speculator:
    """Asks requests' drafters for guesses. Everything belongs to the decode loop's thread."""

    def __init__(self) -> None:
        self._times: dict[int, _Times] = defaultdict(_Times)  # by batch size, in powers of two
        self._acceptance: dict[str, float] = {}  # of a recipe's requests
        self._step = 0
        self._depth = 0  # of the present step
        self._held_for = 0  # steps in a row at this depth
        self._trial_every = FIRST_TRIAL
        self._trial_left = 0
        self._trial_up = True
        self._next_trial = FIRST_TRIAL
        self._least_chance = 0.0  # that a guess must have to stand, to be worth its time

    def plan(self, requests: Sequence[Request]) -> None:
        """Say what each decoding request's drafter is asked for in this step; look up what the text itself guesses."""
        self._step += 1
        adaptive = [r for r in requests if r.speculation.drafter and r.speculation.settings.num_tokens is None]
        if adaptive:
            self._choose(adaptive, len(requests))
        for request in requests:
            depth = request.speculation.settings.num_tokens
            self._ask(request, self._own_depth(request) if depth is None else depth)

    def observe(self, requests: Sequence[Request], seconds: float) -> None:
        """A step of decoding requests alone took so long."""
        if self._held_for > 1 and any(r.speculation.settings.num_tokens is None for r in requests):
            self._times[_bucket(len(requests))].add(self._depth, seconds)

    def learn(self, request: Request, num_accepted: int, num_tested: int) -> None:
        """What became of a request's guesses in one step."""
        request.speculation.count(num_accepted, num_tested)
        recipe = request.generation.recipe
        if num_tested:
            known, kept = self._acceptance.get(recipe, FIRST_ACCEPTANCE), _KEPT_ACCEPTANCE**num_tested
            self._acceptance[recipe] = kept * known + (1 - kept) * num_accepted / num_tested

    def _ask(self, request: Request, depth: int) -> None:
        speculation, num_guesses = request.speculation, len(request.guesses)
        speculation.num_asked = 0
        if speculation.drafter == NGRAM and not num_guesses and depth:
            tokens = [*request.sequences[0].prompt_token_ids, *request.output_token_ids]
            found = look_up(tokens, min(depth, request.num_left - 1))
            request.guesses = [t for t in found if t < request.num_ids]
            speculation.count_drafted(len(request.guesses))
        elif speculation.drafter not in (None, NGRAM) and (speculation.settings.overlap or not num_guesses):
            speculation.num_asked = max(0, min(depth, request.num_left - num_guesses))

    def _choose(self, requests: Sequence[Request], batch: int) -> None:
        times = self._times[_bucket(batch)]
        best = max(DEPTHS, key=lambda depth: self._rate(requests, times, depth))
        slope = (times.expect(best) - times.expect(0)) / best if best else 0.0
        self._least_chance = slope / batch * self._rate(requests, times, best)
        depth = best
        if self._trial_left:
            self._trial_left -= 1
            depth = self._depth
        elif self._step >= self._next_trial:
            depth = self._neighbour(best)
            self._trial_left = TRIAL_STEPS - 1
            self._next_trial = self._step + self._trial_every
            self._trial_every = min(LAST_TRIAL, 2 * self._trial_every)
        elif best != self._depth:
            self._trial_every = FIRST_TRIAL
        self._held_for = self._held_for + 1 if depth == self._depth else 0
        self._depth = depth

    def _rate(self, requests: Sequence[Request], times: _Times, depth: int) -> float:
        """Tokens a second."""
        return sum(self._tokens(request, depth) for request in requests) / times.expect(depth)

    def _tokens(self, request: Request, depth: int) -> float:
        return tokens_per_step(self._believed(request), depth, overlap=request.speculation.settings.overlap)

    def _believed(self, request: Request) -> float:
        return request.speculation.acceptance(self._acceptance.get(request.generation.recipe, FIRST_ACCEPTANCE))

    def _neighbour(self, depth: int) -> int:
        index = DEPTHS.index(depth) + (1 if self._trial_up else -1)
        self._trial_up = not self._trial_up
        return DEPTHS[min(max(index, 0), len(DEPTHS) - 1)] if 0 <= index < len(DEPTHS) else DEPTHS[1]

    def _own_depth(self, request: Request) -> int:
        """The batch's depth, as far as the request's own guesses stand often enough to be worth their time."""
        if self._depth == 0:
            return int(self._step % LISTEN_EVERY == 0)
        acceptance = self._believed(request)
        worth = (depth for depth in range(self._depth, 1, -1) if acceptance**depth >= self._least_chance)
        return next(worth, 1)


def _bucket(batch: int) -> int:
    return batch.bit_length() if batch & (batch - 1) else batch.bit_length() - 1
