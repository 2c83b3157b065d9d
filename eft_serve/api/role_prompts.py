"""`eft.prompts`: other messages, or another prompt, for single roles of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from eft_serve.api.knobs import EftKnobs, RecipeKnobs, Strict, whole_numbers
from eft_serve.api.messages import Message, Messages
from eft_serve.api.reader import Asked
from eft_serve.ensemble import Part

MAX_ROLES = 64
# Brackets keep these names of a union's branches out of the place that an error names.
_TEXT, _IDS, _MESSAGES = "[text]", "[ids]", "[messages]"


def _check_kind(value: object) -> object:
    value = whole_numbers(value) if isinstance(value, list) else value
    kinds = {type(each) for each in value} if isinstance(value, list) else set[type]()
    if not isinstance(value, str) and kinds not in ({int}, {dict}):
        raise ValueError("must be a string, a list of token ids, or a list of messages, and not empty")
    return value


def _kind_of(value: Any) -> str:
    if isinstance(value, list):
        return _IDS if value and isinstance(value[0], int) else _MESSAGES
    return _TEXT


RoleName = Annotated[str, Field(max_length=256)]
RolePrompt = Annotated[
    Annotated[Annotated[str, Field(min_length=1)], Tag(_TEXT)]
    | Annotated[Annotated[list[int], Field(min_length=1)], Tag(_IDS)]
    | Annotated[Messages, Tag(_MESSAGES)],
    Discriminator(_kind_of),
    BeforeValidator(_check_kind),
]


class RolePrompts(Strict):
    """What single roles of the recipe read instead of the request's own prompt."""

    prompts: Annotated[dict[RoleName, RolePrompt], Field(max_length=MAX_ROLES)] | None = None
    """By role: `base`, `reference`, a fine-tuning by the name of its weight, `<weight>/reference`. A text or token ids
    as for text completions, or messages as for chats; other roles read the request's own prompt."""

    def own(self, parts: Mapping[str, Part]) -> dict[str, Asked]:
        """The prompts of the terms that have one of their own, by the terms' names."""
        return {name: self._asked(part.prompt) for name, part in parts.items() if part.prompt is not None}

    def _asked(self, role: str) -> Asked:
        prompt, param = (self.prompts or {})[role], f"eft.prompts.{role}"
        if isinstance(prompt, str):
            return Asked(prompt, param)
        if messages := [each.rendered for each in prompt if isinstance(each, Message)]:
            return Asked(messages, param)
        return Asked([each for each in prompt if isinstance(each, int)], param)


class GenerationKnobs(EftKnobs, RolePrompts):
    """The object `eft` of a request for answers."""


class ScoreKnobs(RecipeKnobs, RolePrompts):
    """The object `eft` of a request for scores; its prompts are for all items."""
