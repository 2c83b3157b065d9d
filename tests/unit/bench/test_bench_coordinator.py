"""The logits that the benchmark's engines answer with, and the ratios that it takes; no engine runs."""

from __future__ import annotations

import pytest
import torch

from eft_serve.bench.coordinator import Round, result, summarize
from eft_serve.bench.peaked_engine import NUM_ROWS, PeakedEngine, peaked_logits
from eft_serve.types import SequenceStep

VOCAB_SIZE = 32_000


@pytest.fixture(scope="module")
def combined() -> torch.Tensor:
    base, tuned, reference = (peaked_logits(model, VOCAB_SIZE) for model in ("base", "tuned", "reference"))
    return base + tuned - reference


def test_the_combined_distribution_has_a_likely_token_and_a_nucleus_of_a_few_dozen(combined: torch.Tensor) -> None:
    probs = combined.softmax(dim=-1).sort(dim=-1, descending=True).values
    nucleus = (probs.cumsum(dim=-1) - probs < 0.9).sum(dim=-1)
    assert probs.shape == (NUM_ROWS, VOCAB_SIZE)
    assert 0.3 <= probs[:, 0].median() <= 0.6
    assert 0.15 <= probs[:, 0].min() <= probs[:, 0].max() <= 0.7
    assert 5 <= nucleus.min() <= nucleus.max() <= 48


def test_most_tokens_are_10_to_20_below_the_peak(combined: torch.Tensor) -> None:
    for logits in (combined, peaked_logits("base", VOCAB_SIZE)):
        behind = logits.amax(dim=-1, keepdim=True) - logits
        assert ((behind >= 10) & (behind <= 22)).float().mean() > 0.9


def test_models_agree_about_the_likely_tokens_and_differ_everywhere() -> None:
    base, tuned = (peaked_logits(model, VOCAB_SIZE) for model in ("base", "tuned"))
    heads = [logits.topk(8).indices for logits in (base, tuned)]
    agreed = sum(len(set(a) & set(b)) for a, b in zip(*(head.tolist() for head in heads), strict=True))
    assert agreed > 0.75 * heads[0].numel()
    assert (base == tuned).float().mean() < 0.01
    assert torch.equal(base, peaked_logits("base", VOCAB_SIZE))


def test_an_engine_answers_a_row_that_only_request_and_position_tell() -> None:
    logits = peaked_logits("base", 1000)
    base, tuned = PeakedEngine(logits), PeakedEngine(logits)
    steps = [SequenceStep(f"{request}/base", position, [1], 1) for request in range(8) for position in range(2)]
    outputs = base.forward(steps)
    rows = torch.cat([output.logits for output in outputs if output.logits is not None])
    assert [output.sequence_id for output in outputs] == [step.sequence_id for step in steps]
    assert len(rows.unique(dim=0)) > len(steps) / 2
    for step, row in zip(steps, rows, strict=True):
        name = step.sequence_id.replace("base", "tuned")
        [other] = tuned.forward([SequenceStep(name, step.position, [2], 1)])
        assert other.logits is not None
        assert torch.equal(other.logits[0], row)


def of_round(slowness: float, t1: float) -> Round:
    """One whose step at T = 1 takes `t1` times as long as the greedy one."""
    step = {"greedy": 0.010 * slowness, "t1": 0.010 * slowness * t1, "top_p": 0.030 * slowness}
    part = {"greedy": 0.004 * slowness, "t1": 0.008 * slowness, "top_p": 0.016 * slowness}
    return Round(step, part, 0.002 * slowness)


def test_ratios_are_medians_of_what_one_round_measured() -> None:
    summary = summarize([of_round(1, t1=2), of_round(7, t1=1.5), of_round(2, t1=9)])
    assert summary["over_greedy"] == {"t1": 2.0, "top_p": 3.0}  # the ratio of the medians would be 9
    assert summary["combine_and_sample_over_floor"] == {"greedy": 2.0, "t1": 4.0, "top_p": 8.0}
    assert summary["overhead_ms_p50"] == {"greedy": 20.0, "t1": 105.0, "top_p": 60.0}
    assert summary["combine_and_sample_ms"] == {"greedy": 8.0, "t1": 16.0, "top_p": 32.0}
    assert summary["floor_ms"] == 4.0


@pytest.mark.parametrize(
    ("vocab_sizes", "headline"), [([32_000, 128_256, 151_936], 128_256), ([32_000, 151_936, 1000], 151_936)]
)
def test_the_headline_is_the_largest_batch_at_128256_or_else_the_largest_vocabulary(
    vocab_sizes: list[int], headline: int
) -> None:
    summaries = {v: {b: summarize([of_round(1, t1=v + b)]) for b in (64, 1)} for v in vocab_sizes}
    shown = result(summaries)
    assert shown["at"] == {"batch": 64, "vocab": headline}
    assert shown["over_greedy"]["t1"] == headline + 64
    assert list(shown["overhead_ms_p50"]) == [str(v) for v in vocab_sizes]
    assert shown["floor_ms"][str(headline)] == {"64": 2.0, "1": 2.0}
