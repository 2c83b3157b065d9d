"""The table of parameters in docs/api.md, made of the requests' schemas.

`python -m eft_serve.api.parameters docs/api.md` makes it anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from eft_serve.api.knobs import Strict
from eft_serve.api.parameter_names import OPENAI, VLLM
from eft_serve.api.responses_schemas import ResponsesBody
from eft_serve.api.schemas import ChatBody, CompletionBody

BEGIN, END = "<!-- parameters: made by eft_serve.api.parameters -->\n", "<!-- end of parameters -->\n"
HEAD = "| parameter | in | OpenAI | vLLM | here | |\n|---|---|---|---|---|---|\n"
BODIES: dict[str, type[Strict]] = {"chat": ChatBody, "text": CompletionBody, "responses": ResponsesBody}
UNUSED = "Accepted and not used."


def table() -> str:
    """All parameters of chats, text completions and responses, in Markdown; one row for those that are alike."""
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in _rows())


def rewritten(page: str) -> str:
    """The page with the table as it is now; raises `ValueError` where it has no place for one."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN!r} and {END!r}")
    return before + begin + "\n" + table() + "\n" + end + after


def _rows() -> Iterator[list[str]]:
    names = {name for known in (OPENAI, VLLM) for each in known.values() for name in each}
    for body in BODIES.values():
        names |= body.model_fields.keys() | body.NO_OPS.keys()
    for name in sorted(names):
        alike: dict[tuple[str, str], list[str]] = {}
        for endpoint, body in BODIES.items():
            if (said := _said(name, endpoint, body)) is not None:
                alike.setdefault(said, []).append(endpoint)
        for (here, meaning), endpoints in alike.items():
            shown = _endpoints(endpoints), _known(name, endpoints, OPENAI), _known(name, endpoints, VLLM)
            yield [f"`{name}`", *shown, here, meaning]


def _said(name: str, endpoint: str, body: type[Strict]) -> tuple[str, str] | None:
    """What becomes of a parameter, and its meaning; None where nobody has it there."""
    if name in body.NO_OPS:
        values = [None, *body.NO_OPS[name]]
        return f"only {', '.join(_json(value) for i, value in enumerate(values) if value not in values[:i])}", ""
    if name in body.model_fields:
        field = body.model_fields[name]
        meaning = " ".join((field.description or "").split()).removeprefix("vLLM's: ").replace("|", "\\|")
        if field.annotation is NoneType:
            return f"only {_json(None)}", ""
        return ("not used", "") if meaning == UNUSED else ("served", meaning[:1].upper() + meaning[1:])
    return ("refused", "") if name in OPENAI[endpoint] | VLLM[endpoint] else None


def _endpoints(names: list[str]) -> str:
    return "all" if len(names) == len(BODIES) else ", ".join(names)


def _known(name: str, endpoints: list[str], known: Mapping[str, frozenset[str]]) -> str:
    having = [endpoint for endpoint in endpoints if name in known[endpoint]]
    return "✓" if having == endpoints else ", ".join(having)


def _json(value: Any) -> str:
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(rewritten(path.read_text()))
