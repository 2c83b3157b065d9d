"""From drawn tokens to what a request's reader gets: text, finish reasons, failures."""

from __future__ import annotations

from dataclasses import dataclass, field

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.coordinator.detokenizer import Detokenizer, StopChecker
from eft_serve.coordinator.request import Request
from eft_serve.errors import EftServeError, to_failure
from eft_serve.types import Delta, FinishReason, TokenComponents, Usage


@dataclass(slots=True)
class OutputStream:
    """One request's output, token by token."""

    eos_token_ids: frozenset[int]
    max_tokens: int  # asked for, or what the shortest context leaves
    detokenizer: Detokenizer
    stop_checker: StopChecker
    num_tokens: int = 0
    _pending_token_ids: list[int] = field(default_factory=list)
    _text: str = ""  # and not given out

    @classmethod
    def of(cls, request: Request, vocabularies: list[Vocabulary]) -> OutputStream:
        """The first model that counts detokenizes; any such model's end token ends it, unless tokens are forced."""
        sampling = request.generation.sampling
        counting = [pair for pair in zip(request.sequences, vocabularies, strict=True) if pair[0].term.counts]
        first, spelling = counting[0]
        eos = frozenset[int]().union(*(vocabulary.eos_token_ids for _, vocabulary in counting))
        return cls(
            eos_token_ids=frozenset() if sampling.ignore_eos or request.is_forced else eos,
            max_tokens=request.max_tokens,
            detokenizer=Detokenizer.after_prompt(spelling, first.prompt_token_ids),
            stop_checker=StopChecker(() if request.is_forced else sampling.stop),
        )

    def take(self, token_ids: list[int]) -> tuple[list[int], FinishReason | None]:
        """More tokens: those up to the one that ends the request, and why it does.

        Nothing is detokenized here, which can wait, but where a stop string might be the end.
        """
        for count, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            if token_id in self.eos_token_ids:
                return token_ids[:count], FinishReason.STOP
            self._pending_token_ids.append(token_id)
            is_last = self.num_tokens == self.max_tokens
            if self.stop_checker.stops:
                self._detokenize(is_last)
                if self.stop_checker.stopped:
                    return token_ids[:count], FinishReason.STOP
            if is_last:
                return token_ids[:count], FinishReason.LENGTH
        return token_ids, None

    def delta(
        self,
        token_ids: list[int],
        reason: FinishReason | None,
        components: list[TokenComponents] | None,
        usage: Usage | None,
    ) -> Delta:
        """What was taken, with the text that is certain by now and was not given out yet."""
        self._detokenize(is_last=reason is not None)
        text, self._text = self._text, ""
        return Delta(text=text, token_ids=token_ids, finish_reason=reason, components=components, usage=usage)

    def _detokenize(self, is_last: bool) -> None:
        token_ids, self._pending_token_ids = self._pending_token_ids, []
        if token_ids:
            self._text += self.stop_checker.push(self.detokenizer.push(token_ids))
        if is_last and not self.stop_checker.stopped:
            self._text += self.stop_checker.push(self.detokenizer.flush())
            if not self.stop_checker.stopped:  # by what was kept back
                self._text += self.stop_checker.flush()


def failed(error: EftServeError) -> Delta:
    """The last delta of a request that a typed error ends."""
    return Delta(text="", token_ids=[], finish_reason=FinishReason.ERROR, failure=to_failure(error))
