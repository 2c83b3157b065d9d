"""Text comes out whole: never half a character, never part of a stop string, and nothing is lost."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import given
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
