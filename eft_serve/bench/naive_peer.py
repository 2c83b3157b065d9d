"""The peer of `bench serve`: what one writes without a serving system, on the same models and cores.

Three transformers models in one process, one after the other; a padded batch of whatever has arrived, which is done
when its longest answer is. It has no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from eft_serve.bench.load import Wanted
from eft_serve.bench.timeline import Timeline, TokensAt
from eft_serve.zoo import checkpoint_path

CHECKPOINTS = ("base-large", "base-small", "tuned-small")  # base, reference, tuned
PAD = 0


class NaivePeer:
    """Emulated fine-tuning with scale and weight 1, greedily, in static batches."""

    def __init__(self) -> None:
        transformers_logging.disable_progress_bar()
        self._models = [_load(name) for name in CHECKPOINTS]

    def choose_threads(self, candidates: Iterable[int], load: Sequence[Wanted]) -> int:
        """Use as many math threads as answer this load soonest: on models so small more can be slower."""
        seconds = {}
        for num_threads in candidates:
            torch.set_num_threads(num_threads)
            self.generate(load)  # starts the threads
            started = time.perf_counter()
            self.generate(load)
            seconds[num_threads] = time.perf_counter() - started
        best = min(seconds, key=lambda num_threads: seconds[num_threads])
        torch.set_num_threads(best)
        return best

    def replay(self, load: Sequence[Wanted], max_batch: int) -> list[Timeline]:
        """All requests; a batch takes what has arrived when the one before is done."""
        start = time.perf_counter()
        timelines: list[Timeline] = []
        while len(timelines) < len(load):
            waiting = load[len(timelines) : len(timelines) + max_batch]
            time.sleep(max(0.0, waiting[0].arrival_s - (time.perf_counter() - start)))
            now_s = time.perf_counter() - start
            batch = [wanted for wanted in waiting if wanted.arrival_s <= now_s]
            timelines += [
                Timeline(wanted.arrival_s, [(at - start, ids) for at, ids in tokens])
                for wanted, tokens in zip(batch, self.generate(batch), strict=True)
            ]
        return timelines

    @torch.inference_mode()
    def generate(self, batch: Sequence[Wanted]) -> list[list[TokensAt]]:
        """The tokens of every request, with the time of `perf_counter` at which each was known."""
        width = max(len(wanted.prompt) for wanted in batch)
        token_ids = torch.tensor([[PAD] * (width - len(w.prompt)) + w.prompt for w in batch])
        # Positions need no care: they are rotary, so padding on the left shifts them all alike.
        mask = torch.tensor([[0] * (width - len(w.prompt)) + [1] * len(w.prompt) for w in batch])
        caches = [DynamicCache() for _ in self._models]
        tokens: list[list[TokensAt]] = [[] for _ in batch]
        for step in range(max(wanted.num_tokens for wanted in batch)):
            base, reference, tuned = (
                model(
                    token_ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
                for model, cache in zip(self._models, caches, strict=True)
            )
            drawn = (reference + (base - reference) + (tuned - reference)).argmax(dim=-1)
            known = time.perf_counter()
            for wanted, row, token in zip(batch, tokens, drawn.tolist(), strict=True):
                if step < wanted.num_tokens:
                    row.append((known, [token]))
            token_ids = drawn[:, None]
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=-1)
        return tokens


def _load(name: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint_path(name), dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
    )
    model.eval()
    return model
