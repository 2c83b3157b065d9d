"""From drawn tokens to what a request's reader gets: text, finish reasons, failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eft_serve.coordinator.detokenizer import Detokenizer, StopChecker
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.vocabulary import Vocabulary
from eft_serve.errors import EftServeError, to_failure
from eft_serve.types import Delta, FinishReason


@dataclass(slots=True)
class OutputStream:
    """One request's output, token by token."""

    eos_token_ids: frozenset[int]
    max_tokens: int  # asked for, or what the shortest context leaves
    detokenizer: Detokenizer
    stop_checker: StopChecker
    num_tokens: int = 0

    @classmethod
    def of(cls, request: Request, vocabularies: list[Vocabulary]) -> OutputStream:
        """The first model that counts spells the text; the end token of any such model ends it, unless it is given."""
        sampling = request.generation.sampling
        counting = [pair for pair in zip(request.sequences, vocabularies, strict=True) if pair[0].term.counts]
        first, spelling = counting[0]
        eos = frozenset[int]().union(*(vocabulary.eos_token_ids for _, vocabulary in counting))
        return cls(
            eos_token_ids=frozenset() if sampling.ignore_eos or request.is_given else eos,
            max_tokens=request.max_tokens,
            detokenizer=Detokenizer.after_prompt(spelling, first.prompt_token_ids),
            stop_checker=StopChecker(() if request.is_given else sampling.stop),
        )

    def push_all(self, token_ids: Sequence[int]) -> Delta:
        """More tokens, as far as the first that ends the request; the delta has a finish reason then."""
        deltas = []
        for token_id in token_ids:
            deltas.append(self.push(token_id))
            if deltas[-1].finish_reason is not None:
                break
        if len(deltas) == 1:
            return deltas[0]
        return Delta(
            text="".join(delta.text for delta in deltas),
            token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
            finish_reason=deltas[-1].finish_reason,
        )

    def push(self, token_id: int) -> Delta:
        """One more token; the delta has a finish reason when it was the last."""
        self.num_tokens += 1
        if token_id in self.eos_token_ids:
            return Delta(text=self._rest(), token_ids=[token_id], finish_reason=FinishReason.STOP)
        text = self.stop_checker.push(self.detokenizer.push([token_id]))
        if self.stop_checker.stopped:
            return Delta(text=text, token_ids=[token_id], finish_reason=FinishReason.STOP)
        if self.num_tokens == self.max_tokens:
            text += self._rest()
            reason = FinishReason.STOP if self.stop_checker.stopped else FinishReason.LENGTH
            return Delta(text=text, token_ids=[token_id], finish_reason=reason)
        return Delta(text=text, token_ids=[token_id])

    def _rest(self) -> str:
        """What was kept back; a stop string may still be completed by it."""
        text = self.stop_checker.push(self.detokenizer.flush())
        return text if self.stop_checker.stopped else text + self.stop_checker.flush()


def failed(error: EftServeError) -> Delta:
    """The last delta of a request that a typed error ends."""
    return Delta(text="", token_ids=[], finish_reason=FinishReason.ERROR, failure=to_failure(error))
