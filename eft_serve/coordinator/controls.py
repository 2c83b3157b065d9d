"""What a request's sampling parameters mean for its models' vocabularies: end tokens and logits processors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eft_serve.checkpoints.vocabulary import Vocabulary, check_range
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.structured_output import GrammarMask
from eft_serve.numerics.processors import Allowed, BadWords, LogitBias, MinTokens, Penalties
from eft_serve.numerics.rows import LogitsProcessor
from eft_serve.types import SamplingParams

CONTROLS = (
    "logit_bias",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "grammar",
)


def end_token_ids(request: Request, vocabularies: Sequence[Vocabulary]) -> frozenset[int]:
    """Tokens that end the output: its own, and unless ignored those of any term with a coefficient; none if forced.

    Args:
        vocabularies: of its terms, in their order.
    """
    sampling = request.generation.sampling
    if request.is_forced:
        return frozenset()
    counting = zip(request.sequences, vocabularies, strict=True)
    models = [vocabulary.eos_token_ids for sequence, vocabulary in counting if sequence.term.counts]
    return frozenset(sampling.stop_token_ids).union(*(() if sampling.ignore_eos else models))


def processors(request: Request, vocabularies: Sequence[Vocabulary]) -> tuple[LogitsProcessor, ...]:
    """In the order in which they change the logits.

    Raises:
        InvalidRequestError: a parameter names a token that the models do not have.
    """
    sampling = request.generation.sampling
    for param, token_ids in _named_token_ids(sampling):
        check_range(param, token_ids, request.num_ids)
    return () if request.is_forced else tuple(_processors(request, sampling, end_token_ids(request, vocabularies)))


def _processors(request: Request, sampling: SamplingParams, ends: frozenset[int]) -> Iterator[LogitsProcessor]:
    if sampling.logit_bias:
        yield LogitBias(sampling.logit_bias)
    penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    if penalties != (1, 0, 0):
        # Each term has its own prompt; the one that `usage` counts is the first with a coefficient.
        prompt = request.generation.prompts[request.combination.counted.name]
        yield Penalties((token_id for token_id in prompt if token_id < request.num_ids), *penalties)
    if sampling.allowed_token_ids is not None:
        yield Allowed(sampling.allowed_token_ids, request.num_ids)
    if sampling.bad_words:
        yield BadWords(sampling.bad_words)
    known_ends = sorted(end for end in ends if end < request.num_ids)
    if sampling.min_tokens:
        yield MinTokens(sampling.min_tokens, known_ends)
    assert (request.matcher is None) == (sampling.grammar is None), "its grammar was not compiled"
    if request.matcher is not None:
        yield GrammarMask(request.matcher, known_ends)


def _named_token_ids(sampling: SamplingParams) -> Iterator[tuple[str, Sequence[int]]]:
    """(parameter, token ids)"""
    yield "logit_bias", [token_id for token_id, _ in sampling.logit_bias]
    yield "allowed_token_ids", sampling.allowed_token_ids or ()
    yield "bad_words", [token_id for word in sampling.bad_words for token_id in word]
    yield "stop_token_ids", sampling.stop_token_ids


def used_controls(sampling: SamplingParams) -> list[str]:
    """The parameters that change logits before temperature."""
    plain = SamplingParams()
    return [name for name in CONTROLS if getattr(sampling, name) != getattr(plain, name)]
