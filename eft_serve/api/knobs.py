"""What a request may say beyond OpenAI's API: the object `eft`, validated strictly like every other."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, field_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from eft_serve.ensemble import Knobs
from eft_serve.types import MAX_ALTERNATIVES, MAX_DRAFT_TOKENS


def _whole(value: object) -> object:
    """JSON has one kind of number, and some clients write 2 as 2.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_numbers(values: list[Any]) -> list[Any]:
    """A list of numbers, with 2.0 as 2; costs nothing where all are integers."""
    return values if all(type(value) is int for value in values) else [_whole(value) for value in values]


Finite = Field(allow_inf_nan=False)
Whole = Annotated[int, BeforeValidator(_whole)]
NumAlternatives = Annotated[Whole, Field(ge=0, le=MAX_ALTERNATIVES)]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]
"""Within OpenAI's bounds."""


class Strict(BaseModel):
    """A JSON object that is validated strictly."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Parameters that are not served yet, each with the values besides null that change nothing."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        no_ops = {name: {"enum": [None, *values]} for name, values in cls.NO_OPS.items()}
        schema.setdefault("properties", {}).update(no_ops)
        return schema


def mistake(param: str, message: str) -> PydanticCustomError:
    """Of a validator: the error of a field within the one that it validates, or of several fields together."""
    return PydanticCustomError("cross_field", "{message}", {"param": param, "message": message})


class SpeculativeKnobs(Strict):
    """How tokens are drafted; what is not given is the recipe's own. Changes how soon tokens come, not which."""

    draft: str | None = Field(default=None, max_length=256)
    """`auto`, `none`, or a model of the recipe."""
    num_tokens: Whole | None = Field(default=None, ge=1, le=MAX_DRAFT_TOKENS)
    """Draft tokens at a time, at most."""
    min_confidence: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """The drafter goes on while it gives its draft tokens this probability, all together; 0 never stops it."""
    overlap: bool | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that were given."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


class RecipeKnobs(Strict):
    """The knobs of emulated fine-tuning, within the recipe's bounds; what is not given is the recipe's own."""

    scale: Annotated[float, Finite] | None = None
    """beta: how much of the pre-training scale-up."""
    weights: dict[str, Annotated[float, Finite]] | None = None
    """alpha by fine-tuning: how much of each."""
    truncate_top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """The scale-up counts only in this nucleus of what there is at scale 0; 1 counts it everywhere."""

    @property
    def knobs(self) -> Knobs:
        """As a recipe takes them."""
        return Knobs(scale=self.scale, weights=self.weights, truncate_top_p=self.truncate_top_p)


class EftKnobs(RecipeKnobs):
    """The knobs, and what a generation reports of itself."""

    speculative: SpeculativeKnobs = SpeculativeKnobs()
    report: bool = False
    """`usage` also says how many draft tokens were accepted and rejected."""
    components: NumAlternatives | None = None
    """Every choice also has what each model says of its tokens; with a number, also of that many alternatives."""

    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] | None = None
    """`logprobs` before all controls (the default) or after them, temperature and top-p among them; vLLM's names."""

    @field_validator("components", mode="before", json_schema_input_type=bool | NumAlternatives | None)
    @classmethod
    def _true_wants_no_alternatives(cls, value: object) -> object:
        return (0 if value else None) if isinstance(value, bool) else value
