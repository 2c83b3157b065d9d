"""The grammars that draft tokens follow, so that a coordinator may accept them.

Compiled beside the engine's thread: until that is done, and where it is impossible, a sequence has no draft tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from eft_serve.engine.kv_cache import Sequence
from eft_serve.errors import InvalidRequestError
from eft_serve.grammars.matcher import GrammarMatcher, GrammarTokenizer, NoGrammars, load_grammar_tokenizer
from eft_serve.types import Draft, Grammar

MAX_MATCHERS = 1024


@dataclass(frozen=True, slots=True)
class _Compiling:
    """A sequence's matcher, once it is compiled."""

    definition: str
    matcher: Future[GrammarMatcher | None]  # None: there is none


class DraftGrammars:
    """The matchers of the sequences that draft; the least recently used ones are dropped.

    Args:
        read_tokenizer: gives the model's `tokenizer.json`.
    """

    def __init__(self, read_tokenizer: Callable[[], str]) -> None:
        self._read_tokenizer = read_tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft-grammars")
        self._matchers: OrderedDict[str, _Compiling] = OrderedDict()  # by sequence

    def matcher(self, sequence: Sequence, draft: Draft) -> GrammarMatcher | None:
        """At the end of the output of which the sequence's tokens are prompt and beginning; None: not to be had now."""
        grammar = draft.sampling.grammar
        assert grammar is not None
        found = self._matchers.pop(sequence.sequence_id, None)
        if found is None or found.definition != grammar.definition:
            found = _Compiling(grammar.definition, self._thread.submit(self._compile, grammar))
        self._matchers[sequence.sequence_id] = found
        while len(self._matchers) > MAX_MATCHERS:
            self._matchers.popitem(last=False)[1].matcher.cancel()
        matcher = found.matcher.result() if found.matcher.done() else None
        output = sequence.token_ids[sequence.num_computed_tokens - draft.position :]
        try:
            return matcher if matcher is not None and matcher.follow(output) else None
        except InvalidRequestError:  # too complex here, as the coordinator will find and say
            return None

    def free(self, sequence_id: str) -> None:
        """Drop the matcher of a sequence, if it has one."""
        if (found := self._matchers.pop(sequence_id, None)) is not None:
            found.matcher.cancel()

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _tokenizer(self) -> GrammarTokenizer | NoGrammars:
        return load_grammar_tokenizer(self._read_tokenizer())

    def _compile(self, grammar: Grammar) -> GrammarMatcher | None:
        try:
            return self._tokenizer.matcher(grammar)
        except (InvalidRequestError, OSError):  # the coordinator says what is wrong with it
            return None
