"""The answers of a batch as they come: parts that are each written once, since object stores cannot append.

A line may be answered in two parts, when one process asked while another took over. The first part counts, so whoever
reads them all finds one answer a line. Every method blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from eft_serve.batches.store import ObjectStore


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one line of the input."""

    number: int  # of the line
    succeeded: bool
    text: bytes  # a line of output, without its end

    def encode(self) -> bytes:
        """As in a part: the text may be long, so the rest is told without parsing it."""
        return b"%d %d %b\n" % (self.number, self.succeeded, self.text)

    @classmethod
    def decode(cls, raw: bytes) -> Answer:
        """The inverse of `encode`."""
        number, succeeded, text = raw.split(b" ", 2)
        return cls(int(number), succeeded == b"1", text)


class AnswerLog:
    """The parts of one batch.

    Args:
        prefix: of their keys.
    """

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def append(self, epoch: int, index: int, answers: Iterable[Answer]) -> None:
        """Write part `index` of the process with this lease."""
        data = b"".join(answer.encode() for answer in answers)
        if not self._store.create(f"{self._prefix}/{epoch:06}-{index:09}", data):
            raise FileExistsError(f"part {index} of lease {epoch} was written before")

    def parts(self) -> list[str]:
        """The parts that there are now, in order."""
        return self._store.names(self._prefix)

    def read(self, parts: Iterable[str]) -> Iterator[Answer]:
        """One answer for each line that has any in these parts, one part in memory at a time."""
        seen: set[int] = set()
        for name in parts:
            for raw in self._store.get(f"{self._prefix}/{name}").splitlines():
                answer = Answer.decode(raw)
                if answer.number not in seen:
                    seen.add(answer.number)
                    yield answer

    def drop(self) -> None:
        """Delete all parts."""
        for name in self.parts():
            self._store.delete(f"{self._prefix}/{name}")
