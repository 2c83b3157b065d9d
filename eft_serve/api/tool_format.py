"""Chat answers with tool calls, whole and streamed, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from eft_serve.api.formats import ChatFormat, Choice, JsonObject
from eft_serve.api.tool_parsers import PARSERS, CallDelta, Parsed, ToolParser
from eft_serve.api.tools import call_id
from eft_serve.config_recipes import ToolFormat
from eft_serve.types import FinishReason

TOOL_CALLS = "tool_calls"  # OpenAI's finish reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChatFormat(ChatFormat):
    """Chats whose answers may call tools.

    Args:
        tool_format: how the model writes calls.
        names: of the tools.
        parallel: whether an answer may have several calls; otherwise the first one stands.
    """

    tool_format: ToolFormat
    names: Collection[str]
    parallel: bool = True
    _parsers: dict[int, ToolParser] = field(default_factory=dict)  # by choice
    _num_calls: dict[int, int] = field(default_factory=dict)  # by choice

    def parts(self, index: int, text: str, finish_reason: FinishReason | None) -> list[JsonObject]:
        """See `Format`."""
        if index not in self._parsers:
            self._parsers[index] = PARSERS[self.tool_format](self.names)
        parser = self._parsers[index]
        parsed = parser.push(text) + (parser.finish() if finish_reason is not None else [])
        parts = [self._part(index, delta) for delta in self._deltas(index, parsed)]
        return [*parts, self._part(index, {}, self._reason(index, parser, finish_reason))] if finish_reason else parts

    def choice(self, index: int, choice: Choice) -> JsonObject:
        """See `Format`."""
        parser = PARSERS[self.tool_format](self.names)
        deltas = self._deltas(index, parser.push(choice.text) + parser.finish())
        content = "".join(delta.get("content", "") for delta in deltas)
        message: JsonObject = {"role": "assistant", "content": content, "refusal": None}
        if calls := _joined([call for delta in deltas for call in delta.get(TOOL_CALLS, ())]):
            message |= {"content": content or None, TOOL_CALLS: calls}
        reason = self._reason(index, parser, choice.finish_reason)
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def _deltas(self, index: int, parsed: Sequence[Parsed]) -> list[JsonObject]:
        found = ({"content": each} if isinstance(each, str) else self._call(index, each) for each in parsed)
        return [delta for delta in found if delta]

    def _call(self, index: int, call: CallDelta) -> JsonObject:
        if call.index and not self.parallel:
            return {}
        self._num_calls[index] = call.index + 1
        delta: JsonObject = {"index": call.index, "function": {"arguments": call.arguments}}
        if call.name is not None:
            delta |= {"id": call_id(self.tool_format), "type": "function"}
            delta["function"] = {"name": call.name, "arguments": call.arguments}
        return {TOOL_CALLS: [delta]}

    def _reason(self, index: int, parser: ToolParser, reason: FinishReason | None) -> str | None:
        """A model may stop in a call, which is then none to be made."""
        has_called = self._num_calls.get(index) and not parser.is_in_call
        return TOOL_CALLS if reason is FinishReason.STOP and has_called else reason


def _joined(deltas: Sequence[JsonObject]) -> list[JsonObject]:
    """Whole calls of their deltas."""
    calls: dict[int, JsonObject] = {}
    for delta in deltas:
        place, arguments = delta["index"], delta["function"]["arguments"]
        if place in calls:
            calls[place]["function"]["arguments"] += arguments
        else:
            calls[place] = {key: value for key, value in delta.items() if key != "index"}
    return list(calls.values())
