"""What answers about given texts look like: scores and tokens."""

from __future__ import annotations

from typing import Literal

from eft_serve.api.answers import Closed, ComponentsOfToken, TokenUsage


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


class Tokens(Closed):
    """The answer of `/v1/tokenize`, in vLLM's shape."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    """As the vocabulary has them, where they are wanted."""


class DetokenizedText(Closed):
    """The answer of `/v1/detokenize`."""

    prompt: str
