"""The configuration of an application: which models run where, and which recipes combine them.

Everything is validated at construction and never changes afterwards; unknown keys are refused. Checks that
need the checkpoints (vocabularies, sizes) are in `eft_serve.config_check`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from eft_serve.config_base import ANY_ORIGIN, Frozen, Name, Origin
from eft_serve.config_recipes import RecipeConfig, ToolFormat
from eft_serve.errors import ConfigError

ZOO_PREFIX = "zoo:"
ZOO_CHECKPOINTS = Path(__file__).parent / "zoo" / "checkpoints"


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Resources(Frozen):
    """What one replica of a deployment takes from its node."""

    num_cpus: float = Field(default=1.0, ge=0)
    """CPU cores; Ray sets the math libraries' thread count from it."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs; a tensor-parallel model needs one per rank."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that the node must carry, e.g. `{eft-serve.io/role: base}`."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources."""


class ModelConfig(Frozen):
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
    """KV budget of one replica, in tokens; by default 32,768 on a CPU and `kv_cache_fraction` of a GPU."""
    kv_cache_fraction: float = Field(default=0.85, gt=0, le=1)
    """Fraction of a GPU's memory for weights and KV cache together."""
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """Tokens in one forward; larger steps are split."""
    lease_s: float = Field(default=120.0, gt=0)
    """A sequence that was not stepped for this many seconds is freed."""
    startup_timeout_s: float = Field(default=600.0, gt=0)
    """Limit for loading the weights and joining the tensor-parallel group."""
    tool_parser: ToolFormat | None = None
    """How it writes tool calls where it is asked alone: `hermes` (also Qwen), `llama3_json` or `mistral`."""

    @property
    def checkpoint(self) -> Path:
        """The directory with the weights."""
        if self.path.startswith(ZOO_PREFIX):
            return ZOO_CHECKPOINTS / self.path.removeprefix(ZOO_PREFIX)
        return Path(self.path).expanduser()


class AdapterConfig(Frozen):
    """A LoRA fine-tuning of another model of the application; it shares that model's weights and deployment."""

    model: Name
    """The model that it adapts; it must have a `path`."""
    adapter: str
    """A PEFT directory with a LoRA: `adapter_config.json` and `adapter_model.safetensors`."""
    tool_parser: ToolFormat | None = None
    """As of a model."""

    @property
    def directory(self) -> Path:
        """Where the adapter's files are."""
        return Path(self.adapter).expanduser()


_MODEL, _ADAPTER = "<model>", "<adapter>"  # not valid names


def _kind_of(value: Any) -> str:
    is_adapter = "adapter" in value if isinstance(value, Mapping) else isinstance(value, AdapterConfig)
    return _ADAPTER if is_adapter else _MODEL


AnyModel = Annotated[
    Annotated[ModelConfig, Tag(_MODEL)] | Annotated[AdapterConfig, Tag(_ADAPTER)], Discriminator(_kind_of)
]


class CoordinatorConfig(Frozen):
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
    """Factor by which prefill may slow down a step with decoding requests."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where logits are combined and tokens sampled; `auto` takes a GPU when the coordinator was given one."""
    step_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of one call to one model."""
    recovery_timeout_s: float = Field(default=60.0, gt=0)
    """How long a request waits for a model without a replica before it fails."""


class ServerConfig(Frozen):
    """The HTTP side."""

    tenants_file: Path | None = None
    """YAML of tenants; without it only loopback clients are served."""
    resources: Resources = Resources()
    default_max_tokens: int | None = Field(default=None, ge=1)
    """`max_tokens` of a chat request that does not set it."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of one request, from arrival to the last token."""
    files_url: str | None = None
    """Where files and batches are kept: a directory's absolute path, or a URL that fsspec knows; without it there are
    none."""
    max_file_bytes: int = Field(default=200 * 2**20, ge=1)
    """Size of one uploaded file."""
    max_stored_bytes: int = Field(default=10 * 2**30, ge=1)
    """Size of one tenant's files together; beyond it no file is taken."""
    batch_concurrency: int = Field(default=8, ge=1)
    """Requests of batches that a server process runs at once."""

    cors_origins: tuple[Origin, ...] = ()
    """Origins whose web pages may call the API from a browser; `*` for all, which needs tenants."""

    @field_validator("files_url")
    @classmethod
    def _files_are_where_every_process_finds_them(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith("/") and "://" not in url:
            raise ValueError("must be a path that begins with '/', or a URL such as s3://bucket/prefix")
        return url

    @model_validator(mode="after")
    def _all_origins_need_keys(self) -> Self:
        if ANY_ORIGIN in self.cors_origins and len(self.cors_origins) > 1:
            raise ValueError("cors_origins: '*' is every origin; leave the others out")
        if ANY_ORIGIN in self.cors_origins and self.tenants_file is None:
            raise ValueError(
                "cors_origins: '*' needs tenants_file, or every web page that is open on this machine could use the "
                "models; name the origins"
            )
        return self


class AppConfig(Frozen):
    """One application: models, the recipes over them, and how they are served."""

    models: dict[Name, AnyModel] = Field(min_length=1)
    recipes: dict[Name, RecipeConfig] = Field(default_factory=dict)
    coordinator: CoordinatorConfig = CoordinatorConfig()
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _names_resolve(self) -> Self:
        for name, model in self.models.items():
            if isinstance(model, AdapterConfig) and model.model not in self.deployments:
                known = f"models with a path are {sorted(self.deployments)}"
                kind = "is an adapter itself" if model.model in self.models else "is unknown"
                raise ValueError(f"models.{name}.model: {model.model!r} {kind}; {known}")
        for name, recipe in self.recipes.items():
            if name in self.models:
                raise ValueError(f"recipes.{name}: a model has this name too; rename the recipe")
            for wanted in recipe.models:
                if wanted not in self.models:
                    raise ValueError(f"recipes.{name}: unknown model {wanted!r}; models are {sorted(self.models)}")
        return self

    @model_validator(mode="after")
    def _a_step_holds_a_token_of_every_prompt(self) -> Self:
        budget = self.coordinator.max_num_batched_tokens
        for name, recipe in self.recipes.items():
            own = recipe.promptable
            roles = {(role.role, place if place in own else None) for place, (_, role) in enumerate(recipe.roles)}
            model, count = Counter(self.deployment_of(role.model) for role, _ in roles).most_common(1)[0]
            if count > budget:
                raise ValueError(
                    f"coordinator.max_num_batched_tokens: {budget} is fewer than the {count} prompts "
                    f"that {model} reads in recipes.{name}"
                )
        return self

    @property
    def deployments(self) -> dict[str, ModelConfig]:
        """The models with their own weights."""
        return {name: model for name, model in self.models.items() if isinstance(model, ModelConfig)}

    def deployment_of(self, name: str) -> str:
        """The deployment that computes this model; an adapter's is that of the model it adapts."""
        model = self.models[name]
        return model.model if isinstance(model, AdapterConfig) else name

    def adapters_of(self, deployment: str) -> dict[str, Path]:
        """Name → directory of the adapters that this deployment computes."""
        adapters = {name: model for name, model in self.models.items() if isinstance(model, AdapterConfig)}
        return {name: adapter.directory for name, adapter in adapters.items() if adapter.model == deployment}

    def checkpoint_of(self, name: str) -> Path:
        """The directory with this model's configuration and tokenizer; an adapter's is that of the model it adapts."""
        return self.deployments[self.deployment_of(name)].checkpoint

    @classmethod
    def parse(cls, data: Any, source: str = "config") -> AppConfig:
        """Validate plain data; raises `ConfigError` that names every mistake, one per line."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = [f"{source}: {_place(e['loc'])}: {e['msg']}" for e in error.errors()]
            raise ConfigError("\n".join(lines)) from error


def _place(location: tuple[int | str, ...]) -> str:
    """A field's path as in the file, without pydantic's tag for the kind of model."""
    return ".".join(str(part) for part in location if part not in (_MODEL, _ADAPTER)) or "(top level)"
