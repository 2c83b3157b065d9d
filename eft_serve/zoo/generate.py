"""The naive reference: batched greedy decoding of one model or of an emulated fine-tune, without caches.

It is written to be obviously right, not fast; the served stack is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


@dataclass(frozen=True)
class WeightedModel:
    """One model's share of the combined log-probabilities."""

    model: str
    coefficient: float


@dataclass(frozen=True)
class ModelRecipe:
    """What to decode from: a name for the table, and its terms."""

    name: str
    terms: tuple[WeightedModel, ...]


def alone(model: str) -> ModelRecipe:
    return ModelRecipe(model, (WeightedModel(model, 1.0),))


def emulated(name: str, base: str, tuned: dict[str, float], reference: str, scale: float = 1.0) -> ModelRecipe:
    """reference + scale * (base - reference) + sum of weight * (tuned - reference), gathered by model."""
    coefficients: dict[str, float] = {}
    for model, share in (
        (reference, 1.0 - scale - sum(tuned.values())),
        (base, scale),
        *tuned.items(),
    ):
        coefficients[model] = coefficients.get(model, 0.0) + share
    return ModelRecipe(name, tuple(WeightedModel(model, share) for model, share in coefficients.items() if share))


class Family:
    """The checkpoints of one directory, loaded as they are shipped and computed in 32 bits."""

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints = checkpoints
        self._models: dict[str, LlamaForCausalLM] = {}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoints / "base-small")

    def model(self, name: str) -> LlamaForCausalLM:
        if name not in self._models:
            path = self._checkpoints / name
            self._models[name] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return self._models[name]

    def prompt(self, message: str) -> list[int]:
        """Token ids of a one-message conversation, as the chat template renders it."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text)["input_ids"])

    @torch.inference_mode()
    def greedy(
        self, recipe: ModelRecipe, messages: Sequence[str], max_new_tokens: int = 40, rows: int = 32
    ) -> list[str]:
        """One reply per message."""
        prompts = [self.prompt(message) for message in messages]
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        replies = [""] * len(prompts)
        for start in range(0, len(order), rows):
            places = order[start : start + rows]
            decoded = self._greedy_rows(recipe, [prompts[place] for place in places], max_new_tokens)
            for place, reply in zip(places, decoded, strict=True):
                replies[place] = reply
        return replies

    def _greedy_rows(self, recipe: ModelRecipe, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        for _ in range(max_new_tokens):
            chosen = self.next_logprobs(recipe, ids, mask).argmax(-1).masked_fill(ended, end)
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(chosen)[:, None]], dim=1)
            ended |= chosen == end
            if bool(ended.all()):
                break
        replies = self.tokenizer.batch_decode(ids[:, longest:], skip_special_tokens=True)
        return [str(reply).strip() for reply in replies]

    def next_logprobs(self, recipe: ModelRecipe, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Combined next-token scores [num_rows, vocab_size], not normalised."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        total = torch.zeros(())
        for term in recipe.terms:
            logits = self.model(term.model)(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
            ).logits
            total = total + term.coefficient * log_softmax(logits[:, -1].float(), dim=-1)
        return total
