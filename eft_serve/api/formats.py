"""OpenAI's response objects, for chat and for text completions; plain dictionaries, ready for the encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from eft_serve.api.components import ComponentsFormat
from eft_serve.api.logprobs import ChatLogprobs, CompletionLogprobs, LogprobsFormat
from eft_serve.api.shown_prompts import ShownPrompt
from eft_serve.types import Delta, FinishReason, SpecDecodeStats, TokenComponents, Usage

JsonObject = dict[str, Any]


@dataclass(slots=True)
class Choice:
    """One answer, complete or in progress."""

    keeps: bool = True  # what it consists of; a streamed answer is gone once it is sent
    num_tokens: int = 0
    reward: float = 0.0  # the sum over all its tokens
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None  # once it is complete
    components: list[TokenComponents] = field(default_factory=list)  # of each token, where they are wanted
    prompt_logprobs: list[TokenComponents] = field(default_factory=list)  # of each prompt token but the first

    @property
    def spec_decode(self) -> SpecDecodeStats:
        return SpecDecodeStats() if self.usage is None else self.usage.spec_decode

    def add(self, delta: Delta) -> None:
        """Add what a delta brings."""
        self.num_tokens += len(delta.token_ids)
        self.reward += sum(token.reward for token in delta.components or ())
        self.finish_reason = delta.finish_reason
        self.usage = delta.usage or self.usage
        self.prompt_logprobs += delta.prompt_logprobs
        if self.keeps:
            self.text += delta.text
            self.token_ids += delta.token_ids
            self.components += delta.components or ()


def usage(
    num_prompt_tokens: int,
    choices: Sequence[Choice],
    with_report: bool,
    counted_model: str = "",
    num_candidates: int = 1,
) -> JsonObject:
    """Tokens used; a prompt counts once however many choices there are, as in OpenAI's API.

    Args:
        with_report: with the acceptance of draft tokens.
        counted_model: the model whose prompts they are.
        num_candidates: choices of each prompt.
    """
    num_generated = sum(choice.num_tokens for choice in choices)
    used: JsonObject = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt_tokens + num_generated,
    }
    firsts = [choice.usage.models for choice in choices[::num_candidates] if choice.usage is not None]
    if any(counted_model in models for models in firsts):
        cached = sum(models[counted_model].cached_tokens for models in firsts if counted_model in models)
        used["prompt_tokens_details"] = {"cached_tokens": min(cached, num_prompt_tokens)}
    if with_report:
        report = sum((choice.spec_decode for choice in choices), SpecDecodeStats())
        used["completion_tokens_details"] = {
            "accepted_prediction_tokens": report.num_accepted,
            "rejected_prediction_tokens": report.num_drafted - report.num_accepted,
        }
        used["eft"] = {
            "drafted": report.num_drafted,
            "accepted": report.num_accepted,
            "acceptance_rate": report.num_accepted / report.num_drafted if report.num_drafted else None,
            "tokens_per_base_pass": num_generated / report.num_passes if report.num_passes else None,
        }
    return used


class Format(Protocol):
    """The form of one endpoint's answers."""

    prefix: str
    whole: str
    part: str
    has_prompt_choices: bool  # its choices are of prompts, which they may show

    def logprobs(self, num_top: int, bytes_of: Callable[[int], bytes], hidden: frozenset[int]) -> LogprobsFormat:
        """The form of its log-probabilities.

        Args:
            num_top: alternatives to each token.
            bytes_of: a token's part of the text.
            hidden: tokens that the text does not show.
        """
        ...

    def opening(self, index: int) -> JsonObject | None:
        """What a choice's stream begins with."""
        ...

    def parts(self, index: int, text: str, finish_reason: FinishReason | None) -> list[JsonObject]:
        """A delta as stream choices; none when it holds nothing to show."""
        ...

    def choice_part(self, index: int) -> JsonObject:
        """A stream choice without text."""
        ...

    def choice(self, index: int, choice: Choice) -> JsonObject:
        """A whole choice."""
        ...


class ChatFormat:
    """`chat.completion`: a role first, then text, then an empty delta with the finish reason."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    has_prompt_choices = False

    def logprobs(self, num_top: int, bytes_of: Callable[[int], bytes], hidden: frozenset[int]) -> LogprobsFormat:
        return ChatLogprobs(num_top, bytes_of)

    def opening(self, index: int) -> JsonObject | None:
        return self._part(index, {"role": "assistant", "content": ""})

    def parts(self, index: int, text: str, finish_reason: FinishReason | None) -> list[JsonObject]:
        parts = [self._part(index, {"content": text})] if text else []
        return [*parts, self._part(index, {}, finish_reason)] if finish_reason else parts

    def choice_part(self, index: int) -> JsonObject:
        return self._part(index, {"content": ""})

    def choice(self, index: int, choice: Choice) -> JsonObject:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}

    @staticmethod
    def _part(index: int, delta: JsonObject, finish_reason: str | None = None) -> JsonObject:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class CompletionFormat:
    """`text_completion`: text, and the finish reason with the last of it."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"
    has_prompt_choices = True

    def logprobs(self, num_top: int, bytes_of: Callable[[int], bytes], hidden: frozenset[int]) -> LogprobsFormat:
        return CompletionLogprobs(num_top, bytes_of, hidden)

    def opening(self, index: int) -> JsonObject | None:
        return None

    def parts(self, index: int, text: str, finish_reason: FinishReason | None) -> list[JsonObject]:
        return [self._choice(index, text, finish_reason)] if text or finish_reason else []

    def choice_part(self, index: int) -> JsonObject:
        return self._choice(index, "", None)

    def choice(self, index: int, choice: Choice) -> JsonObject:
        return self._choice(index, choice.text, choice.finish_reason)

    @staticmethod
    def _choice(index: int, text: str, finish_reason: FinishReason | None) -> JsonObject:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all objects of one answer have in common."""

    format: Format
    id: str
    created: int  # Unix seconds
    model: str
    with_usage: bool = False  # every chunk has a usage field, null but in the last
    counted_model: str = ""  # whose prompt and cached tokens usage has
    with_report: bool = False  # usage says how many draft tokens were accepted
    with_token_ids: bool = False  # every choice has the ids of its tokens, as vLLM's `return_token_ids` gives them
    with_reward: bool = False  # every choice has that of all its tokens
    components: ComponentsFormat | None = None  # every choice has those of its tokens
    logprobs: LogprobsFormat | None = None  # every choice has those of its tokens
    with_running_usage: bool = False  # that in every chunk is the usage so far
    prompts: Sequence[ShownPrompt] = ()  # what is shown of each; none if nothing is
    num_choices: int = 1  # of each prompt
    num_candidates: int = 1  # of each prompt

    def whole(self, choices: Sequence[Choice], num_prompt_tokens: int, candidates: Sequence[Choice]) -> JsonObject:
        """The answer in one piece, with these of the candidates."""
        body = self._body(self.format.whole, [self._choice(i, c) for i, c in enumerate(choices)])
        if self.prompts and not self.format.has_prompt_choices:
            body["prompt_logprobs"] = self.prompts[0].logprobs(choices[0].prompt_logprobs)
        return body | {"usage": self._usage(num_prompt_tokens, candidates)}

    def _choice(self, index: int, choice: Choice) -> JsonObject:
        """A whole choice, with its prompt if that is shown."""
        reward = choice.reward if self.with_reward else None
        shown = self.format.choice(index, choice)
        prompt = self._prompt(index) if self.format.has_prompt_choices else None
        if prompt is None:
            return shown | self._extras(index, choice.token_ids, choice.components, reward)
        begun = None if prompt.text is None else self._echo(index, prompt, choice)
        shown |= self._extras(index, choice.token_ids, choice.components, reward)
        if begun is not None:
            shown["text"] = begun["text"] + shown["text"]
            if self.logprobs is not None:
                shown["logprobs"] = {name: begun["logprobs"][name] + more for name, more in shown["logprobs"].items()}
        return shown if prompt.num_top is None else shown | {"prompt_logprobs": prompt.logprobs(choice.prompt_logprobs)}

    def _echo(self, index: int, prompt: ShownPrompt, choice: Choice) -> JsonObject:
        """A completion's echo as a choice without output."""
        shown = self.format.choice_part(index) | {"text": prompt.text}
        if self.logprobs is None or prompt.text is None:
            return shown
        logprobs = self.logprobs.of_prompt(index, prompt.text, prompt.token_ids[0], choice.prompt_logprobs)
        return shown | {"logprobs": logprobs}

    def opening(self, index: int, choice: Choice) -> JsonObject | None:
        """What a choice's stream begins with, before its first token."""
        prompt = self._prompt(index)
        if prompt is None or prompt.text is None:
            return self.format.opening(index)
        return self._echo(index, prompt, choice)

    def _prompt(self, index: int) -> ShownPrompt | None:
        """What is shown of a choice's prompt."""
        return self.prompts[index // self.num_choices] if self.prompts else None

    def parts(self, index: int, delta: Delta, reward: float | None = None) -> list[JsonObject]:
        """A delta as stream choices; what it has besides text comes with the first, even where there is no text yet."""
        parts = self.format.parts(index, delta.text, delta.finish_reason)
        extras = self._extras(index, delta.token_ids, delta.components or (), reward) if delta.token_ids else {}
        if not extras:
            return parts
        first, *rest = parts or [self.format.choice_part(index)]
        return [first | extras, *rest]

    def _extras(
        self, index: int, token_ids: Sequence[int], components: Sequence[TokenComponents], reward: float | None
    ) -> JsonObject:
        extras: JsonObject = {"token_ids": token_ids} if self.with_token_ids else {}
        if self.logprobs is not None:
            extras["logprobs"] = self.logprobs.of(index, components)
        eft: JsonObject = {} if reward is None else {"reward": reward}
        if self.components is not None:
            eft["tokens"] = [self.components.token(token) for token in components]
        return extras | {"eft": eft} if eft else extras

    def chunk(self, part: JsonObject, num_prompt_tokens: int, choices: Sequence[Choice]) -> JsonObject:
        """One stream choice as a chunk."""
        body = self._body(self.format.part, [part])
        if self.with_running_usage:
            return body | {"usage": self._usage(num_prompt_tokens, choices)}
        return body | {"usage": None} if self.with_usage else body

    def usage_chunk(self, num_prompt_tokens: int, choices: Sequence[Choice]) -> JsonObject:
        """The last chunk, without choices."""
        return self._body(self.format.part, []) | {"usage": self._usage(num_prompt_tokens, choices)}

    def _body(self, kind: str, choices: list[JsonObject]) -> JsonObject:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _usage(self, num_prompt_tokens: int, choices: Sequence[Choice]) -> JsonObject:
        return usage(num_prompt_tokens, choices, self.with_report, self.counted_model, self.num_candidates)
