"""The naive reference: one process, no cache, one request, one token at a time, in as few lines as possible.

It shares no code with what it checks: transformers' own forward, log-softmax, the formula, argmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


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
