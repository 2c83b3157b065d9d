"""The configuration of an application: which models run where, and which recipes combine them.

Everything is validated at construction and never changes afterwards; unknown keys are refused. What needs the
checkpoints themselves (vocabularies, sizes) is checked by `eft_serve.config_check`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from eft_serve.errors import ConfigError

ZOO_PREFIX = "zoo:"
ZOO_CHECKPOINTS = Path(__file__).parent / "zoo" / "checkpoints"
MAX_GUESSES = 16
DRAFTERS = ("auto", "ngram", "none")  # beside the recipe's own models
MAX_KNOB = 100.0  # far beyond any use; keeps |logit| * knob finite in fp32


def _check_name(name: str) -> str:
    if not name or not all(c.isalnum() or c in "-_." for c in name):
        raise ValueError(f"name {name!r} may hold letters, digits, '-', '_' and '.' only")
    return name


Name = Annotated[str, AfterValidator(_check_name)]
Knob = Annotated[float, Field(ge=-MAX_KNOB, le=MAX_KNOB, allow_inf_nan=False)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Resources(_Frozen):
    """What one replica of a deployment takes from its node."""

    num_cpus: float = Field(default=1.0, ge=0)
    """CPU cores; Ray sets the math libraries' thread count from it."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs; a tensor-parallel model needs one per rank."""
    node_labels: dict[str, str] = {}
    """Ray node labels that the node must carry, e.g. `{eft-serve.io/role: base}`."""
    custom: dict[str, float] = {}
    """Custom Ray resources."""


class ModelConfig(_Frozen):
    """One model: where its weights are and how its engine runs."""

    path: str
    """A `transformers` directory, or `zoo:NAME` for a model of the embedded family."""
    dtype: Dtype = "auto"
    """Arithmetic of the forward; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when the replica was given one."""
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """Ranks that share the model; all on one node."""
    num_replicas: int = Field(default=1, ge=1)
    """Replicas of the whole model."""
    resources: Resources = Resources()
    """Per replica."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest sequence, in tokens; the checkpoint's own limit when not set."""
    kv_cache_tokens: int | None = Field(default=None, ge=1)
    """KV budget of one replica, in tokens; when not set, 32,768 on a CPU and `kv_cache_fraction` of a GPU."""
    kv_cache_fraction: float = Field(default=0.85, gt=0, le=1)
    """Part of a GPU's memory for weights and KV cache together."""
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """Tokens in one forward; larger steps are split."""
    lease_s: float = Field(default=120.0, gt=0)
    """A sequence that nobody stepped for so long is freed."""
    startup_timeout_s: float = Field(default=600.0, gt=0)
    """Loading and joining the tensor-parallel group must end within this."""

    @property
    def checkpoint(self) -> Path:
        """The directory with the weights."""
        if self.path.startswith(ZOO_PREFIX):
            return ZOO_CHECKPOINTS / self.path.removeprefix(ZOO_PREFIX)
        return Path(self.path).expanduser()


class TunedConfig(_Frozen):
    """One fine-tuning: the model that has it, and the one that it was tuned from."""

    model: Name
    reference: Name | None = None
    """Default: the recipe's reference."""
    weight: Knob = 1.0
    """alpha: how much of this fine-tuning."""


class SpeculativeConfig(_Frozen):
    """How a recipe's tokens are guessed ahead (arXiv 2310.12962). No setting changes their distribution."""

    draft: Name = "auto"
    """Who guesses: `auto`, the tuned model of the largest weight; `ngram`, the text itself, by what followed its newest
    tokens before; `none`, nobody; or a model of the recipe."""
    num_tokens: int | None = Field(default=None, ge=1, le=MAX_GUESSES)
    """Guesses at a time; when not set, as many as pay, by measure: none where none pay."""
    method: Literal["keyed", "classic"] = "keyed"
    """`keyed`: a guess stands when plain decoding with the same seed draws it, so tokens are the same with and without.
    `classic`: rejection sampling; other tokens, of the same distribution."""
    overlap: bool = True
    """Guess on while guesses are verified."""


class RecipeConfig(_Frozen):
    """A named virtual model: `ref + scale * (base - ref) + sum_i weight_i * (tuned_i - ref_i)` (arXiv 2310.12962)."""

    base: Name
    """The model whose pre-training is wanted."""
    reference: Name
    """The pre-trained model that the fine-tuning started from."""
    tuned: tuple[TunedConfig, ...] = Field(min_length=1)
    """The fine-tunings, each with its weight."""
    scale: Knob = 1.0
    """beta: how much of the pre-training scale-up."""
    speculative: SpeculativeConfig = SpeculativeConfig()
    """How tokens are guessed ahead."""

    @model_validator(mode="after")
    def _drafter_is_known(self) -> Self:
        if self.speculative.draft not in {*DRAFTERS, *self.models}:
            raise ValueError(
                f"speculative.draft: {self.speculative.draft!r} is not of this recipe; give one of "
                f"{[*DRAFTERS, *self.models]}"
            )
        return self

    @model_validator(mode="after")
    def _tuned_once(self) -> Self:
        names = [t.model for t in self.tuned]
        if len(set(names)) != len(names):
            raise ValueError(f"tuned: a model is named twice in {names}; give each once, with the weight that you want")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that the recipe may run, each once, base first."""
        refs = [t.reference or self.reference for t in self.tuned]
        return tuple(dict.fromkeys([self.base, self.reference, *(t.model for t in self.tuned), *refs]))


class CoordinatorConfig(_Frozen):
    """The decode loop."""

    num_replicas: int = Field(default=1, ge=1)
    resources: Resources = Resources()
    max_num_seqs: int = Field(default=64, ge=1)
    """Requests decoded together; more wait."""
    max_waiting: int = Field(default=1024, ge=0)
    """Requests that may wait; beyond it the answer is 503."""
    max_num_batched_tokens: int = Field(default=1024, ge=1)
    """Tokens per model and step; longer prompts are prefilled in chunks."""
    max_prefill_slowdown: float = Field(default=2.0, gt=1, allow_inf_nan=False)
    """A step may take so many times as long for the prompts that are prefilled beside decoding requests."""
    step_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of one call to one model."""
    recovery_timeout_s: float = Field(default=60.0, gt=0)
    """How long a request waits for a model that has no replica before it fails."""


class ServerConfig(_Frozen):
    """The HTTP side."""

    tenants_file: Path | None = None
    """YAML of tenants; without it only loopback clients are answered."""
    resources: Resources = Resources()
    default_max_tokens: int = Field(default=256, ge=1)
    """`max_tokens` of a request that names none."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of one request, from arrival to the last token."""


class AppConfig(_Frozen):
    """One application: models, the recipes over them, and how they are served."""

    models: dict[Name, ModelConfig] = Field(min_length=1)
    recipes: dict[Name, RecipeConfig] = {}
    coordinator: CoordinatorConfig = CoordinatorConfig()
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _names_resolve(self) -> Self:
        for name, recipe in self.recipes.items():
            if name in self.models:
                raise ValueError(f"recipes.{name}: a model has this name too; rename the recipe")
            for model in recipe.models:
                if model not in self.models:
                    raise ValueError(f"recipes.{name}: unknown model {model!r}; models are {sorted(self.models)}")
        return self

    @classmethod
    def parse(cls, data: Any, source: str = "config") -> AppConfig:
        """Validate plain data; raises `ConfigError` that names every mistake, one a line."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = [
                f"{source}: {'.'.join(str(p) for p in e['loc']) or '(top level)'}: {e['msg']}" for e in error.errors()
            ]
            raise ConfigError("\n".join(lines)) from error
