"""The input and output files of a batch job, in OpenAI's batch format; knows no HTTP.

An invalid line gets an answer with an error. Blank lines are skipped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eft_serve.batches.lines import Line, parse_line
from eft_serve.errors import ConfigError

UNREACHED = "unreached"


def read_lines(path: Path) -> Iterator[Line]:
    """The input, lazily.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield parse_line(number, raw)
    except OSError as error:
        raise ConfigError(f"--input: {path} cannot be read: {error.strerror}") from error


def input_keys(path: Path) -> set[str | int]:
    """The keys of all lines.

    Raises:
        ConfigError: the file cannot be read, or two lines have the same custom_id.
    """
    numbers: dict[str | int, int] = {}
    for line in read_lines(path):
        first = numbers.setdefault(line.key, line.number)
        if first != line.number:
            raise ConfigError(f"--input: lines {first} and {line.number} both have custom_id {line.key!r}; rename one")
    return set(numbers)


class OutputFile:
    """The output file: each answer is on disk before the next is written; locked by one process at a time.

    Unreached requests are written last, when everything else is done, so that a later run can cut them off and try
    again.
    """

    def __init__(self, path: Path, keys: set[str | int]) -> None:
        """Open the file, or resume it.

        Raises:
            ConfigError: it cannot be opened, another process writes it, or it belongs to another input.
        """
        self.path = path
        try:
            self._file = path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError(f"--output: another batch is writing {path}") from error
        except OSError as error:
            raise ConfigError(f"--output: {path} cannot be written: {error.strerror}") from error
        try:
            self.done = self._resume(keys)
        except ConfigError:
            self._file.close()
            raise

    def append(self, line: dict[str, Any]) -> None:
        """Add one line and wait until it is on disk."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def _resume(self, keys: set[str | int]) -> set[str | int]:
        """Keys that have an answer; truncates the file after the last of them."""
        done: set[str | int] = set()
        end = tail = 0
        self._file.seek(0)
        for number, raw in enumerate(self._file, start=1):
            tail += len(raw)
            if not raw.endswith(b"\n"):
                break  # incomplete when the last run was killed
            key, unreached = self._parse(number, raw)
            if unreached:
                continue
            if end + len(raw) != tail or key in done or key not in keys:
                raise ConfigError(
                    f"--output: line {number} of {self.path} ({key!r}) is not an answer to this input; use another file"
                )
            done.add(key)
            end = tail
        self._file.truncate(end)
        return done

    def _parse(self, number: int, raw: bytes) -> tuple[str | int, bool]:
        """(key, whether the request was unreached) of an output line."""
        try:
            data = json.loads(raw)
            custom_id = data["custom_id"]
            key = int(data["id"].removeprefix("line-")) if custom_id is None else str(custom_id)
            return key, data["error"] is not None and data["error"]["code"] == UNREACHED
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"--output: line {number} of {self.path} is not an answer; name another file") from error
