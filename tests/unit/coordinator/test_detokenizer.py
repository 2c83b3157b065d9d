"""Text comes out whole: never half a character, never part of a stop string, and nothing is lost."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eft_serve.coordinator.detokenizer import REPLACEMENT, Detokenizer, StopChecker

BYTES = [bytes([value]) for value in range(256)]


@dataclass(frozen=True)
class ByteDecoder:
    """A byte-level tokenizer at its worst: one token a byte."""

    strip_first_space: bool = False  # as sentencepiece does

    def decode(self, token_ids: list[int]) -> str:
        text = b"".join(BYTES[token_id] for token_id in token_ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strip_first_space else text


def chunks(data: bytes, cuts: list[int]) -> list[list[int]]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [list(data[a:b]) for a, b in itertools.pairwise(edges)]


@given(st.text(min_size=1), st.text(), st.lists(st.integers(0, 1000)), st.booleans())
def test_deltas_join_to_the_whole_text(text: str, prompt: str, cuts: list[int], sentencepiece: bool) -> None:
    decoder = ByteDecoder(sentencepiece)
    detokenizer = Detokenizer.after_prompt(decoder, list(prompt.encode()))
    deltas = [detokenizer.push(chunk) for chunk in chunks(text.encode(), cuts)]
    assert not any(delta.endswith(REPLACEMENT) for delta in deltas if REPLACEMENT not in text)
    joined = "".join(deltas) + detokenizer.flush()
    expected = text if prompt or not sentencepiece else text.removeprefix(" ")
    assert joined == expected


@given(st.binary(min_size=1, max_size=40), st.lists(st.integers(0, 1000)))
def test_bytes_that_are_no_text_are_not_lost_either(data: bytes, cuts: list[int]) -> None:
    detokenizer = Detokenizer.after_prompt(ByteDecoder(), [])
    joined = "".join(detokenizer.push(chunk) for chunk in chunks(data, cuts)) + detokenizer.flush()
    assert joined == data.decode("utf-8", errors="replace")


def test_a_character_waits_for_its_last_byte() -> None:
    detokenizer = Detokenizer.after_prompt(ByteDecoder(), list(b"prompt"))
    assert [detokenizer.push([byte]) for byte in "é€a".encode()] == ["", "é", "", "", "€", "a"]


def test_the_window_stays_short() -> None:
    detokenizer = Detokenizer.after_prompt(ByteDecoder(), list(b"prompt"))
    for byte in b"a" * 1000:
        detokenizer.push([byte])
    assert len(detokenizer.window) < 10


PIECES = [
    b" ",
    b"a",
    b" \xf0\x9f",
    b"\x98\x80",
    b"\xe2",
    b"\x82\xac",
    b"\xef\xbf\xbd",
    b"\x80",
    b"a\xe2\x82",
    b"\xac b",
    b"\xf0",
]


@dataclass(frozen=True)
class PieceDecoder:
    """A byte-level tokenizer whose tokens are several bytes."""

    def decode(self, token_ids: list[int]) -> str:
        return b"".join(PIECES[token_id] for token_id in token_ids).decode("utf-8", errors="replace")


@settings(max_examples=500)
@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=30))
def test_tokens_of_several_bytes_give_the_text_of_all_of_them(tokens: list[int]) -> None:
    detokenizer = Detokenizer.after_prompt(PieceDecoder(), [1])
    joined = "".join(detokenizer.push([token]) for token in tokens) + detokenizer.flush()
    assert joined == PieceDecoder().decode(tokens)
    assert len(detokenizer.window) < 20


@dataclass(frozen=True)
class ByteFallback:
    """As sentencepiece's: in a run of single bytes that is no UTF-8, every byte is a replacement character.

    Ids below 256 are bytes, those from there on letters.
    """

    def decode(self, token_ids: list[int]) -> str:
        text = ""
        for is_byte, run in itertools.groupby(token_ids, lambda token_id: token_id < 256):
            values = list(run)
            try:
                text += bytes(values).decode() if is_byte else "".join(chr(value - 256) for value in values)
            except UnicodeDecodeError:
                text += REPLACEMENT * len(values)
        return text


def letters(text: str) -> list[int]:
    return [256 + ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ([*"€".encode(), 0xE3, *letters("ab")], ["", "", "€", "", "�a", "b"]),
        ([0x0A, 0xE3, *letters("a")], ["\n", "", "�a"]),
        ([0x0A, *"€".encode()], ["\n", "", "", "€"]),
        ([0xE3, *"é".encode(), *letters("a")], ["", "", "�é", "a"]),
        ([0xE3, *"€".encode(), 0xE3], ["", "", "", "�€", ""]),
        ([0xE3] * 3 + [*"😀".encode()], ["", "", "", "�", "�", "�", "😀"]),
        ([0xE3] * 6, ["", "", "", "�", "�", "�"]),
        ([0x80, 0x9F, 0xE2, 0x20, 0x0A], ["", "", "", "��� ", "\n"]),
    ],
)
def test_broken_bytes_hold_nothing_back_beyond_a_character(tokens: list[int], pieces: list[str]) -> None:
    detokenizer = Detokenizer.after_prompt(ByteFallback(), letters("prompt"))
    assert [detokenizer.push([token]) for token in tokens] == pieces
    at_once = Detokenizer.after_prompt(ByteFallback(), letters("prompt"))
    assert at_once.push(tokens) == "".join(pieces)


@given(st.lists(st.sampled_from([*b"\n\xe2\x82\xac\xe3\xc3\xa9\xf0\x9f\x98\x80", *letters("ab")]), max_size=60))
def test_with_a_byte_fallback_every_letter_comes_in_time_and_once(tokens: list[int]) -> None:
    detokenizer = Detokenizer.after_prompt(ByteFallback(), letters("prompt"))
    shown = ""
    for count, token in enumerate(tokens, start=1):
        shown += detokenizer.push([token])
        clean = [chr(t - 256) for t in tokens[: max(0, count - 3)] if t >= 256]
        found = [letter for letter in shown if letter in "ab"]
        assert found[: len(clean)] == clean, "a letter waits for more than a character"
        assert len(detokenizer.window) < 20
    shown += detokenizer.flush()
    assert [letter for letter in shown if letter in "ab"] == [chr(t - 256) for t in tokens if t >= 256]


def test_tokens_without_text_do_not_make_the_window_grow() -> None:
    @dataclass(frozen=True)
    class Special:
        """Token 0 is special and has no text."""

        def decode(self, token_ids: list[int]) -> str:
            return "".join(chr(token_id) for token_id in token_ids if token_id).removeprefix(" ")

    detokenizer = Detokenizer.after_prompt(Special(), [ord("a")])
    assert {detokenizer.push([0]) for _ in range(1000)} == {""}
    assert len(detokenizer.window) < 20
    assert detokenizer.push([ord(" "), ord("b")]) == " b"


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 1000)),
)
def test_stop_strings_cut_where_a_search_of_the_whole_text_would(text: str, stops: list[str], cuts: list[int]) -> None:
    checker = StopChecker(tuple(stops))
    out = ""
    for chunk in chunks(text.encode(), cuts):
        out += checker.push(bytes(chunk).decode())
        assert not any(stop in out for stop in stops)
        if checker.stopped:
            break
    else:
        out += checker.flush()
    first_end = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    if first_end is None:
        assert not checker.stopped
        assert out == text
    else:
        assert checker.stopped
        starts = [text.find(stop) for stop in stops if stop in text]
        assert min(starts) <= len(out) <= max(starts)
        assert text.startswith(out)


def test_a_stop_string_across_deltas_is_never_shown() -> None:
    checker = StopChecker(("\n\nUser:",))
    assert [checker.push(piece) for piece in ("Hello.", "\n", "\nUs", "ual\n\nUse", "r: more")] == [
        "Hello.",
        "",
        "",
        "\n\nUsual",
        "",
    ]
    assert checker.stopped
