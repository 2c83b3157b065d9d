"""The requests of the OpenAI API that are served; unknown or unsupported parameters are refused, never ignored.

Types are strict: `"1"` is not a number. Sampling defaults are OpenAI's.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from eft_serve.api.knobs import Strict, Whole, whole_numbers
from eft_serve.api.knobs import mistake as _mistake
from eft_serve.api.messages import Messages
from eft_serve.api.prompt_options import PromptOptions, TemplateKwargs, Truncation
from eft_serve.api.role_prompts import GenerationKnobs
from eft_serve.api.structured_outputs import ResponseFormat, StructuredOutputs, grammar_of
from eft_serve.api.tools import MAX_TOOLS, ActiveTools, Tool, ToolChoice
from eft_serve.types import MAX_ALTERNATIVES, Grammar, SamplingParams

MAX_CHOICES = 16
MAX_PROMPTS = 128  # in one request
MAX_ANSWERS = 256  # generated for one request
MAX_STOP_STRINGS = 16  # OpenAI accepts 4; each is searched for in every token's text
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_ALLOWED = 2**15
SEED_RANGE = 2**63


def _stop_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompts(value: object) -> object:
    """One prompt or several, as a list of several."""
    if isinstance(value, list) and value and all(isinstance(each, str | list) for each in value):
        return value
    return [_text_or_ids(value)]


def _text_or_ids(value: object) -> object:
    value = whole_numbers(value) if isinstance(value, list) else value
    if isinstance(value, str) or (isinstance(value, list) and all(type(each) is int for each in value)):
        return value
    raise ValueError("must be a string or a list of token ids")


TokenId = Annotated[Whole, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
TextOrIds = Annotated[str | list[int], BeforeValidator(_text_or_ids, json_schema_input_type=str | TokenIds)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]


def _given(value: object) -> object:
    """`null` is the default."""
    return GenerationKnobs() if value is None else value


def _check_kept(num_tokens: int) -> int:
    if num_tokens != -1 and not 1 <= num_tokens < 2**31:
        raise ValueError("must be at least 1, or -1 for what the context has room for")
    return num_tokens


class StreamOptions(Strict):
    """What a stream carries besides tokens."""

    include_usage: bool = False
    """One more chunk at the end, without choices and with `usage`."""
    continuous_usage_stats: bool = False
    """vLLM's: `usage` so far in every chunk."""
    include_obfuscation: Literal[False] | None = None
    """No chunk is padded."""


VLLM_NO_OPS: dict[str, tuple[Any, ...]] = {
    "cache_salt": (),
    "length_penalty": (1, 1.0),
    "logits_processors": (),
    "mm_processor_kwargs": (),
    "priority": (0,),
    "request_id": (),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}
"""Parameters of vLLM that are not served, each with the values besides null that change nothing."""


class GenerationBody(Strict):
    """What chat and text completions have in common."""

    model: str = Field(max_length=256)
    """A recipe's name, or a plain model's."""
    max_tokens: Whole | None = Field(default=None, ge=1, lt=2**31)
    """Of the answer, at most; `server.default_max_tokens` by default, or what the context has room for."""
    min_tokens: Whole | None = Field(default=None, ge=0, lt=2**31)
    """Neither an end token nor a stop string ends the output before."""
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    """Divides the logits; 0 takes the likeliest token, 1 is the default."""
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Keep the likeliest tokens that have this probability together."""
    top_k: Whole | None = Field(default=None, ge=-1, le=2**31 - 1)
    """Keep the k likeliest tokens; 0 and -1 keep all."""
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """Drop tokens less likely than this fraction of the likeliest token's probability."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    """Subtracted from the logits of tokens that the output has."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    """Subtracted from the logits of tokens for each time that the output has them."""
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
    prompt_logprobs: Whole | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """vLLM's: the log-probabilities of the prompt's tokens too, and of this many alternatives to each."""
    bad_words: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]], Field(max_length=MAX_BAD_WORDS)
        ]
        | None
    ) = None
    """Tokens of these texts that are never generated in this order, with a space before them or without."""
    response_format: ResponseFormat | None = None
    """The answer is a JSON document, of a schema if one is given."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's: the answer follows a schema, a regular expression or a grammar."""
    n: Whole | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """Answers to each prompt."""
    stream: bool | None = None
    """Tokens are sent as they come, as server-sent events."""
    best_of: Whole | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """Generate this many, and answer with the n whose tokens have the largest reward."""
    seed: Whole | None = Field(default=None, ge=-SEED_RANGE, lt=SEED_RANGE)
    """Same seed, same request, same tokens; taken modulo 2^63."""
    stop: (
        Annotated[StopStrings, BeforeValidator(_stop_list, json_schema_input_type=StopString | StopStrings)] | None
    ) = None
    """Texts that end the output; they are not part of it."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    """Tokens that end the output, as end tokens do."""
    include_stop_str_in_output: bool | None = None
    """The stop string, or the token that ends the output, is part of the text."""
    skip_special_tokens: bool | None = None
    """False shows special tokens in the text; the default does not."""
    ignore_eos: bool | None = None
    """End tokens do not end the output."""
    return_token_ids: bool | None = None
    """vLLM's: every choice also has `token_ids`."""
    stream_options: StreamOptions | None = None
    """`include_usage`, and vLLM's `continuous_usage_stats`."""
    user: str | None = None
    """Accepted and not used."""
    truncate_prompt_tokens: Annotated[Whole, AfterValidator(_check_kept)] | None = None
    """vLLM's: keep only so many of each prompt's tokens, its last ones; -1 keeps what the context has room for."""
    eft: Annotated[GenerationKnobs, BeforeValidator(_given, json_schema_input_type=GenerationKnobs | None)] = (
        GenerationKnobs()
    )
    """The knobs of emulated fine-tuning, and what an answer reports of them, see [below](#eft)."""

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
        if self.prompt_logprobs is not None and self.stream:
            raise _mistake("prompt_logprobs", "is not streamed; let stream be false")
        if self.structured_outputs is not None and self.is_structured_by_format:
            raise _mistake("structured_outputs", f"{self.form_param} asks for a form too; send one of them")
        return self

    def prompt_options(self, default_max_tokens: int | None) -> PromptOptions:
        """How its prompts are made.

        Args:
            default_max_tokens: of the answer, where the request does not say.
        """
        kept = self.truncate_prompt_tokens
        truncation = (
            None
            if kept is None
            else Truncation(num_tokens=kept, max_tokens=self.requested_tokens, default_max_tokens=default_max_tokens)
        )
        return PromptOptions(truncation=truncation)

    @property
    def active_tools(self) -> ActiveTools | None:
        """The tools that an answer may call."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether an answer begins with the text of its prompt."""
        return False

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives to each token of the prompt whose log-probabilities are wanted; None: of no prompt."""
        return self.prompt_logprobs

    @property
    def prompt_logprobs_param(self) -> str:
        """The parameter that asks for them."""
        return "prompt_logprobs"

    @property
    def form(self) -> ResponseFormat | None:
        """That the answer has; None for any text."""
        return self.response_format

    @property
    def form_param(self) -> str:
        """The parameter that says so."""
        return "response_format"

    @property
    def is_structured_by_format(self) -> bool:
        return self.form is not None and self.form.type != "text"

    def grammar(self) -> Grammar | None:
        """That its answers follow; raises as `grammar_of`."""
        return grammar_of(self.form, self.structured_outputs, self.form_param)

    @property
    def is_structured(self) -> bool:
        """Whether its answers follow a grammar."""
        return self.structured_outputs is not None or self.is_structured_by_format

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
        grammar: Grammar | None = None,
        markers: Iterable[int] = (),
    ) -> SamplingParams:
        """How to draw one choice's tokens.

        Args:
            seed: that choice's own.
            bad_words: the tokens of each.
            stop_token_ids: of the stop strings that are special tokens.
            grammar: of the answer.
            markers: special tokens that begin or end tool calls.
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
            shown_special_token_ids=tuple(markers),
            ignore_eos=bool(self.ignore_eos),
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items()),
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(set(self.allowed_token_ids)),
            bad_words=bad_words,
            grammar=grammar,
        )

    @property
    def requested_tokens(self) -> int | None:
        """The tokens asked for; None for the server's default."""
        return self.max_tokens

    @property
    def limit_param(self) -> str:
        """The parameter that `requested_tokens` is of."""
        return "max_tokens"


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Messages
    """The conversation, rendered by each model's own chat template, see [below](#prompts)."""
    max_completion_tokens: Whole | None = Field(default=None, ge=1, lt=2**31)
    """OpenAI's newer name for `max_tokens`."""
    logprobs: bool | None = None
    """Each choice also has the log-probabilities of its tokens."""
    top_logprobs: Whole | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """Alternatives to each token whose log-probabilities are wanted too."""
    add_generation_prompt: bool | None = None
    """vLLM's: the prompt ends where the assistant begins to speak. The default, unless a message is continued."""
    continue_final_message: bool | None = None
    """vLLM's: the answer goes on with the text of the last message, which must be the assistant's."""
    add_special_tokens: bool | None = None
    """vLLM's: true adds the tokenizer's special tokens to those that chat templates bring."""
    chat_template_kwargs: TemplateKwargs | None = None
    """vLLM's: more arguments of every model's chat template."""
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    """Functions that the answer may call, where the recipe has a `tool_parser`."""
    tool_choice: ToolChoice | None = None
    """`auto` by default; with `required` a grammar makes the answer calls, with a function's name one call of it."""
    parallel_tool_calls: bool | None = None
    """False: at most one call in an answer."""
    metadata: dict[str, str] | None = None
    """Accepted and not used."""
    prompt_cache_key: str | None = None
    """Accepted and not used."""
    safety_identifier: str | None = None
    """Accepted and not used."""

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = VLLM_NO_OPS | {
        "audio": (),
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "include_reasoning": (True, False),  # there is none
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": (),
        "web_search_options": (),
    }

    @model_validator(mode="after")
    def _chat_fields_agree(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _mistake("max_completion_tokens", "differs from max_tokens; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise _mistake("top_logprobs", "needs logprobs to be true")
        if self.continue_final_message and self.add_generation_prompt:
            raise _mistake("add_generation_prompt", "contradicts continue_final_message; leave one of them out")
        if self.active_tools is not None and self.is_structured:
            param = self.form_param if self.is_structured_by_format else "structured_outputs"
            raise _mistake(param, "leaves no room for tool calls; leave it or tools out")
        return self

    @property
    def active_tools(self) -> ActiveTools | None:
        return ActiveTools.of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def prompt_options(self, default_max_tokens: int | None) -> PromptOptions:
        tools = self.active_tools
        called = next((f"messages.{i}" for i, message in enumerate(self.messages) if message.is_of_tools), None)
        options = PromptOptions.of_chat(
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            template_kwargs=self.chat_template_kwargs,
            add_special_tokens=self.add_special_tokens,
            truncation=super().prompt_options(default_max_tokens).truncation,
        )
        shown = None if tools is None else tools.rendered
        return replace(options, tools=shown, tool_param=called if tools is None else "tools")

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def requested_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_param(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"


PromptInput = str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[
        list[TextOrIds], Field(max_length=MAX_PROMPTS), BeforeValidator(_prompts, json_schema_input_type=PromptInput)
    ]
    """Text, or token ids where all models that run share a tokenizer; or a list of either."""
    suffix: str | None = None
    """The answer is the middle between a text prompt and this, where the models have fill-in-the-middle tokens."""
    echo: bool | None = None
    """The prompt's text, and its log-probabilities if `logprobs` wants any, come before the answer's."""
    max_tokens: Whole | None = Field(default=None, ge=0, lt=2**31)
    """16 by default; 0, with `echo` or `prompt_logprobs`, generates nothing."""
    add_special_tokens: bool | None = None
    """vLLM's: false leaves out the tokenizer's special tokens."""
    logprobs: Whole | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """Each choice also has the log-probabilities of its tokens, and of this many alternatives to each."""

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = VLLM_NO_OPS | {}

    @model_validator(mode="after")
    def _completion_fields_agree(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise _mistake("max_tokens", "0 needs echo or prompt_logprobs; ask for at least 1")
        if self.suffix and self.truncate_prompt_tokens is not None:
            raise _mistake("suffix", "leaves no prompt to truncate; leave one of them out")
        if self.suffix and self.num_prompt_logprobs is not None:
            raise _mistake("suffix", f"is part of the prompt then; leave it or {self.prompt_logprobs_param} out")
        if len(self.prompt) * self.num_candidates > MAX_ANSWERS:
            asked = f"{len(self.prompt)} prompts with {self.num_candidates} answers each"
            raise _mistake("prompt", f"{asked} are more than {MAX_ANSWERS}; send several requests")
        return self

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def num_prompt_logprobs(self) -> int | None:
        wanted = [self.logprobs if self.echo else None, self.prompt_logprobs]
        return max((count for count in wanted if count is not None), default=None)

    @property
    def prompt_logprobs_param(self) -> str:
        return "echo" if self.prompt_logprobs is None else "prompt_logprobs"

    def prompt_options(self, default_max_tokens: int | None) -> PromptOptions:
        return replace(
            super().prompt_options(default_max_tokens),
            special_tokens_in_texts=self.add_special_tokens is not False,
            suffix=self.suffix,
        )

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


def choice_seed(seed: int | None, choice: int) -> int:
    """The seed of one choice, 0 <= seed < 2^63: the request's own for the first, so that n=1 and n=2 begin alike."""
    if seed is None:
        return secrets.randbelow(SEED_RANGE)
    # splitmix64's increment keeps the choices of neighbouring seeds apart
    return (seed + choice * 0x9E3779B97F4A7C15) % SEED_RANGE
