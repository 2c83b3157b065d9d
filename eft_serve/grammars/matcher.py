"""Outputs that follow a grammar: which tokens may come next, and when it is complete.

Knows tokens, and neither requests nor logits. Compiling and masking release the interpreter's lock, and both are
bounded, because a client may send any grammar.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import NoReturn, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from eft_serve.errors import InvalidRequestError
from eft_serve.types import Grammar

logger = logging.getLogger(__name__)

Bitmask = NDArray[np.int32]
T = TypeVar("T")
_Key = tuple[str, bool, str]

CACHED_GRAMMARS = 64
MAX_OWN_S = 0.05  # of compiling a grammar for one output, which others wait for
_SHOWN = 300  # characters of a reason


def _limits(step_max_items: int) -> LLParserLimits:
    return LLParserLimits(
        initial_lexer_fuel=500_000,  # 10 ms
        step_lexer_fuel=30_000,  # 2 ms
        step_max_items=step_max_items,  # 10 ms for a thousand
        max_lexer_states=20_000,  # 40 MB; of all outputs since it was compiled
        max_grammar_size=20_000,
        max_items_in_row=step_max_items,  # so that an object of too many optional properties is refused at once
        verbose_errors=False,  # they would show other parts of the grammar
    )


_SCHEMA_LIMITS, _LIMITS = _limits(15_000), _limits(1_000)  # schemas are hardly ambiguous; other grammars may be


def limits_of(grammar: Grammar) -> LLParserLimits:
    """What compiling and following it may take."""
    return _SCHEMA_LIMITS if grammar.of_schemas else _LIMITS


def _key(grammar: Grammar) -> _Key:
    """What decides how it is compiled, and with whom that is shared."""
    return grammar.definition, grammar.of_schemas, grammar.salt


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A grammar over the tokens of one tokenizer."""

    matcher: LLMatcher  # at the beginning; only its copies follow outputs
    seconds: float  # that it took


class GrammarTokenizer:
    """The tokens of one tokenizer, as grammars see them; thread-safe. Special tokens are in no text.

    Args:
        tokenizer_json: what `tokenizers` saves.

    Raises:
        ValueError: it is of a kind whose tokens have no known bytes.
    """

    def __init__(self, tokenizer_json: str) -> None:
        described = json.loads(tokenizer_json)
        # llguidance needs an end token, and allows it where a text is complete. Which tokens end an output is up to
        # its request, so this one is none of the model's.
        end = self._end = 1 + max(_ids(described))
        described["added_tokens"] = [*described.get("added_tokens", ()), _special(end)]
        self._tokenizer = LLTokenizer(json.dumps(described), eos_token=end)
        self.num_words = -(-self._tokenizer.vocab_size // 32)
        self._compiled: OrderedDict[_Key, _Compiled] = OrderedDict()  # least recently used first
        self._lock = Lock()

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the beginning of the output.

        Raises:
            InvalidRequestError: the grammar is wrong, too complex or has no text.
        """
        return GrammarMatcher(self, grammar)

    def has_compiled(self, grammar: Grammar) -> bool:
        """Whether a matcher of it is to be had at once."""
        return _key(grammar) in self._compiled

    def compiled(self, grammar: Grammar) -> _Compiled:
        """The grammar, compiled now or before; raises as `matcher`."""
        with self._lock:
            compiled = self._compiled.pop(_key(grammar), None)
        if compiled is None:
            started = time.perf_counter()
            compiled = _Compiled(self.compile(grammar), time.perf_counter() - started)
        with self._lock:
            self._compiled[_key(grammar)] = compiled
            while len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return compiled

    def forget(self, grammar: Grammar, compiled: _Compiled) -> None:
        """Compile the grammar anew the next time, unless that was done since."""
        with self._lock:
            if self._compiled.get(_key(grammar)) is compiled:
                del self._compiled[_key(grammar)]

    def compile(self, grammar: Grammar) -> LLMatcher:
        """At the beginning of the output, and sharing nothing; raises as `matcher`."""
        compiled = LLMatcher(self._tokenizer, grammar.definition, log_level=0, limits=limits_of(grammar))
        if not compiled.is_error():
            compiled.compute_bitmask()  # some limits show here only
        if compiled.is_error():
            raise _unusable(grammar.param, compiled)
        first = self._first_token(compiled)
        if first is None:
            raise InvalidRequestError(f"{grammar.param}: it allows no text", param=grammar.param)
        tried = compiled.deep_copy()
        tried.try_consume_tokens([first])
        tried.rollback(1)  # behind draft tokens; not all that Lark's notation can say allows that
        if tried.is_error():
            raise _unusable(grammar.param, tried)
        return compiled

    def _first_token(self, compiled: LLMatcher) -> int | None:
        """One that may come at the beginning of the output."""
        if compiled.is_stopped():
            return None
        octets = np.frombuffer(compiled.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(octets, bitorder="little")[: self._end].nonzero()[0]
        return int(allowed[0]) if len(allowed) else None


class NoGrammars:
    """In the place of a tokenizer whose tokens have no known bytes."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def has_compiled(self, grammar: Grammar) -> bool:
        """Raises `InvalidRequestError`."""
        self.matcher(grammar)

    def matcher(self, grammar: Grammar) -> NoReturn:
        """Raises `InvalidRequestError`."""
        message = f"{grammar.param}: not supported with this model's tokenizer: {self._reason}"
        raise InvalidRequestError(message, param=grammar.param)


@lru_cache(maxsize=16)  # models of a recipe have equal tokenizers
def load_grammar_tokenizer(tokenizer_json: str) -> GrammarTokenizer | NoGrammars:
    """As grammars see it; see `GrammarTokenizer`."""
    try:
        return GrammarTokenizer(tokenizer_json)
    except ValueError as error:
        logger.warning("no structured output with this tokenizer: %s", error)
        return NoGrammars(str(error)[:_SHOWN])


class GrammarMatcher:
    """Follows one output; not thread-safe. An output that it no longer allows is not followed further.

    Copies of a compiled grammar share its lexer, whose states are limited, and outputs of other requests use them up.
    Then the grammar is compiled for this output alone.

    Raises:
        InvalidRequestError: as `GrammarTokenizer.matcher`.
    """

    def __init__(self, tokenizer: GrammarTokenizer, grammar: Grammar) -> None:
        self._tokenizer, self._grammar = tokenizer, grammar
        self._compiled = tokenizer.compiled(grammar)
        self._matcher = self._compiled.matcher.deep_copy()
        self._token_ids: list[int] = []  # followed so far
        self._is_own = False  # whether no other output uses its lexer

    @property
    def num_tokens(self) -> int:
        """Tokens followed so far."""
        return len(self._token_ids)

    @property
    def is_complete(self) -> bool:
        """Whether the output may end here."""
        return self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether it has to end here, because nothing may follow."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def advance(self, token_ids: Iterable[int]) -> int:
        """Follow these tokens, up to the first that is not allowed; returns how many were.

        Raises:
            InvalidRequestError: the grammar is too complex here.
        """
        token_ids = [*token_ids]

        def consume(matcher: LLMatcher) -> int:
            count: int = matcher.try_consume_tokens(token_ids)
            if count < len(token_ids) and not matcher.is_stopped():
                matcher.compute_bitmask()  # a lexer without states refuses tokens, and says why here only
            return count

        count = self._of_usable(consume)
        self._token_ids += token_ids[:count]
        return count

    def go_back(self, num_tokens: int) -> None:
        """Forget the last tokens."""
        if num_tokens:
            del self._token_ids[-num_tokens:]
            self._matcher.rollback(num_tokens)
            if self._matcher.is_error():
                self._compile_own()

    def follow(self, token_ids: Sequence[int]) -> bool:
        """Go to the end of this output from wherever it is; returns whether all of it is allowed.

        Raises:
            InvalidRequestError: the grammar is too complex here.
        """
        token_ids = [*token_ids]
        done = self._token_ids
        if token_ids[: len(done)] != done:
            same = next((i for i, (a, b) in enumerate(zip(done, token_ids, strict=False)) if a != b), len(token_ids))
            self.go_back(len(done) - same)
        rest = token_ids[self.num_tokens :]
        return self.advance(rest) == len(rest)

    def allowed(self) -> Bitmask:
        """Which tokens may come next, one bit for each, lowest first; no bit for end tokens.

        Raises:
            InvalidRequestError: the grammar is too complex here.
        """
        bitmask = np.zeros(self._tokenizer.num_words, np.int32)

        def compute(matcher: LLMatcher) -> None:
            if not matcher.is_stopped():
                matcher.unsafe_compute_mask_ptr(bitmask.ctypes.data, bitmask.nbytes)

        self._of_usable(compute)
        return bitmask

    def _of_usable(self, act: Callable[[LLMatcher], T]) -> T:
        """What a matcher gives that did not fail meanwhile."""
        result = act(self._matcher)
        if self._matcher.is_error():
            self._compile_own()
            result = act(self._matcher)
        if self._matcher.is_error():
            raise _unusable(self._grammar.param, self._matcher)
        return result

    def _compile_own(self) -> None:
        """Be at the same place again, with a lexer of its own."""
        self._tokenizer.forget(self._grammar, self._compiled)
        if self._is_own or self._compiled.seconds > MAX_OWN_S:
            raise _unusable(self._grammar.param, self._matcher)
        self._is_own, self._matcher = True, self._tokenizer.compile(self._grammar)
        self._matcher.try_consume_tokens(self._token_ids)


def _unusable(param: str, matcher: LLMatcher) -> InvalidRequestError:
    reason = matcher.get_error().partition("\n<non-verbose/>")[0].strip()[:_SHOWN]
    return InvalidRequestError(f"{param}: cannot be used: {reason}", param=param)


def _ids(described: dict[str, object]) -> Iterable[int]:
    """Of all tokens in a `tokenizer.json`."""
    model: dict[str, object] = described["model"]  # type: ignore[assignment]
    vocabulary: object = model["vocab"]
    yield from vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))  # type: ignore[arg-type]
    for token in described.get("added_tokens", ()):  # type: ignore[attr-defined]
        yield token["id"]


def _special(token_id: int) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": "<|end of grammar|>", "special": True, **flags}
