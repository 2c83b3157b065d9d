"""The grammars that draft tokens follow, so that a coordinator may accept them.

Compiled beside the engine's thread: until that is done, and where it is impossible, a sequence has no draft tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

from eft_serve.engine.kv_cache import Sequence
from eft_serve.errors import InvalidRequestError
from eft_serve.grammars.matcher import GrammarMatcher, GrammarTokenizer, NoGrammars, load_grammar_tokenizer
from eft_serve.types import Draft, Grammar

MAX_MATCHERS = 1024


class DraftGrammars:
    """The matchers of the sequences that draft; the least recently used ones are dropped.

    Args:
        read_tokenizer: gives the model's `tokenizer.json`.
    """

    def __init__(self, read_tokenizer: Callable[[], str]) -> None:
        self._read_tokenizer = read_tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft-grammars")
        self._matchers: OrderedDict[tuple[str, str], Future[GrammarMatcher | None]] = OrderedDict()

    def matcher(self, sequence: Sequence, draft: Draft) -> GrammarMatcher | None:
        """At the end of the output of which the sequence's tokens are prompt and beginning; None: not to be had now."""
        grammar = draft.sampling.grammar
        assert grammar is not None
        key = sequence.sequence_id, grammar.definition
        found = self._matchers.pop(key, None) or self._thread.submit(self._compile, grammar)
        self._matchers[key] = found
        while len(self._matchers) > MAX_MATCHERS:
            self._matchers.popitem(last=False)
        matcher = found.result() if found.done() else None
        output = sequence.token_ids[sequence.num_computed_tokens - draft.position :]
        try:
            return matcher if matcher is not None and matcher.follow(output) else None
        except InvalidRequestError:  # too complex here, as the coordinator will find and say
            return None

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
