"""Matchers of many outputs over one tokenizer."""

from __future__ import annotations

import random

import pytest
from tokenizer_files import byte_level

from eft_serve.errors import InvalidRequestError
from eft_serve.grammars.definitions import of_grammar, of_regex
from eft_serve.grammars.matcher import GrammarMatcher, GrammarTokenizer
from eft_serve.types import Grammar

LETTERS = "abc"
MANY_STATES = Grammar(of_regex("[abc]*a[abc]{18}b[abc]*"), "structured_outputs.regex")  # after 19 letters, 2^19


def follow(matcher: GrammarMatcher, seed: int, num_tokens: int) -> None:
    rng = random.Random(seed)
    for _ in range(num_tokens):
        assert matcher.allowed()[0] & 7 == 7
        assert matcher.advance([rng.randrange(len(LETTERS))]) == 1


def test_outputs_before_do_not_use_up_the_states_of_the_next_one() -> None:
    tokenizer = GrammarTokenizer(byte_level(list(LETTERS)))
    for seed in range(50):
        follow(tokenizer.matcher(MANY_STATES), seed, 1000)


def test_outputs_at_the_same_time_do_not_use_up_one_another_s_states() -> None:
    tokenizer = GrammarTokenizer(byte_level(list(LETTERS)))
    matchers = [tokenizer.matcher(MANY_STATES) for _ in range(50)]
    for chunk in range(10):
        for place, matcher in enumerate(matchers):
            follow(matcher, 100 * place + chunk, 100)
            assert matcher.num_tokens == 100 * (chunk + 1)


def test_states_that_another_output_used_up_between_mask_and_token_refuse_no_token() -> None:
    tokenizer = GrammarTokenizer(byte_level(list(LETTERS)))
    matcher = tokenizer.matcher(MANY_STATES)
    follow(matcher, 0, 3)
    matcher.allowed()
    with pytest.raises(InvalidRequestError):
        follow(tokenizer.matcher(MANY_STATES), 1, 20_000)
    assert matcher.advance([0, 1]) == 2
    assert matcher.num_tokens == 5


def test_an_output_that_uses_up_the_states_alone_is_an_error_that_says_so() -> None:
    tokenizer = GrammarTokenizer(byte_level(list(LETTERS)))
    with pytest.raises(InvalidRequestError, match="too many") as caught:
        follow(tokenizer.matcher(MANY_STATES), 0, 20_000)
    assert caught.value.param == "structured_outputs.regex"
    follow(tokenizer.matcher(MANY_STATES), 1, 100)


@pytest.mark.parametrize("attribute", ["max_tokens=3", 'stop="c"'])
def test_a_grammar_that_draft_tokens_cannot_be_taken_back_from_is_refused_at_once(attribute: str) -> None:
    tokenizer = GrammarTokenizer(byte_level(list(LETTERS)))
    with pytest.raises(InvalidRequestError, match="rollback not supported"):
        tokenizer.matcher(Grammar(f"start: x\nx[{attribute}]: /[ab]+/", "structured_outputs.grammar"))
    tokenizer.matcher(Grammar('start: x\nx[suffix="c"]: /[ab]+/', "structured_outputs.grammar"))


def test_a_rule_s_own_temperature_is_refused_and_not_ignored() -> None:
    with pytest.raises(ValueError, match="temperature"):
        of_grammar("start: x\nx[capture, temperature=0.5]: /[ab]+/")
    assert of_grammar('start: "[temperature=1]"')


def test_options_of_a_grammar_that_would_change_which_tokens_are_allowed_are_refused() -> None:
    with pytest.raises(ValueError, match="%llguidance"):
        of_grammar('%llguidance {"no_forcing": false}\nstart: "ab"')
    assert of_grammar('start: "%llguidance"')


def test_a_grammar_does_not_get_the_limits_of_a_schema_of_the_same_text() -> None:
    tokenizer = GrammarTokenizer(byte_level(list(LETTERS)))
    ambiguous = 'start: e\ne: e e | "a" | e "a" e | e e e'

    def repeat(matcher: GrammarMatcher) -> None:
        for _ in range(200):
            matcher.allowed()
            assert matcher.advance([0]) == 1

    tokenizer.matcher(Grammar(ambiguous, "p", of_schemas=True))
    with pytest.raises(InvalidRequestError, match="limit 1000"):
        repeat(tokenizer.matcher(Grammar(ambiguous, "p")))


def test_tenants_do_not_share_what_was_compiled() -> None:
    tokenizer = GrammarTokenizer(byte_level(list(LETTERS)))
    grammars = [Grammar('start: "ab"', "p", salt=salt) for salt in ("one", "two")]
    tokenizer.matcher(grammars[0])
    assert [tokenizer.has_compiled(grammar) for grammar in grammars] == [True, False]
