"""`eft-serve bench engine`: a step of one model beside stock transformers and beside its matrix products alone.

The sides take turns step by step, so that a busy moment hits them all; ratios are medians over the steps. Only the
forward counts: drawing a token is the coordinator's work.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from eft_serve.bench import report
from eft_serve.bench.engine_sides import MatrixFloor, Ours, Side, Stock

BATCHES = (1, 8, 32)
CONTEXT, PREFILL = 128, 512
VOCAB_SIZE = 32_000
WARM_UP = 5

Seconds = dict[str, list[float]]  # by side, of each step


def write_random_llama(directory: Path) -> None:
    """12.5 M parameters: 4.3 M in the layers, 8.2 M in the tied embedding and head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=592,
        num_hidden_layers=6,
        num_attention_heads=8,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def make_sides(checkpoint: Path, num_steps: int) -> dict[str, Side]:
    """By name; `weights` is the floor without attention's products."""
    decoding, batch = CONTEXT + WARM_UP + num_steps, max(BATCHES)
    num_tokens = max(decoding, PREFILL)
    return {
        "ours": Ours(checkpoint),
        "stock": Stock(checkpoint),
        "floor": MatrixFloor(checkpoint, num_tokens, batch, with_attention=True),
        "weights": MatrixFloor(checkpoint, num_tokens, batch, with_attention=False),
    }


def decode(sides: Mapping[str, Side], batch: int, num_steps: int) -> Seconds:
    """Decode steps of so many sequences over a growing context."""
    prompts = torch.randint(VOCAB_SIZE, (batch, CONTEXT))
    for side in sides.values():
        side.forward(prompts)
    seconds: Seconds = {name: [] for name in sides}
    for step in range(WARM_UP + num_steps):
        token_ids = torch.randint(VOCAB_SIZE, (batch, 1))
        for name in _in_turn(sides, step):
            seconds[name].append(_timed(sides[name], token_ids))
    for side in sides.values():
        side.end()
    return {name: each[WARM_UP:] for name, each in seconds.items()}


def prefill(sides: Mapping[str, Side], num_steps: int) -> Seconds:
    """Whole prompts, each of a new sequence."""
    seconds: Seconds = {name: [] for name in sides}
    for step in range(WARM_UP + num_steps):
        prompt = torch.randint(VOCAB_SIZE, (1, PREFILL))
        for name in _in_turn(sides, step):
            seconds[name].append(_timed(sides[name], prompt))
            sides[name].end()
    return {name: each[WARM_UP:] for name, each in seconds.items()}


def _in_turn(sides: Mapping[str, Side], step: int) -> Iterator[str]:
    """Every side once, another one first in every step."""
    names = list(sides)
    first = step % len(names)
    yield from names[first:] + names[:first]


def _timed(side: Side, token_ids: torch.Tensor) -> float:
    started = time.perf_counter()
    side.forward(token_ids)
    return time.perf_counter() - started


def median_ratio(seconds: Seconds, over: str, under: str) -> float:
    """Of one side's step over the other's, each pair of one turn."""
    return round(statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True)), 3)


def run(num_steps: int, num_prefills: int) -> None:
    """Measure and print; the last line is JSON."""
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="eft-serve-bench-") as directory:
        write_random_llama(Path(directory))
        sides = make_sides(Path(directory), num_steps)
    measured = {str(batch): decode(sides, batch, num_steps) for batch in BATCHES}
    measured["prefill"] = prefill(sides, num_prefills)
    result: dict[str, Any] = {
        "speedup_over_stock": {case: median_ratio(s, "stock", "ours") for case, s in measured.items()},
        "over_floor": {case: median_ratio(s, "ours", "floor") for case, s in measured.items()},
        "over_weights_floor": {case: median_ratio(s, "ours", "weights") for case, s in measured.items()},
        "ms": {
            side: {case: round(statistics.median(s[side]) * 1e3, 3) for case, s in measured.items()} for side in sides
        },
    }
    report.show(
        f"Llama of 12.5 M: decode at batch {BATCHES} from context {CONTEXT} on, prefill of {PREFILL} tokens",
        ["step", *(f"{side} ms" for side in sides), "speed-up", "over floor", "over weights"],
        [
            [
                case,
                *(result["ms"][side][case] for side in sides),
                *(result[key][case] for key in ("speedup_over_stock", "over_floor", "over_weights_floor")),
            ]
            for case in measured
        ],
    )
    report.finish(result)
