"""The requests of `POST /v1/responses`: OpenAI's, for text, and the sampling parameters that all endpoints have."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from eft_serve.api.knobs import Metadata, Strict, Whole, mistake
from eft_serve.api.messages import MAX_MESSAGES
from eft_serve.api.schemas import VLLM_NO_OPS, GenerationBody
from eft_serve.api.structured_outputs import JsonSchemaFormat, ResponseFormat
from eft_serve.types import MAX_ALTERNATIVES

MAX_INCLUDED = 64
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


def _as_part(content: object) -> object:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


def _as_item(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _called(name: str) -> BeforeValidator:
    """Of a parameter that has another name here."""

    def refuse(value: object) -> object:
        if value is not None:
            raise ValueError(f"this endpoint calls it {name}")
        return value

    return BeforeValidator(refuse)


def _not_here(value: object) -> object:
    if value is not None:
        raise ValueError("is not of this endpoint; leave it out")
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
    content: Annotated[
        list[TextPart], Field(fail_fast=True), BeforeValidator(_as_part, json_schema_input_type=str | list[TextPart])
    ]
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
    """The form of the answer: any text, a JSON object, or a document of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    description: str | None = None
    """Accepted and not used."""
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None
    """The answer follows the schema in any case."""

    @model_validator(mode="after")
    def _has_its_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.json_schema is not None and self.name is not None):
            raise mistake("schema", "is needed with type json_schema, as name is, and with no other")
        return self

    @property
    def as_in_chats(self) -> ResponseFormat:
        own = None
        if self.json_schema is not None and self.name is not None:
            own = JsonSchemaFormat(name=self.name, schema=self.json_schema)
        return ResponseFormat(type=self.type, json_schema=own)


class TextOptions(Strict):
    """What the answer's text is."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


InputMessages = Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class ResponsesBody(GenerationBody):
    """`POST /v1/responses`. Nothing is stored: a conversation is sent as a whole, in `input`."""

    input: Annotated[
        list[InputMessage],
        Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES),
        BeforeValidator(_as_item, json_schema_input_type=str | InputMessages),
    ]
    """What the user says, or the conversation so far."""
    instructions: str | None = None
    """A system message before everything; one that `input` begins with follows in the same message."""
    max_tokens: Annotated[None, _called("max_output_tokens")] = None
    response_format: Annotated[None, _called("text.format")] = None
    prompt_logprobs: Annotated[None, BeforeValidator(_not_here)] = None
    max_output_tokens: Whole | None = Field(default=None, ge=1, lt=2**31)
    """Of the answer, at most."""
    include: Annotated[list[Includable], Field(max_length=MAX_INCLUDED)] | None = None
    """`message.output_text.logprobs` adds log-probabilities of the answer's tokens; the rest there is not."""
    top_logprobs: Whole | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """Alternatives to each token whose log-probabilities are wanted too."""
    text: TextOptions | None = None
    """Its `format` is the form of the answer: text, a JSON object, or a document of a schema."""
    metadata: Metadata | None = None
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
            raise mistake("top_logprobs", f'needs include to have "{LOGPROBS}"')
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
    def text_format(self) -> dict[str, Any]:
        """The form of the answer, as the answer repeats it."""
        own = None if self.text is None else self.text.format
        return {"type": "text"} if own is None else own.model_dump(by_alias=True, exclude_none=True)

    @property
    def form(self) -> ResponseFormat | None:
        return None if self.text is None or self.text.format is None else self.text.format.as_in_chats

    @property
    def form_param(self) -> str:
        return "text.format"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation, with its instructions, in the form that chat templates take."""
        messages = [item.rendered for item in self.input]
        if not self.instructions:
            return messages
        own = [message["content"] for message in messages[:1] if message["role"] == "system"]
        return [{"role": "system", "content": "\n\n".join([self.instructions, *own])}, *messages[len(own) :]]
