"""How far to guess ahead: as far as it has paid so far, for each request and for the batch as a whole.

A guess costs a draft forward and a row to verify, whatever becomes of it. What that is in seconds depends on models,
devices and batch, so it is measured: a step of each depth is timed, by batch size, and the depth is chosen that gives
most tokens a second at the requests' own acceptance. A depth that was not timed yet is believed to take what its draft
forwards take, corrected by what was seen of others. Now and then another depth is tried, less often the longer it does
not help.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eft_serve.coordinator.request import Request
from eft_serve.coordinator.speculation import NGRAM, look_up

DEPTHS = (0, 2, 3, 4, 6, 8, 12, 16)  # guesses at a time
LEAST_GAIN = 1.1  # times plain decoding; less is not worth what it is not known well enough
FIRST_ACCEPTANCE = 0.7  # believed of requests of which nothing is known
TRIAL_STEPS = 4  # of one trial; the first is not counted, since it ends what the depth before began
FIRST_TRIAL, LAST_TRIAL = 16, 256  # steps between two trials
GIVEN_ROWS = 32  # given tokens that a step scores of one request
LISTEN_EVERY = 8  # steps; without guesses, one of so many asks for one that costs no forward, to know what would stand
_KEPT = 0.8  # of a known time, with each further step
_KEPT_ACCEPTANCE = 0.98  # of a recipe's, with each guess that was put to the test
_OUTLIER = 2.0  # times what is known; more is not believed

_Load = tuple[int, bool]  # batch size in powers of two, and whether others are prefilled beside it


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
    """Seconds of a step under one load, by depth, and of a draft forward."""

    known: dict[int, float] = field(default_factory=dict)
    forward: float = 0.0

    def add(self, depth: int, seconds: float) -> None:
        known = self.known.get(depth, seconds)
        self.known[depth] = _KEPT * known + (1 - _KEPT) * min(seconds, _OUTLIER * known)

    def add_forward(self, seconds: float) -> None:
        known = self.forward or seconds
        self.forward = _KEPT * known + (1 - _KEPT) * min(seconds, _OUTLIER * known)

    def within_reach(self) -> list[int]:
        """Depths that were timed, and the next deeper one: costs that nobody has seen are approached step by step."""
        deepest = max(self.known)
        return [depth for depth in DEPTHS if depth <= deepest] + [depth for depth in DEPTHS if depth > deepest][:1]

    def expect(self, depth: int) -> float:
        """What is known, or what follows from it; a plain step has been timed."""
        if depth in self.known:
            return self.known[depth]
        below = max(known for known in self.known if known < depth)
        slope = max(0.0, self.known[below] - self.known[0]) / below if below else 0.0
        alone = max(self.known[0], depth * self.forward)  # had each model its own device, and were rows for nothing
        return max(alone, self.known[below] + slope * (depth - below))


class Speculator:
    """Asks requests' drafters for guesses. Everything belongs to the decode loop's thread."""

    def __init__(self) -> None:
        self._times: dict[_Load, _Times] = defaultdict(_Times)
        self._load: _Load = (0, False)  # of the present step
        self._acceptance: dict[str, float] = {}  # of a recipe's requests
        self._step = 0
        self._best = 0  # depth, as far as is known
        self._depth = 0  # of the present step
        self._held_for = 0  # steps in a row at this depth
        self._trial_every = FIRST_TRIAL
        self._trial_left = 0
        self._num_trials = 0
        self._is_pure = False  # the present step shows what its depth takes
        self._next_trial = FIRST_TRIAL
        self._least_chance = 0.0  # that a guess must have to stand, to be worth its time

    def plan(self, requests: Sequence[Request], *, beside_prefills: bool = False) -> None:
        """Say what each decoding request's drafter is asked for in this step; look up what the text itself guesses.

        Tokens that are given stand in for guesses: the last of them is not computed, only its logits are wanted.

        Args:
            requests: those that decode.
            beside_prefills: others are prefilled in the same step.
        """
        self._step += 1
        for request in requests:
            if request.is_given:
                request.guesses = request.next_given(GIVEN_ROWS)[:-1]
        requests = [request for request in requests if not request.is_given]
        adaptive = [r for r in requests if r.speculation.drafter and r.speculation.settings.num_tokens is None]
        if adaptive:
            self._load = ((len(requests) - 1).bit_length(), beside_prefills)
            self._choose(adaptive, len(requests))
            left_over = any(request.guesses for request in adaptive)
            self._is_pure = not left_over if self._depth == 0 else self._held_for > 0
        for request in requests:
            depth = request.speculation.settings.num_tokens
            self._ask(request, self._own_depth(request) if depth is None else depth)

    def observe(
        self,
        requests: Sequence[Request],
        seconds: float,
        forwards: Mapping[str, float],
        *,
        beside_prefills: bool = False,
    ) -> None:
        """A step took so long, and so long each model that was asked for guesses.

        Args:
            requests: those of the step that decode.
            seconds: from the first send to the last answer.
            forwards: by model, seconds of one of its forwards.
            beside_prefills: there were others after all.
        """
        if beside_prefills != self._load[1] or not any(
            request.speculation.settings.num_tokens is None for request in requests
        ):
            return
        times = self._times[self._load]
        for forward in forwards.values():
            times.add_forward(forward)
        if self._is_pure:
            times.add(self._depth, seconds)

    def learn(self, request: Request, num_accepted: int, num_tested: int) -> None:
        """What became of a request's guesses in one step. One that the drafter kept to itself did not stand either."""
        ran_out = request.speculation.is_short and num_accepted == len(request.guesses) > 0
        request.speculation.count(num_accepted, num_tested + ran_out)
        recipe = request.generation.recipe
        if num_tested := num_tested + ran_out:
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
        times = self._times[self._load]
        if 0 not in times.known:
            self._hold(0)
            return
        best = max(times.within_reach(), key=lambda depth: self._rate(requests, times, depth))
        if self._rate(requests, times, best) < LEAST_GAIN * self._rate(requests, times, 0):
            best = 0
        slope = (times.expect(best) - times.expect(0)) / best if best else 0.0
        self._least_chance = slope / batch * self._rate(requests, times, best)
        if best != self._best:
            self._best, self._trial_every = best, FIRST_TRIAL
            self._next_trial = min(self._next_trial, self._step + FIRST_TRIAL)
        if self._trial_left:
            self._trial_left -= 1
            self._hold(self._depth)
        elif self._step >= self._next_trial:
            self._hold(self._another(best))
            self._trial_left = TRIAL_STEPS - 1
            self._trial_every = min(LAST_TRIAL, 2 * self._trial_every)
            self._next_trial = self._step + self._trial_every
        else:
            self._hold(best)

    def _hold(self, depth: int) -> None:
        self._held_for = self._held_for + 1 if depth == self._depth else 0
        self._depth = depth

    def _rate(self, requests: Sequence[Request], times: _Times, depth: int) -> float:
        """Tokens a second."""
        return sum(self._tokens(request, depth) for request in requests) / times.expect(depth)

    def _tokens(self, request: Request, depth: int) -> float:
        return tokens_per_step(self._believed(request), depth, overlap=request.speculation.settings.overlap)

    def _believed(self, request: Request) -> float:
        return request.speculation.acceptance(self._acceptance.get(request.generation.recipe, FIRST_ACCEPTANCE))

    def _another(self, depth: int) -> int:
        """The next deeper one, the next shallower one and none, in turn."""
        self._num_trials += 1
        index, last = DEPTHS.index(depth), len(DEPTHS) - 1
        choices = [DEPTHS[min(index + 1, last)], DEPTHS[max(index - 1, 0)], 0]
        return next((c for c in choices[self._num_trials % 3 :] + choices if c != depth), depth)

    def _own_depth(self, request: Request) -> int:
        """The batch's depth, as far as the request's own guesses stand often enough to be worth their time."""
        if self._depth == 0:
            return int(self._step % LISTEN_EVERY == 0)
        acceptance = self._believed(request)
        worth = (depth for depth in range(self._depth, 1, -1) if acceptance**depth >= self._least_chance)
        return next(worth, 1)
