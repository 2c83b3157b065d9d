"""The requests of `POST /v1/responses`: OpenAI's, for text, and the sampling parameters that all endpoints have."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from eft_serve.api.knobs import Strict, Whole
from eft_serve.api.schemas import VLLM_NO_OPS, GenerationBody, _mistake
from eft_serve.types import MAX_ALTERNATIVES

LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    # of what is never in an answer here, so there is nothing to include
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
Status = Literal["in_progress", "completed", "incomplete"]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


def _as_part(content: object) -> object:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


def _as_item(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _text_only(value: object) -> object:
    if value is not None and value != {"type": "text"}:
        raise ValueError('only {"type": "text"} is supported yet')
    return value


def _other_name(value: object) -> object:
    if value is not None:
        raise ValueError("this endpoint calls it max_output_tokens")
    return value


class TextPart(Strict):
    """A part of a message. An answer's part may be sent back as it came."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    """Accepted and not used."""
    logprobs: list[Any] | None = None
    """Accepted and not used."""
    eft: dict[str, Any] | None = None
    """Accepted and not used."""


class InputMessage(Strict):
    """One turn of the conversation. An answer's item may be sent back as it came."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_part, json_schema_input_type=str | list[TextPart])]
    """Text, or parts of it, which are joined by line breaks."""
    id: str | None = None
    """Accepted and not used."""
    status: Status | None = None
    """Accepted and not used."""
    phase: Literal["commentary", "final_answer"] | None = None
    """Accepted and not used."""

    @property
    def rendered(self) -> dict[str, str]:
        """In the form that chat templates take."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class TextFormat(Strict):
    """Text without a form."""

    type: Literal["text"]


class TextOptions(Strict):
    """What the answer's text is."""

    format: Annotated[TextFormat | None, BeforeValidator(_text_only)] = None
    verbosity: Literal["medium"] | None = None


class ResponsesBody(GenerationBody):
    """`POST /v1/responses`. Nothing is stored: a conversation is sent as a whole, in `input`."""

    input: Annotated[
        list[InputMessage],
        Field(min_length=1),
        BeforeValidator(_as_item, json_schema_input_type=str | Annotated[list[InputMessage], Field(min_length=1)]),
    ]
    """What the user says, or the conversation so far."""
    instructions: str | None = None
    """A system message before everything; one that `input` begins with follows in the same message."""
    max_tokens: Annotated[None, BeforeValidator(_other_name)] = None
    max_output_tokens: Whole | None = Field(default=None, ge=1, lt=2**31)
    include: list[Includable] | None = None
    top_logprobs: Whole | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """Alternatives to each token whose log-probabilities are wanted too."""
    text: TextOptions | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    """Repeated in the answer."""
    parallel_tool_calls: bool | None = None
    """Repeated in the answer; without tools there is nothing to call."""
    tool_choice: Literal["none", "auto"] | None = None
    """Repeated in the answer."""
    prompt_cache_key: str | None = None
    """Repeated in the answer."""
    safety_identifier: str | None = None
    """Repeated in the answer."""

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = VLLM_NO_OPS | {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "best_of": (1,),
        "context_management": ([],),
        "conversation": (),
        "enable_response_messages": (False,),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "n": (1,),
        "previous_input_messages": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
        "return_token_ids": (False,),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "stream_options": ({}, {"include_obfuscation": False}),
        "tools": ([],),
        "truncation": ("disabled",),
    }

    @model_validator(mode="after")
    def _responses_fields_agree(self) -> ResponsesBody:
        if self.top_logprobs and self.num_logprobs is None:
            raise _mistake("top_logprobs", f'needs include to have "{LOGPROBS}"')
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None

    @property
    def requested_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def limit_param(self) -> str:
        return "max_output_tokens"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation, with its instructions, in the form that chat templates take."""
        messages = [item.rendered for item in self.input]
        if not self.instructions:
            return messages
        own = [message["content"] for message in messages[:1] if message["role"] == "system"]
        return [{"role": "system", "content": "\n\n".join([self.instructions, *own])}, *messages[len(own) :]]
