"""What answers of `/v1/responses` look like, for the description; `responses_format` makes them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from eft_serve.api.answers import ChoiceComponents, Closed, DraftReport, TokenLogprob


class OutputText(Closed):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[str]
    """There are none."""
    logprobs: list[TokenLogprob]
    """Of its tokens, where `include` has them."""
    eft: NotRequired[ChoiceComponents]


class OutputMessage(Closed):
    """The answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class IncompleteDetails(Closed):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(Closed):
    """Why generation broke off."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class ReasoningOptions(Closed):
    """Nothing reasons."""

    effort: None
    summary: None


class PlainFormat(Closed):
    """Text without a form."""

    type: Literal["text"]


class JsonObjectFormat(Closed):
    """A JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Closed):
    """A JSON document of a schema."""

    type: Literal["json_schema"]
    name: str
    schema: dict[str, Any]
    description: NotRequired[str]
    strict: NotRequired[bool]


class OutputOptions(Closed):
    """What the answer's text is."""

    format: PlainFormat | JsonObjectFormat | SchemaFormat


class InputTokensDetails(Closed):
    """Of the prompt."""

    cached_tokens: int
    cache_write_tokens: int
    """Always 0: nothing is charged for them."""


class OutputTokensDetails(Closed):
    """Of the answer."""

    reasoning_tokens: int


class ResponseUsage(Closed):
    """Tokens in and out."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    eft: NotRequired[DraftReport]


class ResponseObject(Closed):
    """A response, at any stage. What the request said is repeated."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: ReasoningOptions
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: OutputOptions
    tool_choice: Literal["none", "auto"]
    tools: list[str]
    """There are none."""
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class NumberedEvent(Closed):
    """What all events have."""

    sequence_number: int
    """From 0."""


class ResponseEvent(NumberedEvent):
    """The response began, or ended."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class OutputItemEvent(NumberedEvent):
    """The message began, or ended."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputMessage


class PlacedEvent(NumberedEvent):
    """Of a part of the message."""

    item_id: str
    output_index: int
    content_index: int


class ContentPartEvent(PlacedEvent):
    """The message's text began, or ended."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText


class TextDeltaEvent(PlacedEvent):
    """The next piece of text."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[TokenLogprob]
    eft: NotRequired[ChoiceComponents]


class TextDoneEvent(PlacedEvent):
    """The whole text."""

    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[TokenLogprob]


EVENTS = (ResponseEvent, OutputItemEvent, ContentPartEvent, TextDeltaEvent, TextDoneEvent)
