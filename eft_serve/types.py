"""Plain data that crosses process boundaries; knows nothing of models, sockets or Ray.

Two nouns: a *Request* is what a user asked for and lives in a coordinator; a *Sequence* is one model's KV-bearing state
and lives in an engine. The step contract ties them together: a `SequenceStep` says how many tokens the engine must
already have computed, appends more, and asks for logits; an engine that does not finish it answers with the number of
tokens that it has computed, and the coordinator goes on from there. Prefill, decode, verification, rollback,
preemption, recovery and prefix reuse are all this one message, and it is idempotent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from torch import Tensor


class FinishReason(StrEnum):
    """Why a request ended; the values are OpenAI's where OpenAI has one."""

    STOP = "stop"  # end token or stop string
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # the client went away
    ERROR = "error"  # the request ended with a typed error


MAX_ALTERNATIVES = 20  # to each token, of which log-probabilities are given
MAX_DRAFT_TOKENS = 16  # at a time
MAX_FLOAT32 = 3.4e38  # just below float32's largest number

_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, MAX_FLOAT32),
    "top_k": (0, 2**63 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-6, 1e6),
    "presence_penalty": (-MAX_FLOAT32, MAX_FLOAT32),
    "frequency_penalty": (-MAX_FLOAT32, MAX_FLOAT32),
}


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """The texts that an output may be."""

    definition: str  # in llguidance's notation, see `eft_serve.grammars.definitions`
    param: str  # of the request, that it is of
    of_schemas: bool = False  # of JSON schemas, which are hardly ambiguous; other grammars have tighter limits
    salt: str = ""  # requests with equal salt share what was compiled, and could see by timing whether they did


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to sample tokens from the combined distribution, and where the output ends. Validated by the API.

    The combined logits change in this order: logit bias, penalties, tokens that are not allowed, the grammar,
    temperature, top-k, top-p, min-p.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 keeps all
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0  # 0 keeps all
    seed: int = 0  # 64-bit; every draw is keyed by (seed, position)
    max_tokens: int = 16
    min_tokens: int = 0  # neither an end token nor a stop string ends the output before
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    shown_special_token_ids: tuple[int, ...] = ()  # not skipped
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()  # by token id
    repetition_penalty: float = 1.0  # of tokens in prompt and output; divides positive logits, multiplies others
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the output
    frequency_penalty: float = 0.0  # the same, for each time that they are there
    allowed_token_ids: tuple[int, ...] | None = None  # None allows all
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that are never completed
    grammar: Grammar | None = None  # that the output follows; where it is complete, the output may end

    def __post_init__(self) -> None:
        """Raises ValueError that names the parameter out of its range."""
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:  # NaN is in no range
                raise ValueError(f"{name}: {getattr(self, name)} is not between {low:g} and {high:g}")

    @property
    def for_draft(self) -> SamplingParams:
        """What a drafter is told: how to draw from its own logits."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            grammar=self.grammar,
        )


class Draft(msgspec.Struct, frozen=True, array_like=True):
    """Have the engine draft tokens after a step: each is drawn from the logits after the one before it.

    The draws are those of `numerics.sampling.sample`, keyed by (seed, position).
    """

    num_tokens: int  # at least 1; the engine may stop earlier
    position: int  # of the first draft token within the output
    num_ids: int  # draft tokens are below this: ids that all models have
    sampling: SamplingParams
    confidence: float = 1.0  # probability that all earlier draft tokens are accepted
    min_confidence: float = 0.0  # drafting stops once the probability that all are accepted is lower


class Speculative(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a request's tokens are drafted; no setting changes their distribution."""

    draft: str = "auto"  # the tuned model of the largest weight; "none", or a term's name
    num_tokens: int = 8  # draft tokens at a time, at most
    min_confidence: float = 0.5  # the drafter goes on while its draft tokens together have this probability
    overlap: bool = True  # draft while draft tokens are verified
    disable_by_batch_size: int = 32  # no drafting while more requests than this decode


class Term(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One next-token distribution of a combination: a model with a prompt."""

    name: str  # unique in its combination; the key of its prompt
    model: str  # the deployment that computes it
    coefficient: float  # of its log-probabilities in the combination
    adapter: str | None = None  # of that deployment; None: no adapter
    weight: float = 0.0  # alpha of its fine-tuning; 0 for terms that are not a tuned model
    ratio: float = 0.0  # the part of the coefficient that truncation confines to the nucleus

    @property
    def counts(self) -> bool:
        """Whether it changes the combination; otherwise it runs only for its components."""
        return bool(self.coefficient or self.ratio)

    @property
    def unscaled(self) -> float:
        """The other part: its coefficient outside the nucleus."""
        return rounded(self.coefficient - self.ratio)


class Reward(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The reward that a fine-tuning implies: log π_tuned − log π_reference."""

    name: str  # the name of its weight
    tuned: str  # names of terms
    reference: str
    weight: float


class Combination(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request runs: a recipe with the request's knobs, or one model alone."""

    terms: tuple[Term, ...]  # non-zero coefficients sum to 1 for a recipe
    truncate_top_p: float = 1.0  # the nucleus that the terms' ratios are confined to; 1 does not confine them
    rewards: tuple[Reward, ...] = ()  # over the terms; empty unless components are requested
    recipe: str = ""  # as the client named it: a recipe or a plain model; for usage only

    @property
    def counted(self) -> Term:
        """The first term with a coefficient: its tokenizer decodes, and `usage` counts its prompt."""
        return next(term for term in self.terms if term.counts)


ZERO = 1e-9  # a smaller coefficient is a rounding error of knobs that cancel


def rounded(coefficient: float) -> float:
    """0 for a coefficient that is only a rounding error."""
    return coefficient if abs(coefficient) >= ZERO else 0.0


class SequenceStep(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of one forward."""

    sequence_id: str
    position: int  # tokens the engine must have computed; it truncates to this many first
    token_ids: list[int]  # appended after that
    num_logits: int  # logits wanted, for the last `num_logits` of `token_ids`; 0 while prefilling
    salt: str | None = None  # at position 0: sequences with equal salt share cached prefixes; None: no sharing
    max_computed: int | None = None  # compute at most this many; the other `token_ids` are only for the prefix lookup
    draft: Draft | None = None  # draft after the step's last token; needs `num_logits`
    adapter: str | None = None  # at position 0: the LoRA adapter to apply; None: no adapter


@dataclass(frozen=True, slots=True)
class StepOutput:
    """An engine's answer to one `SequenceStep`: exactly one of `num_computed_tokens`, `error`, `logits` is set."""

    sequence_id: str
    num_computed_tokens: int | None = (
        None  # tokens computed so far, when the step is not finished: evicted, no room, `max_computed`
    )
    error: str | None = None  # this step can never be served (out of vocabulary, beyond the context)
    logits: Tensor | None = (
        None  # [num_logits, vocab_size], floating; with draft tokens one row more for each after the first
    )
    drafted: Sequence[int] = ()  # draft tokens; all but the last are computed like the step's own tokens
    confidences: Sequence[float] = ()  # of each draft token, its probability under the drafting model
    num_cached_tokens: int = 0  # of the step's tokens, those found in a cache and so not computed


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One replica's part of a decode step."""

    steps: Sequence[SequenceStep]
    freed: Sequence[str] = ()  # finished sequences; the engine drops them before it computes


@dataclass(frozen=True, slots=True)
class StepResult:
    """One replica's answer: `outputs` in the order of the steps, or `failure` without outputs."""

    outputs: Sequence[StepOutput] = ()
    failure: str | None = None  # why the replica could not answer (deadline, connection, engine)
    seconds: float = 0.0  # from the first send to this answer, on the coordinator's monotonic clock
    forward_seconds: float = 0.0  # of those, inside the engine's forward


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's properties once it is loaded."""

    model: str
    vocab_size: int  # rows of the output head, padding included
    max_model_len: int  # tokens one sequence may hold
    kv_capacity_tokens: int  # tokens all sequences together may hold
    kv_block_size: int  # tokens per KV block
    dtype: str
    tensor_parallel: int
    attention: str  # the attention backend, for the logs


class Listener(msgspec.Struct, frozen=True, kw_only=True):
    """Where a replica listens, and its public key."""

    replica_id: str
    address: str  # a ZeroMQ address: tcp://host:port
    public_key: bytes  # CURVE, Z85


class Endpoint(Listener, frozen=True, kw_only=True):
    """A model replica's engine."""

    info: ModelInfo


class Resumption(msgspec.Struct, frozen=True, kw_only=True):
    """What a request's reader has of its answer, from a coordinator that is gone."""

    token_ids: list[int]  # of the output
    num_characters: int  # of its text
    num_prompt_logprobs: int  # prompt tokens that were scored

    @property
    def num_tokens(self) -> int:
        """Tokens that its reader was told of."""
        return self.num_prompt_logprobs + len(self.token_ids)


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the ingress sends to a coordinator: authorised, validated, resolved, tokenised."""

    request_id: str
    combination: Combination
    prompts: dict[str, list[int]]  # by term; every term of the combination
    sampling: SamplingParams
    speculative: Speculative | None = None  # None: no draft tokens
    forced_token_ids: list[int] | None = None  # a given output that is only scored; None: the output is sampled
    components: int | None = None  # number of alternatives to each token; None: no components
    logprobs: int | None = None  # the same, of the combination alone; None: no log-probabilities
    prompt_logprobs: int | None = None  # the same, of the tokens of a prompt that all terms share, but its first
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"  # before or after its controls
    resumption: Resumption | None = None  # None: nobody has begun it
    tenant: str = "anonymous"
    timeout_s: float = 600.0  # the coordinator ends it then, also if its reader vanished


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A domain error as data, so that it can cross a process boundary in the middle of a stream."""

    kind: str  # a class name of errors.py
    message: str
    param: str | None = None


class SpecDecodeStats(msgspec.Struct, frozen=True, array_like=True):
    """Counts of a request's draft tokens."""

    num_drafted: int = 0
    num_accepted: int = 0
    num_passes: int = 0  # steps that gave the request tokens: as many passes of the base model

    def __add__(self, other: SpecDecodeStats) -> SpecDecodeStats:
        return SpecDecodeStats(
            *(a + b for a, b in zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True))
        )


class ModelUsage(msgspec.Struct, frozen=True, array_like=True):
    """One model's tokens for a request, summed over all prompts that it read."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of those, found in the prefix cache when the request began
    completion_tokens: int = 0  # of the output, up to its end
    computed_tokens: int = 0  # computed by the model, including draft tokens and what was lost and recomputed

    def __add__(self, other: ModelUsage) -> ModelUsage:
        return ModelUsage(
            *(a + b for a, b in zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True))
        )


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a request used, however it ended."""

    models: dict[str, ModelUsage]  # by model, or by adapter for terms with one
    seconds: float  # from its arrival at the coordinator to its end
    spec_decode: SpecDecodeStats = SpecDecodeStats()


class EventKind(StrEnum):
    """What happens to a request; the values are vLLM's where vLLM has one."""

    QUEUED = "queued"
    SCHEDULED = "scheduled"  # again after each preemption
    FIRST_TOKEN = "first_token"  # noqa: S105 (no secret)
    PREEMPTED = "preempted"  # no KV room; it waits again
    LOST = "lost"  # a replica failed, and the request's caches on it are gone
    ENDED = "ended"


class Event(msgspec.Struct, frozen=True, array_like=True):
    """One entry of a request's timeline."""

    kind: EventKind
    seconds: float  # since the first event


class RequestEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a request that a decode loop has taken; exactly one for each, however it ends."""

    request_id: str
    tenant: str
    recipe: str
    reason: FinishReason
    failure: Failure | None = None  # set exactly when the reason is ERROR
    usage: Usage
    queued_at: float  # Unix seconds
    timeline: tuple[Event, ...]  # from QUEUED to ENDED


class TokenComponents(msgspec.Struct, frozen=True, array_like=True):
    """Each part of the combination for one token, in natural logarithms."""

    token_id: int
    logprob: float  # under the combination, before its controls unless the request wants it processed
    models: list[float]  # under each term, in the combination's order; empty if only the combination's are wanted
    rewards: list[float]  # log π_tuned − log π_reference of each fine-tuning, in the recipe's order
    reward: float  # their weighted sum; 0 without fine-tunings
    top: list[TokenComponents] = []  # the most likely tokens under the combination; their own `top` is empty
    rank: int = 0  # 1 for the most likely token; 0: not asked for


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What a coordinator emits: whatever became ready since the last one."""

    text: str  # never half a character, never part of a stop string
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    failure: Failure | None = None  # set exactly when finish_reason is ERROR
    usage: Usage | None = None  # with the last delta; an error has none
    components: list[TokenComponents] | None = None  # one for each token; None: not requested
    prompt_logprobs: list[TokenComponents] = []  # of the next prompt tokens, before the first of the output

    @property
    def num_tokens(self) -> int:
        """Tokens that it tells of."""
        return len(self.prompt_logprobs) + len(self.token_ids)
