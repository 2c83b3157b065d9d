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
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Characters before each token."""


class Choice(Closed):
    """What all choices have."""

    index: int
    token_ids: NotRequired[list[int]]
    eft: NotRequired[ChoiceComponents]


FinishReason = Literal["stop", "length"]


class AssistantMessage(Closed):
    """The answer to a chat."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    """One answer to a chat."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Closed):
    """A whole answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage


class MessageDelta(Closed):
    """What is new of a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(Choice):
    """What is new of an answer to a chat."""

    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


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


class Completion(Closed):
    """An answer of `/v1/completions`, or an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[TokenUsage | None]


class ScoreTotal(Closed):
    """Sums over an output's tokens; null where the probability is 0."""

    logprob: float | None
    models: dict[str, float | None]
    reward: float | None
    num_tokens: int


class ItemScore(Closed):
    """What a recipe and its models say of an output."""

    index: int
    tokens: list[ComponentsOfToken]
    total: ScoreTotal
    split_token: str | None
    """The token across the end of the prompt, where there is one."""


class ScoreList(Closed):
    """The answer of `/v1/score`."""

    object: Literal["list"]
    model: str
    data: list[ItemScore]
    usage: TokenUsage
