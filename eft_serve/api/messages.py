"""One turn of a chat as OpenAI has it; its content becomes text."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic.config import JsonDict, JsonValue
from typing_extensions import TypedDict  # pydantic reads that of `typing` from Python 3.12 only

from eft_serve.api.knobs import Strict, mistake
from eft_serve.api.tools import MAX_TOOLS, ToolCall

TEXT_PARTS = {"text": "text", "refusal": "refusal"}  # kind of a content part → its field


class ContentPart(TypedDict):
    """For the description: `_part` reads it."""

    __pydantic_config__ = ConfigDict(json_schema_extra={"additionalProperties": {"type": "null"}})  # type: ignore[misc]


class TextContentPart(ContentPart):
    """Text."""

    type: Literal["text"]
    text: str


class RefusalContentPart(ContentPart):
    """An assistant's refusal, read as text."""

    type: Literal["refusal"]
    refusal: str


ContentParts = Annotated[list[TextContentPart | RefusalContentPart], Field(min_length=1)]


def _text(content: object, info: ValidationInfo) -> object:
    """The text of content parts, joined by line breaks."""
    if not isinstance(content, list):
        return content
    if not content:
        raise ValueError("must be a string, or at least one part")
    return "\n".join(_part(str(place), part, info.data.get("role")) for place, part in enumerate(content))


def _part(place: str, part: object, role: str | None) -> str:
    if not isinstance(part, dict) or not isinstance(kind := part.get("type"), str):
        raise mistake(place, 'must be an object like {"type": "text", "text": "…"}')
    if kind not in TEXT_PARTS:
        raise mistake(place, "the models are text-only; send parts of type text")
    if kind == "refusal" and role != "assistant":
        raise mistake(place, "only an assistant's message has a refusal")
    field = TEXT_PARTS[kind]
    if unknown := sorted(name for name in part.keys() - {"type", field} if part[name] is not None):
        raise mistake(f"{place}.{unknown[0]}", "unknown parameter")
    if not isinstance(text := part.get(field), str):
        raise mistake(f"{place}.{field}", "must be a string")
    return text


MAX_MESSAGES = 4096  # in one chat; OpenAI takes 2048

NULL: JsonDict = {"type": "null"}
NOT_NULL: JsonDict = {"not": {"type": "null"}}
NO_REFUSAL: JsonDict = {"items": {"properties": {"type": {"const": "text"}}}}
BY_ROLE: list[JsonValue] = [
    {
        "required": ["content"],
        "properties": {
            "role": {"enum": ["system", "developer", "user"]},
            "content": {"allOf": [NOT_NULL, NO_REFUSAL]},
            "tool_calls": {"maxItems": 0},
            "tool_call_id": NULL,
        },
    },
    {
        "anyOf": [
            {"required": ["content"], "properties": {"content": NOT_NULL}},
            {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
        ],
        "properties": {"role": {"const": "assistant"}, "tool_call_id": NULL},
    },
    {
        "required": ["content", "tool_call_id"],
        "properties": {
            "role": {"const": "tool"},
            "content": {"allOf": [NOT_NULL, NO_REFUSAL]},
            "tool_calls": {"maxItems": 0},
            "tool_call_id": NOT_NULL,
        },
    },
]
"""What a message has by its role, for the description; `_has_what_its_role_has` checks it."""


class Message(Strict):
    """One turn of a chat."""

    model_config = ConfigDict(json_schema_extra={"oneOf": BY_ROLE})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """`developer` is OpenAI's newer name for `system` and is rendered as `system`."""
    content: Annotated[str | None, BeforeValidator(_text, json_schema_input_type=str | ContentParts | None)] = None
    """Text, or parts of it, which are joined by line breaks; may be null in an assistant's message with tool calls."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    """Of an assistant."""
    tool_call_id: str | None = Field(default=None, max_length=256)
    """The call that a message of role `tool` answers."""
    name: str | None = Field(default=None, max_length=256)
    """The speaker, for templates that show it."""

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "refusal": (),
        "reasoning": (),
        "reasoning_content": (),
        "audio": (),
        "annotations": ([],),
        "function_call": (),
    }

    @model_validator(mode="after")
    def _has_what_its_role_has(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise mistake("content", "must be a string or a list of parts")
        if self.tool_calls and self.role != "assistant":
            raise mistake("tool_calls", "only an assistant calls tools")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise mistake("tool_call_id", "belongs to a message of role tool, which needs it")
        return self

    @property
    def is_of_tools(self) -> bool:
        """Whether it calls a tool, or answers a call."""
        return self.role == "tool" or bool(self.tool_calls)

    @property
    def rendered(self) -> dict[str, Any]:
        """In the form that chat templates take."""
        role = "system" if self.role == "developer" else self.role
        fields = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.rendered for call in self.tool_calls or ()] or None,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return {"role": role, "content": self.content or ""} | given


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
