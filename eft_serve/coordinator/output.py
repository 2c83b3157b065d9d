"""From sampled tokens to a request's deltas: text, finish reasons, failures."""

from __future__ import annotations

from dataclasses import dataclass, field

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.coordinator.controls import end_token_ids
from eft_serve.coordinator.detokenizer import Decoder, Detokenizer, StopChecker
from eft_serve.coordinator.request import Request
from eft_serve.errors import EftServeError, InvalidRequestError, to_failure
from eft_serve.grammars.matcher import GrammarMatcher
from eft_serve.types import Delta, FinishReason, Resumption, TokenComponents, Usage


@dataclass(slots=True)
class OutputStream:
    """One request's output, token by token. Its methods raise what the tokenizer raises."""

    end_token_ids: frozenset[int]
    min_tokens: int  # stop strings do not count in the text of these
    max_tokens: int  # as requested, or what the shortest context leaves
    detokenizer: Detokenizer
    stop_checker: StopChecker
    matcher: GrammarMatcher | None = None  # of the grammar that ends it
    shows_end: bool = False  # the text of the token that ends the output is part of it
    num_tokens: int = 0
    _pending_token_ids: list[int] = field(default_factory=list)
    _text: str = ""  # detokenized and not emitted

    @classmethod
    def of(cls, request: Request, vocabularies: list[Vocabulary]) -> OutputStream:
        """The first term with a coefficient detokenizes; nothing but its length ends a forced output."""
        sampling = request.generation.sampling
        pairs = zip(request.sequences, vocabularies, strict=True)
        first, vocabulary = next(pair for pair in pairs if pair[0].term.counts)
        scored = request.forced_token_ids[: request.num_scored]
        decoder: Decoder = vocabulary if sampling.skip_special_tokens else vocabulary.with_special_tokens
        if sampling.skip_special_tokens and sampling.shown_special_token_ids:
            decoder = vocabulary.with_special_tokens_of(sampling.shown_special_token_ids)
        stream = cls(
            end_token_ids=end_token_ids(request, vocabularies),
            min_tokens=sampling.min_tokens,
            max_tokens=request.max_tokens - request.num_scored,
            detokenizer=Detokenizer.after_prompt(decoder, [*first.prompt_token_ids, *scored]),
            stop_checker=StopChecker(() if request.is_forced else sampling.stop, sampling.include_stop_str_in_output),
            matcher=request.matcher,
            shows_end=sampling.include_stop_str_in_output,
        )
        if (resumed := request.generation.resumption) is not None:
            stream._resume(resumed)
        return stream

    def _resume(self, resumed: Resumption) -> None:
        """Take what was generated before; its text was emitted so far."""
        _, reason = self.take(resumed.token_ids)
        self._detokenize(is_last=False)
        if reason is not None or len(self._text) < resumed.num_characters:
            raise InvalidRequestError("resumption: is not the beginning of this output", param="resumption")
        self._text = self._text[resumed.num_characters :]

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
        is_end, is_last = token_id in self.end_token_ids, self.num_tokens + 1 == self.max_tokens
        if not is_end or self.shows_end:
            self._pending_token_ids.append(token_id)
            if self.stop_checker.stops and not is_end:
                self._detokenize(is_last)
        self.num_tokens += 1
        if is_end or self.stop_checker.stopped or self._completes(token_id):
            return FinishReason.STOP
        return FinishReason.LENGTH if is_last else None

    def _completes(self, token_id: int) -> bool:
        """Whether the grammar allows nothing after this token."""
        if self.matcher is None:
            return False
        self.matcher.advance([token_id])
        return self.matcher.is_finished and self.num_tokens >= self.min_tokens

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
            text = self.detokenizer.push(token_ids)
            self._text += self.stop_checker.push(text) if self.num_tokens >= self.min_tokens else text
        if is_last and not self.stop_checker.stopped:
            self._text += self.stop_checker.push(self.detokenizer.flush())
            if not self.stop_checker.stopped:  # by the text that was kept back
                self._text += self.stop_checker.flush()
        self._text.encode()  # raises where a tokenizer gave half of a surrogate pair, which could not be sent


def failed(error: EftServeError) -> Delta:
    """The last delta of a request that ends with a typed error."""
    return Delta(text="", token_ids=[], finish_reason=FinishReason.ERROR, failure=to_failure(error))
