"""The requests of the OpenAI API that are served; unknown or unsupported parameters are refused, never ignored.

Types are strict: `"1"` is not a number. Sampling defaults are OpenAI's.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from eft_serve.api.knobs import EftKnobs, Strict, Whole
from eft_serve.types import MAX_ALTERNATIVES, SamplingParams

MAX_CHOICES = 16
MAX_STOP_STRINGS = 16  # OpenAI accepts 4; each is searched for in every token's text
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_ALLOWED = 2**15
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
        if len(part) > 2:
            raise ValueError("a content part of text has type and text, and nothing else")
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


TokenId = Annotated[Whole, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
TextOrIds = Annotated[str | list[int], BeforeValidator(_text_or_ids, json_schema_input_type=str | TokenIds)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]


def _given(value: object) -> object:
    """`null` is the default."""
    return EftKnobs() if value is None else value


def _mistake(param: str, message: str) -> PydanticCustomError:
    """Of several fields together; the parameter is named by its context."""
    return PydanticCustomError("cross_field", "{message}", {"param": param, "message": message})


class StreamOptions(Strict):
    """What a stream carries besides tokens."""

    include_usage: bool = False
    """One more chunk at the end, without choices and with `usage`."""
    continuous_usage_stats: bool = False
    """vLLM's: `usage` so far in every chunk."""


VLLM_NO_OPS: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "cache_salt": (),
    "length_penalty": (1, 1.0),
    "logits_processors": (),
    "mm_processor_kwargs": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "request_id": (),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Parameters of vLLM that are not served, each with the values besides null that change nothing."""


class GenerationBody(Strict):
    """What chat and text completions have in common."""

    model: str = Field(max_length=256)
    """A recipe's name, or a plain model's."""
    max_tokens: Whole | None = Field(default=None, ge=1, lt=2**31)
    min_tokens: Whole | None = Field(default=None, ge=0, lt=2**31)
    """Neither an end token nor a stop string ends the output before."""
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: Whole | None = Field(default=None, ge=-1, le=2**31 - 1)
    """Keep the k likeliest tokens; 0 and -1 keep all."""
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """Drop tokens less likely than this fraction of the likeliest token's probability."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    """Subtracted from the logits of tokens that the output has."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    """The same, for each time that the output has them."""
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100, allow_inf_nan=False)
    """Divides positive logits and multiplies others, of tokens in the prompt or the output; 1 changes nothing."""
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    """By token id, added to the token's logit; -100 makes it as good as impossible."""
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED)] | None = None
    """Only these tokens may be generated."""
    bad_words: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]], Field(max_length=MAX_BAD_WORDS)
        ]
        | None
    ) = None
    """Tokens of these texts that are never generated in this order, with a space before them or without."""
    n: Whole | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    best_of: Whole | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """Generate this many, and answer with the n whose tokens have the largest reward."""
    seed: Whole | None = Field(default=None, ge=-SEED_RANGE, lt=SEED_RANGE)
    """Same seed, same request, same tokens; taken modulo 2^63."""
    stop: (
        Annotated[StopStrings, BeforeValidator(_stop_list, json_schema_input_type=StopString | StopStrings)] | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    """Tokens that end the output, as end tokens do."""
    include_stop_str_in_output: bool | None = None
    """The stop string, or the token that ends the output, is part of the text."""
    skip_special_tokens: bool | None = None
    """False shows special tokens in the text; the default does not."""
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    """vLLM's: every choice also has `token_ids`."""
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted and not used."""
    eft: Annotated[EftKnobs, BeforeValidator(_given, json_schema_input_type=EftKnobs | None)] = EftKnobs()

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
    def _fields_agree(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise _mistake("stream_options", "needs stream to be true")
        options = self.stream_options
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise _mistake("stream_options.continuous_usage_stats", "needs include_usage to be true")
        if self.min_tokens and self.requested_tokens and self.min_tokens > self.requested_tokens:
            raise _mistake("min_tokens", f"{self.min_tokens} is more than {self.limit_param}, {self.requested_tokens}")
        if self.eft.logprobs_mode == "processed_logprobs" and self.components is not None:
            raise _mistake("eft.logprobs_mode", "components and best_of go by raw_logprobs; leave one of them out")
        if self.eft.logprobs_mode is not None and self.num_logprobs is None:
            raise _mistake("eft.logprobs_mode", "needs logprobs")
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

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to each token whose log-probabilities are wanted; None: no log-probabilities."""
        raise NotImplementedError

    def sampling(
        self,
        max_tokens: int,
        seed: int,
        bad_words: tuple[tuple[int, ...], ...] = (),
        stop_token_ids: Iterable[int] = (),
    ) -> SamplingParams:
        """How to draw one choice's tokens.

        Args:
            seed: that choice's own.
            bad_words: the tokens of each.
            stop_token_ids: of the stop strings that are special tokens.
        """
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=tuple(self.stop or ()),
            stop_token_ids=(*(self.stop_token_ids or ()), *stop_token_ids),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            skip_special_tokens=self.skip_special_tokens is not False,
            ignore_eos=bool(self.ignore_eos),
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items()),
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(set(self.allowed_token_ids)),
            bad_words=bad_words,
        )

    @property
    def requested_tokens(self) -> int | None:
        """The tokens asked for; None for the server's default."""
        return self.max_tokens

    @property
    def limit_param(self) -> str:
        """The parameter that `requested_tokens` is of."""
        return "max_tokens"


class ContentPart(TypedDict):
    """Text."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is OpenAI's newer name for `system` and is rendered as `system`."""
    content: Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[ContentPart])]
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


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(default=None, ge=1, lt=2**31)
    """OpenAI's newer name for `max_tokens`."""
    logprobs: bool | None = None
    """Each choice also has the log-probabilities of its tokens."""
    top_logprobs: Whole | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """And of this many alternatives to each."""
    metadata: dict[str, str] | None = None
    """Accepted and not used."""
    prompt_cache_key: str | None = None
    """Accepted and not used."""
    safety_identifier: str | None = None
    """Accepted and not used."""

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = VLLM_NO_OPS | {
        "add_generation_prompt": (True,),
        "audio": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "include_reasoning": (True, False),  # there is none
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),  # without tools there is nothing to call
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    @model_validator(mode="after")
    def _chat_fields_agree(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _mistake("max_completion_tokens", "differs from max_tokens; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise _mistake("top_logprobs", "needs logprobs to be true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def requested_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_param(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"


OnePrompt = Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=1)]


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt, json_schema_input_type=str | TokenIds | OnePrompt)]
    """Text, or token ids where all models that run share a tokenizer."""
    logprobs: Whole | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """Each choice also has the log-probabilities of its tokens, and of this many alternatives to each."""

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = VLLM_NO_OPS | {
        "add_special_tokens": (True,),
        "echo": (False,),
        "suffix": ("",),
    }

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


def choice_seed(seed: int | None, choice: int) -> int:
    """The seed of one choice, 0 <= seed < 2^63: the request's own for the first, so that n=1 and n=2 begin alike."""
    if seed is None:
        return secrets.randbelow(SEED_RANGE)
    # splitmix64's increment keeps the choices of neighbouring seeds apart
    return (seed + choice * 0x9E3779B97F4A7C15) % SEED_RANGE
