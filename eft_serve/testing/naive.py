"""The naive reference: one process, no cache, one request, one token at a time, in as few lines as possible.

It shares no code with what it checks: transformers' own forward, log-softmax, the formula, argmax. Only seeded draws
are by the product's own function, one row at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import regex
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from eft_serve.numerics.sampling import sample
from eft_serve.types import SamplingParams


def load(checkpoint: Path) -> PreTrainedModel:
    """A model in float32 on the CPU, as transformers has it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    model.eval()
    return model


@torch.inference_mode()
def next_logprobs(model: PreTrainedModel, token_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
    """log π(· | token_ids), [num_tokens] float32, without the padding of the output head."""
    logits = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0, -1, :num_tokens]
    return torch.log_softmax(logits.float(), dim=-1)


def emulated_logprobs(
    base: torch.Tensor,
    reference: torch.Tensor,
    tuned: Sequence[tuple[torch.Tensor, torch.Tensor, float]],  # (tuned_i, ref_i, alpha_i)
    scale: float,
    truncate_top_p: float = 1.0,
) -> torch.Tensor:
    """log π̃ = ref + β·(base − ref) + Σ αᵢ·(tunedᵢ − refᵢ), normalised (arXiv 2310.12962, eq. 5).

    Below `truncate_top_p` 1 the part with β counts only in the nucleus of the rest.
    """
    unscaled = reference
    for tuned_i, reference_i, weight in tuned:
        unscaled = unscaled + weight * (tuned_i - reference_i)
    ratio = scale * (base - reference)
    if truncate_top_p < 1:
        probs, token_ids = torch.softmax(unscaled.double(), dim=-1).sort(descending=True)
        outside = token_ids[probs.cumsum(dim=-1) - probs >= truncate_top_p]
        ratio[outside[outside != token_ids[0]]] = 0.0
    return torch.log_softmax(unscaled + ratio, dim=-1)


@torch.inference_mode()
def next_logits(model: PreTrainedModel, token_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
    """Of the next token, [num_tokens] float32, not normalised."""
    logits: torch.Tensor = model(torch.tensor([list(token_ids)]), use_cache=False).logits
    return logits[0, -1, :num_tokens].float()


class PartialRegex:
    """A regular expression that outputs follow, by another library's partial matches.

    Args:
        decode: the text of tokens; end tokens have none.
    """

    def __init__(self, pattern: str, decode: Callable[[list[int]], str]) -> None:
        self._pattern, self._decode = regex.compile(pattern), decode

    def may_go_on(self, token_ids: Sequence[int]) -> bool:
        """Whether the newest token has a text, with which the output begins a matching one."""
        has_text = not token_ids or self._decode([token_ids[-1]])
        return bool(has_text) and self._pattern.fullmatch(self._decode([*token_ids]), partial=True) is not None

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        return self._pattern.fullmatch(self._decode([*token_ids])) is not None

    def is_finished(self, token_ids: Sequence[int], tokens: Iterable[int]) -> bool:
        return self.is_complete(token_ids) and not any(self.may_go_on([*token_ids, token]) for token in tokens)


def control(
    logits: torch.Tensor,
    sampling: SamplingParams,
    prompt_token_ids: Sequence[int],
    output: Sequence[int],
    ends: Collection[int],
    grammar: PartialRegex | None = None,
) -> None:
    """Every control of `SamplingParams` in its order, on one row of combined logits in place, whatever it costs."""
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    for token in {*prompt_token_ids, *output}:
        logits[token] *= 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
    for token in set(output):
        logits[token] -= output.count(token) * sampling.frequency_penalty + sampling.presence_penalty
    for token in range(len(logits)):
        banned = sampling.allowed_token_ids is not None and token not in sampling.allowed_token_ids
        banned |= any([*output, token][-len(word) :] == list(word) for word in sampling.bad_words)
        banned |= token in ends and len(output) < sampling.min_tokens
        if grammar is not None:
            banned |= not (grammar.is_complete(output) if token in ends else grammar.may_go_on([*output, token]))
        if banned:
            logits[token] = -torch.inf


def generate_controlled(
    models: Mapping[str, PreTrainedModel],  # "base", "reference", "tuned"
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    num_tokens: int,
    eos_token_ids: frozenset[int],
    grammar: PartialRegex | None = None,
) -> tuple[list[int], list[float]]:
    """Tokens of base + (tuned − reference) under controls, and their log-probabilities before these.

    Greedy at temperature 0, and else by the keyed draw of one row, whose noise is part of what a seed means.
    """
    output: list[int] = []
    logprobs: list[float] = []
    ends = {*eos_token_ids, *sampling.stop_token_ids}
    while len(output) < sampling.max_tokens and not (output and output[-1] in ends):
        if grammar is not None and grammar.is_finished(output, range(num_tokens)):
            break
        terms = {role: next_logits(model, [*prompt_token_ids, *output], num_tokens) for role, model in models.items()}
        logits = terms["base"] + terms["tuned"] - terms["reference"]
        raw = torch.log_softmax(logits, dim=-1)
        control(logits, sampling, prompt_token_ids, output, ends, grammar)
        drawn = sample(logits[None], [sampling], [len(output)]) if sampling.temperature else logits.argmax()
        output.append(int(drawn))
        logprobs.append(float(raw[output[-1]]))
    return output, logprobs


@torch.inference_mode()
def emulated_prompt_logprobs(
    models: Mapping[str, PreTrainedModel],  # "base", "reference", "tuned"
    prompt_token_ids: Sequence[int],
    num_tokens: int,
) -> torch.Tensor:
    """log π̃ after each prompt token but the last, [len(prompt) − 1, num_tokens] float32, by one forward a model."""
    inputs = torch.tensor([list(prompt_token_ids)])
    rows = {role: model(inputs, use_cache=False).logits[0, :-1, :num_tokens].float() for role, model in models.items()}
    return torch.log_softmax(rows["base"] + rows["tuned"] - rows["reference"], dim=-1)


def generate_emulated(
    models: Mapping[str, PreTrainedModel],  # "base", "reference", "tuned"
    prompt_token_ids: Sequence[int] | Mapping[str, Sequence[int]],  # one for all roles, or one per role
    *,
    max_tokens: int,
    num_tokens: int,
    eos_token_ids: frozenset[int],
    scale: float = 1.0,
    weight: float = 1.0,
    truncate_top_p: float = 1.0,
) -> list[int]:
    """Greedy tokens of the emulated model, the end token included."""
    prompts = prompt_token_ids if isinstance(prompt_token_ids, Mapping) else dict.fromkeys(models, prompt_token_ids)
    output: list[int] = []
    while len(output) < max_tokens and not (output and output[-1] in eos_token_ids):
        terms = {role: next_logprobs(model, [*prompts[role], *output], num_tokens) for role, model in models.items()}
        tuned = [(terms["tuned"], terms["reference"], weight)]
        logprobs = emulated_logprobs(terms["base"], terms["reference"], tuned, scale, truncate_top_p)
        output.append(int(logprobs.argmax()))
    return output


def generate_plain(
    model: PreTrainedModel,
    prompt_token_ids: Sequence[int],
    *,
    max_tokens: int,
    num_tokens: int,
    eos_token_ids: frozenset[int],
) -> list[int]:
    """Greedy tokens of one plain model, the end token included."""
    output: list[int] = []
    while len(output) < max_tokens and not (output and output[-1] in eos_token_ids):
        output.append(int(next_logprobs(model, [*prompt_token_ids, *output], num_tokens).argmax()))
    return output
