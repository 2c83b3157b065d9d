"""How a request wants its prompts made, and what it may not say of it. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from eft_serve.api.knobs import mistake
from eft_serve.errors import InvalidRequestError

MAX_TEMPLATE_KWARGS = 32
MAX_TEMPLATE_CHARACTERS = 16_384  # of all template arguments as JSON
RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "documents",
        "max_length",
        "messages",
        "padding",
        "raise_exception",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "self",
        "strftime_now",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""What rendering itself passes to a template, or takes as an argument of its own."""


def _check_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    if reserved := sorted(kwargs.keys() & RESERVED_KWARGS):
        raise mistake(reserved[0], "is not for a chat template's arguments; leave it out")
    try:
        size = len(json.dumps(kwargs))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if size > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(f"its {size} characters of JSON are more than {MAX_TEMPLATE_CHARACTERS}")
    return kwargs


TemplateKwargs = Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_KWARGS), AfterValidator(_check_kwargs)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """vLLM's `truncate_prompt_tokens`: only the last tokens of a prompt are kept."""

    num_tokens: int  # -1: as many as the context has room for beside the answer
    max_tokens: int | None = None  # of the answer, as the request has it
    default_max_tokens: int | None = None  # where it has not

    def keep(self, context: int) -> int:
        """Tokens to keep of a prompt, at least 1.

        Raises:
            InvalidRequestError: so many do not fit the context beside the answer.
        """
        room = context - (self.max_tokens or 1)
        if self.num_tokens > room:
            raise InvalidRequestError(
                f"truncate_prompt_tokens: {self.num_tokens} is more than the {room} tokens that a context of {context} "
                f"leaves beside an answer of {self.max_tokens or 1}; keep fewer",
                param="truncate_prompt_tokens",
            )
        if self.num_tokens != -1:
            return self.num_tokens
        wanted = context - (self.max_tokens or self.default_max_tokens or 1)
        return max(1, wanted if wanted > 0 else room)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """How the prompts of a request are made; by default as templates and tokenizers define."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The answer goes on with the last message's text."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Besides what every chat template gets."""
    special_tokens_in_chats: bool = False
    """The tokenizer adds its special tokens to those that a chat template brings."""
    special_tokens_in_texts: bool = True
    suffix: str | None = None
    """The answer is the middle between a text prompt and this."""
    tools: list[Any] | None = None
    """That chat templates show to the models."""
    tool_param: str | None = None
    """Which parameter needs chat templates that know tools; None: none does."""
    truncation: Truncation | None = None

    @classmethod
    def of_chat(
        cls,
        *,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        template_kwargs: Mapping[str, Any] | None,
        add_special_tokens: bool | None,
        truncation: Truncation | None = None,
    ) -> PromptOptions:
        """By the parameters of a chat; None is the default. After a continued message there is no generation prompt."""
        return cls(
            add_generation_prompt=not continue_final_message and add_generation_prompt is not False,
            continue_final_message=bool(continue_final_message),
            template_kwargs=template_kwargs or {},
            special_tokens_in_chats=bool(add_special_tokens),
            truncation=truncation,
        )


DEFAULT_OPTIONS = PromptOptions()
