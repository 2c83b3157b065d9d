"""One turn of a chat as OpenAI has it; its content becomes text."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from eft_serve.api.knobs import Strict, mistake

TEXT_PARTS = {"text": "text", "refusal": "refusal"}  # kind of a content part → its field


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


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is OpenAI's newer name for `system` and is rendered as `system`."""
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = Field(default=None, max_length=256)
    """The speaker, for templates that show it."""

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "refusal": (),
        "reasoning": (),
        "reasoning_content": (),
        "tool_call_id": (),
        "audio": (),
        "annotations": ([],),
        "function_call": (),
        "tool_calls": ([],),
    }

    @property
    def rendered(self) -> dict[str, str]:
        """In the form that chat templates take."""
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": self.content} | named
