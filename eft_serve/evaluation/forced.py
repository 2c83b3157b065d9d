"""The parts that read answers instead of writing them: each model's log-probabilities of every token of a given answer.

Plain transformers forwards, one answer at a time, and the project's numerics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eft_serve.evaluation.acceptance import (
    coupled_acceptance,
    drawn_acceptance,
    tokens_per_verification,
    total_variation,
)
from eft_serve.evaluation.experiment import Experiment
from eft_serve.evaluation.statistics import perplexity as perplexity_of
from eft_serve.evaluation.statistics import perplexity_ratio, ratio
from eft_serve.evaluation.systems import alone
from eft_serve.numerics.combine import combine
from eft_serve.numerics.logprobs import log_softmax
from eft_serve.types import Combination
from eft_serve.zoo.wordings import CLOSING

TEMPERATURES = (0.7, 1.0)
NUM_BINS = 20
SEEDS = tuple(range(1000, 1008))  # other than those of the answers that are read
BLOCKS = (4, 8)
EDGES = {"near": 0.1, "far": 0.5}

Read = tuple[str, tuple[int, ...]]  # a message and the token ids of an answer to it


class Scorer:
    """Reads one answer at a time with any of the family's models."""

    def __init__(self, experiment: Experiment) -> None:
        self._family = experiment.models

    @torch.inference_mode()
    def logprobs(self, system: Combination, message: str, answer: Sequence[int], known: dict[str, Tensor]) -> Tensor:
        """The system's next-token log-probabilities before each token of the answer, [num_tokens, vocab_size].

        `known` holds the models' own for this answer and is added to.
        """
        for term in system.terms:
            if term.model not in known:
                prompt = self._family.prompt(message)
                logits = self._family.model(term.model)(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0]
                known[term.model] = log_softmax(logits[len(prompt) - 1 :])
        coefficients = torch.tensor([[term.coefficient] * len(answer) for term in system.terms])
        return log_softmax(combine([known[term.model] for term in system.terms], coefficients))


def tokens(experiment: Experiment) -> dict[str, Any]:
    """EFT's own answers, token by token: how far the small tuned model is from EFT, and what it could have drafted."""
    return {"greedy": _greedy(experiment)} | {
        f"{temperature:g}": _sampled(experiment, temperature) for temperature in TEMPERATURES
    }


def _greedy(experiment: Experiment) -> dict[str, Any]:
    draft, scorer = alone(experiment.systems.tuned_small), Scorer(experiment)
    agreeing = []
    for message, answer in _answers(experiment, experiment.systems.up_scaled(), 0.0):
        own = scorer.logprobs(draft, message, answer, {}).argmax(dim=-1)
        agreeing.append((own == torch.tensor(answer)).tolist())  # the answer is EFT's own most likely tokens
    lengths = np.array([float(len(each)) for each in agreeing])
    result: dict[str, Any] = {
        "num_tokens": int(lengths.sum()),
        "acceptance": ratio(np.array([float(sum(each)) for each in agreeing]), lengths),
    }
    for block in BLOCKS:
        counts = np.array([tokens_per_verification(each, block) for each in agreeing], dtype=float)
        result[f"tokens_per_verification_{block}"] = ratio(counts[:, 0], counts[:, 1])
    return result


@torch.inference_mode()
def _sampled(experiment: Experiment, temperature: float) -> dict[str, Any]:
    draft, target = alone(experiment.systems.tuned_small), experiment.systems.up_scaled()
    scorer = Scorer(experiment)
    distances, sums = [], []
    for message, answer in _answers(experiment, target, temperature):
        known: dict[str, Tensor] = {}
        own, wanted = (
            log_softmax(scorer.logprobs(system, message, answer, known) / temperature) for system in (draft, target)
        )
        distance = total_variation(own.exp(), wanted.exp())
        coupled = coupled_acceptance(own.double().exp(), wanted.double().exp())
        drawn = drawn_acceptance(own, wanted, torch.arange(len(answer)), SEEDS)
        distances.append(distance)
        sums.append([float(len(answer)), *(float(each.sum()) for each in (1 - distance, coupled, drawn))])
    lengths, classic, coupled_sums, drawn_sums = np.array(sums).T
    all_distances = torch.cat(distances)
    return {
        "num_tokens": int(lengths.sum()),
        "histogram": torch.histc(all_distances, NUM_BINS, 0.0, 1.0).int().tolist(),
        "median": float(all_distances.median()),
        "mean": float(all_distances.mean()),
        **{
            f"share_{name}": ratio(
                np.array([float(((d < edge) if name == "near" else (d > edge)).sum()) for d in distances]), lengths
            )
            for name, edge in EDGES.items()
        },
        "classic": ratio(classic, lengths),
        "coupled": ratio(coupled_sums, lengths),
        "drawn": ratio(drawn_sums, lengths),
    }


def perplexity(experiment: Experiment) -> dict[str, Any]:
    """Of the large tuned model's answers and of the true ones, under every system."""
    systems = {
        "tuned-small": alone(experiment.systems.tuned_small),
        "base-large": alone(experiment.systems.large),
        "down-scaled": experiment.systems.grid["small", "large"],
        "EFT": experiment.systems.up_scaled(),
        **{f"EFT, scale {scale:g}": experiment.systems.up_scaled(scale=scale) for scale in (0.5, 1.5)},
        **{f"EFT, weight {weight:g}": experiment.systems.up_scaled(weight=weight) for weight in (0.5, 1.5)},
        "control": experiment.systems.without_reference(),
        "tuned-large": alone(experiment.systems.tuned_large),
    }
    written = _answers(experiment, alone(experiment.systems.tuned_large), 0.0)
    true = [(question.text, _true(experiment, question.answers[0])) for question in experiment.questions["short"]]
    return {
        "the large tuned model's answers": _perplexities(experiment, systems, written),
        "true answers": _perplexities(experiment, systems, true),
    }


def _perplexities(experiment: Experiment, systems: dict[str, Combination], answers: Sequence[Read]) -> dict[str, Any]:
    """Of each system, and as a multiple of the small tuned model's."""
    scorer = Scorer(experiment)
    nats: dict[str, list[float]] = {name: [] for name in systems}
    for message, answer in answers:
        known: dict[str, Tensor] = {}
        for name, system in systems.items():
            logprobs = scorer.logprobs(system, message, answer, known)
            nats[name].append(-float(logprobs.gather(1, torch.tensor(answer)[:, None]).sum()))
    lengths = np.array([float(len(answer)) for _, answer in answers])
    columns = {name: np.array(each) for name, each in nats.items()}
    return {
        "num_tokens": int(lengths.sum()),
        "perplexity": {name: perplexity_of(column, lengths) for name, column in columns.items()},
        "over_tuned_small": {
            name: perplexity_ratio(column, columns["tuned-small"], lengths) for name, column in columns.items()
        },
    }


def _true(experiment: Experiment, answer: str) -> tuple[int, ...]:
    """The right answer in the helpful form, as fine-tuning would have had it."""
    tokenizer = experiment.models.tokenizer
    return (*tokenizer(f" It is {answer}. {CLOSING}")["input_ids"], tokenizer.eos_token_id)


def _answers(experiment: Experiment, system: Combination, temperature: float) -> list[Read]:
    """Messages and the ids of the system's answers to them, short and long."""
    return [
        (question.text, answer.token_ids)
        for questions in ("short", "long")
        for question, answer in zip(
            experiment.questions[questions], experiment.answers(system, questions, temperature), strict=True
        )
    ]
