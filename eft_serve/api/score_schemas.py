"""The requests of `POST /v1/score`."""

from __future__ import annotations

from pydantic import ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from eft_serve.api.knobs import NumAlternatives, Strict
from eft_serve.api.messages import Messages
from eft_serve.api.role_prompts import ScoreKnobs
from eft_serve.api.schemas import TextOrIds

MAX_ITEMS = 64  # in one request


def _has(name: str, *, but: str) -> JsonDict:
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}, but: {"type": "null"}}}


class ScoreItem(Strict):
    """An output to score, after its prompt."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [_has("prompt", but="messages"), _has("messages", but="prompt")]}
    )

    prompt: TextOrIds | None = None
    """Text or token ids, as for text completions."""
    messages: Messages | None = None
    """As for chats."""
    completion: TextOrIds
    """Text or token ids. Text is tokenised as it follows the prompt, without special tokens."""

    @model_validator(mode="after")
    def _has_one_prompt(self) -> ScoreItem:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class ScoreOptions(Strict):
    """What all items of a request have in common."""

    model: str = Field(max_length=256)
    """A recipe's name, or a plain model's."""
    eft: ScoreKnobs = ScoreKnobs()
    components: NumAlternatives = 0
    """How many of the likeliest alternatives to each token to report."""
    user: str | None = None
    """Accepted and not used."""


class ScoreBody(ScoreOptions):
    """`POST /v1/score`, several items."""

    items: list[ScoreItem] = Field(min_length=1, max_length=MAX_ITEMS)

    @property
    def placed(self) -> list[tuple[str, ScoreItem]]:
        """Every item, and the prefix of its fields' names."""
        return [(f"items.{i}.", item) for i, item in enumerate(self.items)]


class SingleScoreBody(ScoreOptions, ScoreItem):
    """`POST /v1/score`, one item's fields beside the options."""

    @property
    def placed(self) -> list[tuple[str, ScoreItem]]:
        """As `ScoreBody` has it."""
        return [("", self)]
