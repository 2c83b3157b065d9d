"""From sampled tokens to a request's deltas: text, finish reasons, failures."""

from __future__ import annotations

from dataclasses import dataclass, field

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.coordinator.detokenizer import Detokenizer, StopChecker
from eft_serve.coordinator.request import Request
from eft_serve.errors import EftServeError, to_failure
from eft_serve.types import Delta, FinishReason, TokenComponents, Usage


@dataclass(slots=True)
class OutputStream:
    """One request's output, token by token. Its methods raise what the tokenizer raises."""

    eos_token_ids: frozenset[int]
    max_tokens: int  # as requested, or what the shortest context leaves
    detokenizer: Detokenizer
    stop_checker: StopChecker
    num_tokens: int = 0
    _pending_token_ids: list[int] = field(default_factory=list)
    _text: str = ""  # detokenized and not emitted

    @classmethod
    def of(cls, request: Request, vocabularies: list[Vocabulary]) -> OutputStream:
        """The first term with a coefficient detokenizes; any such term's end token ends the output, unless forced."""
        sampling = request.generation.sampling
        counting = [pair for pair in zip(request.sequences, vocabularies, strict=True) if pair[0].term.counts]
        first, vocabulary = counting[0]
        eos = frozenset[int]().union(*(v.eos_token_ids for _, v in counting))
        return cls(
            eos_token_ids=frozenset() if sampling.ignore_eos or request.is_forced else eos,
            max_tokens=request.max_tokens,
            detokenizer=Detokenizer.after_prompt(vocabulary, first.prompt_token_ids),
            stop_checker=StopChecker(() if request.is_forced else sampling.stop),
        )

    def take(self, token_ids: list[int]) -> tuple[list[int], FinishReason | None]:
        """Append tokens; returns them up to the one that ends the request, and the finish reason.

        Detokenizes if the request has stop strings, or ends; otherwise `delta` does it later.
        """
        for count, token_id in enumerate(token_ids, start=1):
            if (reason := self._append(token_id)) is not None:
                self._detokenize(is_last=True)
                return token_ids[:count], reason
        return token_ids, None

    def _append(self, token_id: int) -> FinishReason | None:
        is_last = self.num_tokens + 1 == self.max_tokens
        if token_id not in self.eos_token_ids:
            self._pending_token_ids.append(token_id)
            if self.stop_checker.stops:
                self._detokenize(is_last)
        self.num_tokens += 1
        if token_id in self.eos_token_ids or self.stop_checker.stopped:
            return FinishReason.STOP
        return FinishReason.LENGTH if is_last else None

    def delta(
        self,
        token_ids: list[int],
        reason: FinishReason | None,
        components: list[TokenComponents] | None,
        usage: Usage | None,
    ) -> Delta:
        """These tokens, with the text that can no longer change and was not emitted yet."""
        self._detokenize(is_last=False)
        text, self._text = self._text, ""
        return Delta(text=text, token_ids=token_ids, finish_reason=reason, components=components, usage=usage)

    def _detokenize(self, is_last: bool) -> None:
        token_ids, self._pending_token_ids = self._pending_token_ids, []
        if token_ids:
            self._text += self.stop_checker.push(self.detokenizer.push(token_ids))
        if is_last and not self.stop_checker.stopped:
            self._text += self.stop_checker.push(self.detokenizer.flush())
            if not self.stop_checker.stopped:  # by the text that was kept back
                self._text += self.stop_checker.flush()
        self._text.encode()  # raises where a tokenizer gave half of a surrogate pair, which could not be sent


def failed(error: EftServeError) -> Delta:
    """The last delta of a request that ends with a typed error."""
    return Delta(text="", token_ids=[], finish_reason=FinishReason.ERROR, failure=to_failure(error))
