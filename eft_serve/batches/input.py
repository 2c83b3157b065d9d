"""Reading a batch's input: lines of a bounded length out of pieces of any, and the check before the first is run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from eft_serve.batches.lines import INVALID_LINE, Line, parse_line
from eft_serve.batches.records import Mistake

MAX_LINES = 50_000  # OpenAI's
MAX_LINE_BYTES = 4 * 2**20  # the API takes no larger body
MAX_MISTAKES = 100  # that are listed
MAX_SHOWN = 500  # characters of each; they repeat what the file says


def read_lines(pieces: Iterable[bytes]) -> Iterator[Line]:
    """Every line that is not blank. One that is too long is a mistake, and is not held."""
    number, rest, too_long = 0, b"", False
    for piece in pieces:
        *whole, last = piece.split(b"\n")
        for end in whole:
            number += 1
            yield from _line(number, rest + end, too_long)
            rest, too_long = b"", False
        rest += last
        if len(rest) > MAX_LINE_BYTES:
            rest, too_long = b"", True
    yield from _line(number + 1, rest, too_long)


def _line(number: int, raw: bytes, too_long: bool) -> Iterator[Line]:
    if too_long or len(raw) > MAX_LINE_BYTES:
        mistake = f"line {number} is over {MAX_LINE_BYTES} bytes"
        yield Line(number, None, mistake=mistake, code="line_too_long")
    elif raw.strip():
        yield parse_line(number, raw)


def check_input(pieces: Iterable[bytes], endpoint: str) -> tuple[int, list[Mistake]]:
    """The number of requests, and every mistake up to `MAX_MISTAKES`, with OpenAI's codes where it has one."""
    lines: dict[bytes, int] = {}  # number of the line by a digest of its custom_id, which may be long
    mistakes: list[Mistake] = []
    count = 0
    for line in read_lines(pieces):
        count += 1
        if count > MAX_LINES:
            message = f"the file has more than {MAX_LINES} requests; split it"
            return count, [Mistake(code="too_many_tasks", message=message, param="input_file_id")]
        if (mistake := _mistake(line, endpoint, lines)) is not None:
            mistakes.append(mistake)
            if len(mistakes) == MAX_MISTAKES:
                return count, mistakes
    if count == 0:
        mistakes = [Mistake(code="empty_file", message="the file holds no request", param="input_file_id")]
    return count, mistakes


def _mistake(line: Line, endpoint: str, lines: dict[bytes, int]) -> Mistake | None:
    number = line.number
    if line.mistake is not None:
        code, param = line.code or INVALID_LINE, line.param and _shown(line.param)
        return Mistake(code=code, message=_shown(line.mistake), param=param, line=number)
    digest = hashlib.blake2b(str(line.key).encode(errors="surrogatepass"), digest_size=16).digest()
    first = lines.setdefault(digest, number)
    if first != number:
        message = f"line {number} has the custom_id of line {first}; each needs its own"
        return Mistake(code="duplicate_custom_id", message=message, param="custom_id", line=number)
    if line.url != endpoint:
        message = f"line {number}: url is {line.url!r}, and the batch's endpoint is {endpoint!r}"
        return Mistake(code="url_mismatch", message=message, param="url", line=number)
    return None


def _shown(text: str) -> str:
    return text[:MAX_SHOWN].encode(errors="backslashreplace").decode()
