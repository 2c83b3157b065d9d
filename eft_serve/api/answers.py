"""What answers look like, for the description; `formats` and others make them, and tests compare the two."""

from __future__ import annotations

from typing import Literal, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict  # pydantic reads that of `typing` from Python 3.12 only


class Closed(TypedDict):
    """An object without other fields than its own."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)  # type: ignore[misc]


class Error(Closed):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The offending field of the request."""
    code: str | None


class ErrorBody(Closed):
    """The answer to a request that failed."""

    error: Error


class Health(Closed):
    """The process lives."""

    status: Literal["ok"]


class Ready(Closed):
    """Every model has answered a step."""

    status: Literal["ready"]


class Model(Closed):
    """A recipe or a plain model."""

    id: str
    object: Literal["model"]
    created: int
    """When this server started, in Unix seconds."""
    owned_by: str


class ModelList(Closed):
    """All that `model` may name."""

    object: Literal["list"]
    data: list[Model]


class CachedTokens(Closed):
    """Of the prompt."""

    cached_tokens: int


class PredictionTokens(Closed):
    """Draft tokens, in OpenAI's words."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class DraftReport(Closed):
    """What drafting brought; rates are null where nothing was drafted."""

    drafted: int
    accepted: int
    acceptance_rate: float | None
    tokens_per_base_pass: float | None


class TokenUsage(Closed):
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[CachedTokens]
    completion_tokens_details: NotRequired[PredictionTokens]
    eft: NotRequired[DraftReport]


class AlternativeComponents(Closed):
    """What each model says of a token, in natural logarithms; null where the probability is 0."""

    token_id: int
    token: str
    logprob: float | None
    """Under the recipe."""
    models: dict[str, float | None]
    rewards: dict[str, float | None]
    """By fine-tuning: how much more likely the tuned model finds the token than its reference."""
    reward: float | None
    """Their weighted sum; null for a plain model."""


class ComponentsOfToken(AlternativeComponents):
    """And of the likeliest alternatives."""

    top: NotRequired[list[AlternativeComponents]]


class ChoiceComponents(Closed):
    """What `eft.components` and `best_of` add to a choice."""

    reward: NotRequired[float | None]
    tokens: NotRequired[list[ComponentsOfToken]]


class AlternativeLogprob(Closed):
    """A token's log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(AlternativeLogprob):
    """And those of the likeliest alternatives."""

    top_logprobs: list[AlternativeLogprob]


class ChatLogprobs(Closed):
    """Log-probabilities of a message's tokens."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(Closed):
    """Log-probabilities of a text's tokens; the lists are of equal length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for the first token of a prompt that is repeated, which follows nothing."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters before each token."""


class RankedLogprob(Closed):
    """A prompt's token, or an alternative to it, in vLLM's shape."""

    logprob: float
    rank: int
    """1 is the likeliest token."""
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]
"""For each token of the prompt, itself and the likeliest ones by their ids; null for the first."""


class Choice(Closed):
    """What all choices have."""

    index: int
    token_ids: NotRequired[list[int]]
    eft: NotRequired[ChoiceComponents]


FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class FunctionCall(Closed):
    """A function with its arguments."""

    name: str
    arguments: str
    """JSON, unless the answer was cut off."""


class AssistantToolCall(Closed):
    """A call of one of the request's tools."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Closed):
    """The answer to a chat."""

    role: Literal["assistant"]
    content: str | None
    """Null where there are only tool calls."""
    refusal: None
    tool_calls: NotRequired[list[AssistantToolCall]]


class ChatChoice(Choice):
    """One answer to a chat."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(Closed):
    """A whole answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    prompt_logprobs: NotRequired[PromptLogprobs]


class FunctionCallDelta(Closed):
    """What is new of a function call."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(Closed):
    """What is new of a tool call; the first of it has its id."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallDelta


class MessageDelta(Closed):
    """What is new of a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(Choice):
    """What is new of an answer to a chat."""

    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletionChunk(Closed):
    """An event of a stream of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[TokenUsage | None]


class CompletionChoice(Choice):
    """One continuation of a text, or what is new of it."""

    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: NotRequired[PromptLogprobs]


class Completion(Closed):
    """An answer of `/v1/completions`, or an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[TokenUsage | None]
