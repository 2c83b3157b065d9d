"""Checks of a request before it enters the shared decode loop; an error here ends this request only.

The bounds of a recipe's knobs are not checked again: the ingress checks them when it resolves the knobs, and only
ingresses have a key to the coordinator. Checked is what would break a step or give another combination than requested.
"""

from __future__ import annotations

from collections.abc import Iterator

from eft_serve.config import AppConfig
from eft_serve.errors import InvalidRequestError, ModelNotFoundError
from eft_serve.types import (
    MAX_ALTERNATIVES,
    MAX_DRAFT_TOKENS,
    MAX_FLOAT32,
    Combination,
    GenerationRequest,
    Resumption,
    Speculative,
)

MAX_TOKENS = 2**31 - 1
MAX_TIMEOUT_S = 1e9


def check_request(generation: GenerationRequest) -> None:
    """Raises `InvalidRequestError` that names the first field that cannot be served."""
    for param, mistake in _mistakes(generation):
        raise InvalidRequestError(f"{param}: {mistake}", param=param)


def check_deployed(combination: Combination, config: AppConfig) -> None:
    """Raises `ModelNotFoundError` that names the first model or adapter not deployed in this application."""
    for term in combination.terms:
        if term.model not in config.deployments:
            raise ModelNotFoundError(f"model {term.model!r} is not deployed", param="model")
        if term.adapter is not None and term.adapter not in config.adapters_of(term.model):
            raise ModelNotFoundError(f"model {term.model!r} has no adapter {term.adapter!r}", param="model")


def _mistakes(generation: GenerationRequest) -> Iterator[tuple[str, str]]:
    """(field, mistake) of every invalid field."""
    combination = generation.combination
    terms, names = combination.terms, [term.name for term in combination.terms]
    if not generation.request_id or "/" in generation.request_id:  # it begins the names of its sequences
        yield "request_id", f"{generation.request_id!r} is empty or has a slash"
    if generation.forced_token_ids == []:
        yield "completion", "must hold at least one token"
    if generation.prompt_logprobs is not None:
        yield from _unscorable(generation)
    if generation.resumption is not None:
        yield from _unresumable(generation, generation.resumption)
    if generation.components is not None and generation.logprobs_mode != "raw_logprobs":
        yield "logprobs_mode", "components are raw_logprobs"
    yield from _out_of_range(generation)
    if not any(term.coefficient for term in terms):
        yield "terms", "no term has a coefficient"
    if len(set(names)) < len(names):
        yield "terms", f"a name is given twice in {names}"
    for term in terms:
        if not all(map(_is_factor, (term.coefficient, term.ratio, term.unscaled, term.weight))):
            yield "terms", f"{term.name!r} has a coefficient or a weight that is not a finite number"
        if not generation.prompts.get(term.name):
            yield "prompts", f"the prompt of {term.name!r} has no tokens"
    if not 0 <= combination.truncate_top_p <= 1:  # NaN is not
        yield "truncate_top_p", f"{combination.truncate_top_p} is not between 0 and 1"
    for reward in combination.rewards:
        if unknown := {reward.tuned, reward.reference} - set(names):
            yield "rewards", f"{reward.name!r} is over {min(unknown)!r}, which is not a term of {names}"
        if not _is_factor(reward.weight):
            yield "rewards", f"{reward.name!r} has a weight that is not a finite number"


def _out_of_range(generation: GenerationRequest) -> Iterator[tuple[str, str]]:
    speculative = generation.speculative or Speculative()
    has_forced = generation.forced_token_ids is not None or generation.prompt_logprobs is not None
    for param, value, low, high in (
        ("max_tokens", generation.sampling.max_tokens, 0 if has_forced else 1, MAX_TOKENS),
        ("min_tokens", generation.sampling.min_tokens, 0, generation.sampling.max_tokens),
        ("timeout_s", generation.timeout_s, 0, MAX_TIMEOUT_S),
        ("components", generation.components or 0, 0, MAX_ALTERNATIVES),
        ("logprobs", generation.logprobs or 0, 0, MAX_ALTERNATIVES),
        ("prompt_logprobs", generation.prompt_logprobs or 0, 0, MAX_ALTERNATIVES),
        ("speculative.num_tokens", speculative.num_tokens, 1, MAX_DRAFT_TOKENS),
        ("speculative.min_confidence", speculative.min_confidence, 0, 1),
    ):
        if not low <= value <= high:  # NaN is in no range
            yield param, f"{value} is not between {low} and {high}"


def _unresumable(generation: GenerationRequest, resumed: Resumption) -> Iterator[tuple[str, str]]:
    forced = generation.forced_token_ids
    num_prompt_tokens = len(next(iter(generation.prompts.values()), ()))
    num_scored = max(0, num_prompt_tokens - 1) if generation.prompt_logprobs is not None else 0
    most = generation.sampling.max_tokens if forced is None else len(forced)
    is_given = forced is None or resumed.token_ids == forced[: len(resumed.token_ids)]
    if len(resumed.token_ids) >= max(1, most) or not is_given:
        yield "resumption", "its tokens are not the beginning of an output that goes on"
    if resumed.num_prompt_logprobs > num_scored or (resumed.token_ids and resumed.num_prompt_logprobs < num_scored):
        yield "resumption", f"{resumed.num_prompt_logprobs} tokens of the prompt cannot have been scored"


def _unscorable(generation: GenerationRequest) -> Iterator[tuple[str, str]]:
    prompts = list(generation.prompts.values())
    if generation.forced_token_ids is not None:
        yield "prompt_logprobs", "an output that is given has none"
    if any(prompt != prompts[0] for prompt in prompts):
        yield "prompt_logprobs", "the terms have different prompts"
    if prompts and len(prompts[0]) + generation.sampling.max_tokens < 2:
        yield "max_tokens", "a prompt of one token has no log-probabilities, and no output is wanted"


def _is_factor(value: float) -> bool:
    return abs(value) <= MAX_FLOAT32  # NaN is not
