"""Runs parts on families, each family in a process of its own with one thread. Knows names, not what they measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from eft_serve.evaluation.experiment import Experiment
from eft_serve.evaluation.forced import perplexity, tokens
from eft_serve.evaluation.parts import frontier, grid, knobs, truncation

PARTS: Mapping[str, Callable[[Experiment], dict[str, Any]]] = {
    "grid": grid,
    "frontier": frontier,
    "knobs": knobs,
    "truncation": truncation,
    "tokens": tokens,
    "perplexity": perplexity,
}


def run(families: Sequence[str], parts: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """Figures by part and family, and how many questions there were; the families side by side."""
    started = time.monotonic()
    with ProcessPoolExecutor(len(families), mp_context=get_context("spawn")) as pool:
        running = {family: pool.submit(measure, family, parts, limit) for family in families}
        found = {family: each.result() for family, each in running.items()}
    return {
        **{part: {family: found[family][part] for family in families} for part in parts},
        "questions": found[families[0]]["questions"],
        "core_minutes": {family: found[family]["core_minutes"] for family in families},
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


def measure(family: str, parts: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """One family's parts in this process, estimates rounded; `core_minutes` do not depend on how busy others are."""
    torch.set_num_threads(1)
    experiment = Experiment(family, limit)
    found: dict[str, Any] = {
        "questions": {kind: len(each) for kind, each in experiment.questions.items()},
    }
    try:
        for part in parts:
            found[part] = _rounded(PARTS[part](experiment))
    finally:
        experiment.close()
    return found | {"core_minutes": round(time.process_time() / 60, 1)}


def _rounded(value: Any) -> Any:
    """The same as JSON holds it."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value
