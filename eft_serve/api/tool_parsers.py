"""Tool calls in the text of an answer, found as it comes: the formats of Hermes and Qwen, Llama 3 and Mistral.

A parser takes text in pieces of any size and gives content and calls; the whole answer is what all pieces give
together. Text that is no call of a known tool stays content, as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from eft_serve.config_recipes import ToolFormat


@dataclass(frozen=True, slots=True)
class CallDelta:
    """The beginning of a call, or more of its arguments."""

    index: int  # of the call in its answer
    name: str | None = None  # with the beginning
    arguments: str = ""  # JSON


Parsed = str | CallDelta  # content, or a part of a call


class ToolParser(Protocol):
    """Parses one answer."""

    @property
    def is_in_call(self) -> bool:
        """Whether a call that has begun has not ended."""
        ...

    def push(self, text: str) -> list[Parsed]:
        """What can be said once this text has come too."""
        ...

    def finish(self) -> list[Parsed]:
        """The rest, at the end of the answer."""
        ...


class _JsonObject:
    """The text of one JSON object as it comes; finds its end, and the ends of the values in it."""

    def __init__(self) -> None:
        self.text = ""
        self.is_complete = False
        self.closed: list[int] = []  # where a value of depth 1 that is an object or an array ends
        self._depth = 0
        self._in_string = self._is_escaped = False

    def push(self, text: str) -> str:
        """Take text up to the object's end; returns what follows it."""
        num_taken = len(text)
        for place, character in enumerate(text, start=1):
            self._see(character, len(self.text) + place)
            if self.is_complete:
                num_taken = place
                break
        self.text += text[:num_taken]
        return text[num_taken:]

    def _see(self, character: str, end: int) -> None:
        if self._in_string:
            self._in_string = character != '"' or self._is_escaped
            self._is_escaped = character == "\\" and not self._is_escaped
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 1:
                self.closed.append(end)
            self.is_complete = self._depth == 0


@dataclass(slots=True)
class _Call:
    """One call, `{"name": …, "arguments": {…}}`, as it comes; its arguments are passed on as they are written."""

    index: int
    names: Collection[str]
    key: str  # of the arguments
    object: _JsonObject = field(default_factory=_JsonObject)
    has_begun: bool = False
    _start: int = 0  # of the arguments in the object
    _num_sent: int = 0  # characters of the arguments

    @property
    def text(self) -> str:
        return self.object.text

    def push(self, text: str) -> tuple[list[Parsed], str]:
        """What this text says of the call, and what follows the call in it."""
        rest = self.object.push(text)
        return [*self._begun(), *self._more()], rest

    def whole(self) -> list[Parsed] | None:
        """A complete call that was not recognised as it came: its keys are in another order; None: it is no call."""
        try:
            call = json.loads(self.text)
        except (ValueError, RecursionError):
            return None
        arguments = call.get(self.key, {}) if isinstance(call, dict) else None
        if isinstance(arguments, str):  # some models write JSON in JSON
            text = arguments
        elif isinstance(arguments, Mapping):
            text = json.dumps(arguments, ensure_ascii=False)
        else:
            return None
        return [CallDelta(self.index, call["name"], text)] if call.get("name") in self.names else None

    def _begun(self) -> Iterator[Parsed]:
        if self.has_begun:
            return
        head = re.match(rf'\s*{{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"{self.key}"\s*:\s*(?={{)', self.text)
        if head is not None and head[1] in self.names:
            self.has_begun, self._start = True, head.end()
            yield CallDelta(self.index, head[1])

    def _more(self) -> Iterator[Parsed]:
        if not self.has_begun:
            return
        end = next((place for place in self.object.closed if place > self._start), len(self.text))
        if new := self.text[self._start + self._num_sent : end]:
            self._num_sent += len(new)
            yield CallDelta(self.index, arguments=new)


class _Parser:
    """What the formats have in common: text that waits for its meaning, and numbered calls.

    Args:
        names: of the tools.
    """

    key = "arguments"

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._waiting = ""
        self._num_calls = 0
        self._is_cut = False
        self._call: _Call | None = None
        self._before = ""  # text that belongs to the call in progress, if it is one
        self._state: Callable[[], Iterator[Parsed] | None] = self._content

    @property
    def is_in_call(self) -> bool:
        """See `ToolParser`."""
        return self._is_cut or (self._call is not None and self._call.has_begun)

    def push(self, text: str) -> list[Parsed]:
        """See `ToolParser`."""
        self._waiting += text
        return list(self._advance())

    def finish(self) -> list[Parsed]:
        """See `ToolParser`."""
        self._is_cut = self.is_in_call
        call, self._call = self._call, None
        unread = "" if call is None or call.has_begun else self._before + call.text
        rest, self._waiting = unread + self._waiting, ""
        if self._num_calls and (not rest.strip() or self._is_ending(rest.strip())):
            return []
        return [rest] if rest else []

    def _is_ending(self, rest: str) -> bool:
        """Whether text at the answer's end is the beginning of what belongs to the format after a call."""
        raise NotImplementedError

    def _advance(self) -> Iterator[Parsed]:
        """Go from state to state until the text that waits says nothing more."""
        while (parsed := self._state()) is not None:
            yield from parsed

    def _content(self) -> Iterator[Parsed] | None:
        raise NotImplementedError

    def _begin_call(self, before: str) -> None:
        self._call, self._before = _Call(self._num_calls, self._names, self.key), before
        self._state = self._in_call

    def _in_call(self) -> Iterator[Parsed] | None:
        if not self._waiting:
            return None
        call = self._call
        assert call is not None
        parsed, self._waiting = call.push(self._waiting)
        if not call.object.is_complete:
            return iter(parsed)
        if not call.has_begun:
            whole = call.whole()
            parsed = self._not_a_call(call) if whole is None else whole
        self._num_calls += bool(parsed and isinstance(parsed[0], CallDelta)) or call.has_begun
        self._call, self._state = None, self._after_call
        return iter(parsed)

    def _not_a_call(self, call: _Call) -> list[Parsed]:
        return [self._before + call.text]

    def _after_call(self) -> Iterator[Parsed] | None:
        raise NotImplementedError

    def _content_before(self, marker: str) -> str | None:
        """Take the content before a marker; None if the marker has not come, and what may be its beginning waits.

        Blanks at the end wait too: before a call they are not content.
        """
        place = self._waiting.find(marker)
        if place >= 0:
            content, self._waiting = self._waiting[:place], self._waiting[place + len(marker) :]
            return content
        return None

    def _safe_content(self, marker: str) -> str:
        """Take the content that is neither the beginning of a marker nor blanks that may precede one."""
        held = next(n for n in range(len(marker) - 1, -1, -1) if self._waiting.endswith(marker[:n]))
        safe = self._waiting[: len(self._waiting) - held].rstrip()
        self._waiting = self._waiting[len(safe) :]
        return safe


class HermesParser(_Parser):
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`, as often as there are calls; Hermes 2, Qwen 2.5 and 3."""

    BEGIN, END = "<tool_call>", "</tool_call>"

    def _content(self) -> Iterator[Parsed] | None:
        content = self._content_before(self.BEGIN)
        if content is None:
            safe = self._safe_content(self.BEGIN)
            return iter([safe]) if safe else None
        self._begin_call(self.BEGIN)
        return iter([content.rstrip()] if content.strip() else [])

    def _after_call(self) -> Iterator[Parsed] | None:
        text = self._waiting.lstrip()
        if text.startswith(self.END):
            self._waiting = text[len(self.END) :].lstrip()
            self._state = self._between
            return iter(())
        if self.END.startswith(text):
            return None
        self._state = self._content  # the end is missing
        return iter(())

    def _is_ending(self, rest: str) -> bool:
        return self._state == self._after_call and self.END.startswith(rest)

    def _between(self) -> Iterator[Parsed] | None:
        """Blanks between two calls are not content."""
        self._waiting = self._waiting.lstrip()
        if not self._waiting:
            return None
        self._state = self._content
        return iter(())

    def _not_a_call(self, call: _Call) -> list[Parsed]:
        return [self.BEGIN + call.text + self.END]


class Llama3Parser(_Parser):
    """`{"name": …, "parameters": …}` as the whole answer, several separated by `;`; Llama 3.1 to 3.3."""

    BEGIN = "<|python_tag|>"
    key = "parameters"

    def _content(self) -> Iterator[Parsed] | None:
        text = self._waiting.lstrip()
        if not text or (self.BEGIN.startswith(text) and text != self.BEGIN):
            return None
        begun = text.removeprefix(self.BEGIN).lstrip()
        if begun.startswith("{"):
            self._begin_call(self._waiting[: len(self._waiting) - len(begun)])
            self._waiting = begun
        elif begun or not text.startswith(self.BEGIN):
            self._state = self._only_content
        else:
            return None
        return iter(())

    def _only_content(self) -> Iterator[Parsed] | None:
        content, self._waiting = self._waiting, ""
        return iter([content]) if content else None

    def _after_call(self) -> Iterator[Parsed] | None:
        text = self._waiting.lstrip().removeprefix(";").lstrip()
        if not text:
            return None
        if text.startswith("{"):
            self._begin_call("")
            self._waiting = text
        else:
            self._state = self._only_content
        return iter(())

    def _is_ending(self, rest: str) -> bool:
        return self._state == self._after_call and rest == ";"


class MistralParser(_Parser):
    """`[TOOL_CALLS]`, then a list of calls or, in newer models, `name{…}`."""

    BEGIN, ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"

    def _content(self) -> Iterator[Parsed] | None:
        content = self._content_before(self.BEGIN)
        if content is None:
            safe = self._safe_content(self.BEGIN)
            return iter([safe]) if safe else None
        self._state = self._marked
        return iter([content.rstrip()] if content.strip() else [])

    def _marked(self) -> Iterator[Parsed] | None:
        """After the marker."""
        text = self._waiting.lstrip()
        if text.startswith("["):
            self._waiting, self._state = text[1:], self._listed
            return iter(())
        name, brace, _ = text.partition("{")
        if not brace:
            return None
        name = name.partition(self.ARGUMENTS)[0].strip()
        if name in self._names:
            self._waiting = f'{{"name": "{name}", "{self.key}": {text[text.index("{") :]}'
            self._begin_call("")
            self._state = self._in_named_call
        else:
            self._state = self._content  # what follows may hold another marker
            return iter([self.BEGIN])
        return iter(())

    def _in_named_call(self) -> Iterator[Parsed] | None:
        """The object that we began ends with its arguments."""
        call = self._call
        assert call is not None
        if not self._waiting:
            return None
        parsed, rest = call.push(self._waiting)
        self._waiting = rest
        if call.object.closed:
            end = call.object.closed[0]
            self._waiting = call.text[end:] + rest
            parsed = [each for each in parsed if isinstance(each, CallDelta)]
            self._num_calls += 1
            self._call, self._state = None, self._content
        return iter(parsed)

    def _listed(self) -> Iterator[Parsed] | None:
        """In the list, before a call or its end."""
        text = self._waiting.lstrip().removeprefix(",").lstrip()
        if not text:
            return None
        if text.startswith("{"):
            self._begin_call("")
        else:
            text = text.removeprefix("]")
            self._state = self._content
        self._waiting = text
        return iter(())

    def _after_call(self) -> Iterator[Parsed] | None:
        self._state = self._listed
        return iter(())

    def _is_ending(self, rest: str) -> bool:
        return self._state == self._listed and rest in (",", "]")


MARKERS: Mapping[ToolFormat | None, Sequence[str]] = {
    "hermes": (HermesParser.BEGIN, HermesParser.END),
    "llama3_json": (Llama3Parser.BEGIN,),
    "mistral": (MistralParser.BEGIN, MistralParser.ARGUMENTS),
}
"""What begins or ends calls, and may be special tokens."""

PARSERS: Mapping[ToolFormat, Callable[[Collection[str]], ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3Parser,
    "mistral": MistralParser,
}
