"""The requests of the OpenAI API that are served; unknown or unsupported parameters are refused, never ignored.

Types are strict: `"1"` is not a number. Sampling defaults are OpenAI's.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from eft_serve.api.knobs import EftKnobs, Strict
from eft_serve.types import SamplingParams

MAX_CHOICES = 16
MAX_STOP_STRINGS = 16  # OpenAI accepts 4; each is searched for in every token's text
MAX_STOP_CHARACTERS = 256
SEED_RANGE = 2**63


def _stop_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _text(content: object) -> object:
    """A message's text; parts of text are joined by line breaks."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("content parts other than text are not supported yet")
        texts.append(part["text"])
    return "\n".join(texts)


def _one_prompt(value: object) -> object:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        return _one_prompt(value[0])
    if isinstance(value, list) and value and all(isinstance(v, str | list) for v in value):
        raise ValueError("several prompts in one request are not supported yet; send a request for each")
    return _text_or_ids(value)


def _text_or_ids(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, list) and all(type(v) is int for v in value)):
        return value
    raise ValueError("must be a string or a list of token ids")


TextOrIds = Annotated[str | list[int], BeforeValidator(_text_or_ids)]


class StreamOptions(Strict):
    """What a stream carries besides tokens."""

    include_usage: bool = False
    """One more chunk at the end, without choices and with `usage`."""


class GenerationBody(Strict):
    """What chat and text completions have in common."""

    model: str = Field(max_length=256)
    """A recipe's name, or a plain model's."""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    """Keep the k likeliest tokens; 0 and -1 keep all."""
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """Drop tokens less likely than this fraction of the likeliest token's probability."""
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """Generate this many, and answer with the n whose tokens have the largest reward."""
    seed: int | None = Field(default=None, ge=-SEED_RANGE, lt=SEED_RANGE)
    """Same seed, same request, same tokens; taken modulo 2^63."""
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
            Field(max_length=MAX_STOP_STRINGS),
            BeforeValidator(_stop_list),
        ]
        | None
    ) = None
    ignore_eos: bool = False
    return_token_ids: bool | None = None
    """vLLM's: every choice also has `token_ids`."""
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted and not used."""
    eft: EftKnobs = EftKnobs()

    @field_validator("best_of")
    @classmethod
    def _best_of_is_enough(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n") or 1
        if best_of is not None and best_of < n:
            raise ValueError(f"must be at least n, which is {n}")
        if best_of is not None and best_of > n and info.data.get("stream"):
            raise ValueError("what is streamed cannot be chosen from any more; let it be n, or stream be false")
        return best_of

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        return self.best_of or self.num_choices

    @property
    def is_ranked(self) -> bool:
        """Whether there is something to rank; `best_of` 1 changes nothing."""
        return self.best_of is not None and self.best_of > 1

    @property
    def components(self) -> int | None:
        """As the coordinator takes it: to rank answers, it needs their rewards."""
        return 0 if self.is_ranked and self.eft.components is None else self.eft.components

    def sampling(self, max_tokens: int, seed: int) -> SamplingParams:
        """How to draw one choice's tokens; `seed` is that choice's own."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            seed=seed,
            max_tokens=max_tokens,
            stop=tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
        )

    @property
    def requested_tokens(self) -> int | None:
        """The tokens asked for; None for the server's default."""
        return self.max_tokens

    @property
    def limit_param(self) -> str:
        """The parameter that `requested_tokens` is of."""
        return "max_tokens"


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is OpenAI's newer name for `system` and is rendered as `system`."""
    content: Annotated[str, BeforeValidator(_text)]

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "name": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "function_call": (),
        "tool_calls": ([],),
    }

    @property
    def rendered(self) -> dict[str, str]:
        """In the form that chat templates take."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name for `max_tokens`."""

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (),
        "frequency_penalty": (0, 0.0),
        "function_call": ("none",),
        "functions": ([],),
        "logit_bias": ({},),
        "logprobs": (False,),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),  # without tools there is nothing to call
        "prediction": (),
        "presence_penalty": (0, 0.0),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "verbosity": (),
        "web_search_options": (),
    }

    @model_validator(mode="after")
    def _one_limit(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self

    @property
    def requested_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_param(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]
    """Text, or token ids where all models that run share a tokenizer."""

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "echo": (False,),
        "frequency_penalty": (0, 0.0),
        "logit_bias": ({},),
        "logprobs": (),
        "presence_penalty": (0, 0.0),
        "suffix": ("",),
    }


def choice_seed(seed: int | None, choice: int) -> int:
    """The seed of one choice, 0 <= seed < 2^63: the request's own for the first, so that n=1 and n=2 begin alike."""
    if seed is None:
        return secrets.randbelow(SEED_RANGE)
    # splitmix64's increment keeps the choices of neighbouring seeds apart
    return (seed + choice * 0x9E3779B97F4A7C15) % SEED_RANGE
