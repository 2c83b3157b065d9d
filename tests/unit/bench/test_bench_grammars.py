"""The vocabulary and the documents with which benchmarks measure grammars."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest

from eft_serve.bench import documents
from eft_serve.bench.coordinator import GRAMMAR, SIDES, measure, summarize
from eft_serve.bench.word_vocabulary import Words, token_texts
from eft_serve.grammars.matcher import GrammarMatcher, load_grammar_tokenizer

NUM_TOKENS = 4000
TEXTS = list(islice(token_texts(), NUM_TOKENS))


def matcher(number: int) -> GrammarMatcher:
    tokenizer = load_grammar_tokenizer(Words(NUM_TOKENS).tokenizer_json)
    return tokenizer.matcher(documents.grammar(number))


def random_document(number: int, num_tokens: int) -> tuple[bytes, GrammarMatcher]:
    """The beginning of one, of tokens that are drawn among the allowed ones, and the matcher behind it."""
    rng, following, text = random.Random(number), matcher(number), b""
    for _ in range(num_tokens):
        allowed = np.flatnonzero(np.unpackbits(following.allowed().view(np.uint8), bitorder="little"))
        token_id = int(rng.choice(allowed))
        assert following.advance([token_id]) == 1
        text += TEXTS[token_id]
    return text, following


def test_a_vocabulary_has_every_byte_and_as_many_different_texts_as_it_is_asked_for() -> None:
    assert TEXTS[:256] == [bytes([byte]) for byte in range(256)]
    assert len(set(TEXTS)) == NUM_TOKENS
    assert list(islice(token_texts(), NUM_TOKENS)) == TEXTS
    words = list(islice(token_texts(), 20_000))[NUM_TOKENS:]
    assert 0.3 < sum(text.startswith(b" ") for text in words) / len(words) < 0.6


def test_grammars_see_the_texts_of_tokens() -> None:
    text = b'[{"name":"'
    following = matcher(0)
    assert following.advance(TEXTS.index(bytes([byte])) for byte in text) == len(text)
    assert following.advance([TEXTS.index(b"\n")]) == 0
    assert following.advance([TEXTS.index(b" " * 16)]) == 1


@pytest.mark.parametrize("number", range(16))
def test_no_document_ends_within_a_thousand_tokens(number: int) -> None:
    text, following = random_document(number, 1000)
    assert text.startswith(b"[[" if number % 2 else b"[{")
    assert not following.is_complete
    assert not following.is_finished


def test_documents_of_different_numbers_are_at_different_places() -> None:
    masks = [random_document(number, 5)[1].allowed() for number in range(16)]
    assert len({mask.tobytes() for mask in masks}) >= 8
    assert sum(np.unpackbits(mask.view(np.uint8)).sum() > NUM_TOKENS / 2 for mask in masks) >= 3


def test_the_benchmark_measures_steps_under_grammars_beside_plain_ones() -> None:
    rounds = measure(NUM_TOKENS, batches=[2], num_steps=2, num_rounds=1, names=(*SIDES, GRAMMAR))
    assert summarize(rounds[2])["controls_over_plain"][GRAMMAR] > 0
