"""A vocabulary of bytes and made-up words: what a grammar's masks cost depends on the tokens' texts, not on a model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, product

from eft_serve.api.model_tokenizer import BYTE_OF
from eft_serve.bench.fanout import Letters

ONSETS = ("", *"bcdfghjklmnprstvwz", "br", "ch", "cl", "dr", "fl", "gr", "pl", "pr", "qu", "sh", "sp", "st", "th", "tr")
VOWELS = ("a", "e", "i", "o", "u", "y", "ea", "ou", "é", "ä")
ENDINGS = ("", "n", "r", "s", "t", "l", "d", "ng", "st", "ment")
FORMS = (" {}",) * 4 + ("{}",) * 3 + ("{}_", "{}s")
MARKS = "\"',:{}[]. ;!?-_/\\()<>=+*#@&%$|~^`\n"
NUM_PAIRED = 10  # of the marks
LONGEST_RUN = 16  # of blanks
LETTER_OF = {byte: letter for letter, byte in BYTE_OF.items()}


@dataclass(frozen=True)
class Words(Letters):
    """A vocabulary whose tokens have texts; it detokenizes nothing."""

    @cached_property
    def tokenizer_json(self) -> str:
        """See `byte_level`."""
        return byte_level(list(islice(token_texts(), self.num_tokens)))


def token_texts() -> Iterator[bytes]:
    """As many as are wanted, none twice: every byte, what JSON is written with, and words."""
    seen: set[bytes] = set()
    single = (bytes([byte]) for byte in range(256))
    for text in chain(single, (piece.encode() for piece in chain(_blanks(), _pairs(), _words()))):
        if text not in seen:
            seen.add(text)
            yield text


def byte_level(texts: Sequence[bytes]) -> str:
    """A `tokenizer.json` whose tokens are these bytes, and which merges none."""
    vocabulary = {"".join(LETTER_OF[byte] for byte in text): token_id for token_id, text in enumerate(texts)}
    piece = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": piece, "decoder": piece, "model": model})


def _blanks() -> Iterator[str]:
    for length in range(2, LONGEST_RUN + 1):
        yield from (" " * length, "\t" * length, "\n" * length, "\n" + " " * length)


def _pairs() -> Iterator[str]:
    for first, second in product(MARKS[:NUM_PAIRED], repeat=2):
        yield first + second
    for number in range(100):
        yield f"{number:02}"


def _words() -> Iterator[str]:
    """Without end; some of them are numbers or runs of marks, as in a trained vocabulary."""
    rng = random.Random(0)  # noqa: S311
    while True:
        kind = rng.random()
        if kind < 0.02:
            yield "".join(rng.choices(MARKS, k=3))
        elif kind < 0.03:
            yield f"{rng.randrange(1000):03}"
        else:
            yield rng.choice(FORMS).format(_word(rng))


def _word(rng: random.Random) -> str:
    num_syllables = rng.choices((1, 2, 3), (1, 4, 3))[0]
    word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(num_syllables)) + rng.choice(ENDINGS)
    return rng.choices((word, word.capitalize(), word.upper()), (12, 5, 1))[0]
