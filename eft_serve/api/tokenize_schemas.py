"""The requests of `POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from eft_serve.api.knobs import Strict, mistake, whole_numbers
from eft_serve.api.messages import Messages
from eft_serve.api.prompt_options import PromptOptions, TemplateKwargs
from eft_serve.api.reader import Asked

MAX_TOKENS = 2**17  # in one request, or as many as a model's context has


def _ids(value: object) -> object:
    return whole_numbers(value) if isinstance(value, list) else value


class TokenizeOptions(Strict):
    """What texts and chats have in common."""

    model: str = Field(max_length=256)
    """A recipe's name, or a plain model's."""
    return_token_strs: bool | None = None
    """The answer also has `token_strs`, the tokens as the vocabulary has them."""

    @property
    def asked(self) -> Asked:
        """What is to be tokenised."""
        raise NotImplementedError

    @property
    def prompt_options(self) -> PromptOptions:
        """How the prompt is made."""
        raise NotImplementedError


class TokenizeBody(TokenizeOptions):
    """`POST /tokenize` of a text, which is read as the prompt of a text completion."""

    prompt: str
    add_special_tokens: bool | None = None
    """False leaves out the tokenizer's special tokens."""

    @property
    def asked(self) -> Asked:
        return Asked(self.prompt, "prompt")

    @property
    def prompt_options(self) -> PromptOptions:
        return PromptOptions(special_tokens_in_texts=self.add_special_tokens is not False)


class TokenizeChatBody(TokenizeOptions):
    """`POST /tokenize` of messages, which are read as those of a chat."""

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "chat_template": (),
        "media_io_kwargs": (),
        "mm_processor_kwargs": (),
        "tools": ([],),
    }

    @model_validator(mode="after")
    def _fields_agree(self) -> TokenizeChatBody:
        if self.continue_final_message and self.add_generation_prompt:
            raise mistake("add_generation_prompt", "contradicts continue_final_message; leave one of them out")
        return self

    @property
    def asked(self) -> Asked:
        return Asked([message.rendered for message in self.messages], "messages")

    @property
    def prompt_options(self) -> PromptOptions:
        return PromptOptions.of_chat(
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            template_kwargs=self.chat_template_kwargs,
            add_special_tokens=self.add_special_tokens,
        )


class DetokenizeBody(Strict):
    """`POST /detokenize`."""

    model: str = Field(max_length=256)
    """A recipe's name, or a plain model's."""
    tokens: Annotated[list[int], Field(fail_fast=True), BeforeValidator(_ids)]
    """Token ids, at most `MAX_TOKENS` of them, or as many as the model's context has."""
