"""The engine against the stock model: every architecture, random schedules, token for token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cache_checks import assert_consistent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, COMPACT, PADDED, VOCAB_SIZE, greedy, stock_logits
from torch import Tensor
from transformers import PreTrainedModel

from eft_serve.engine.engine import Engine
from eft_serve.types import SequenceStep, StepOutput

Load = Callable[..., Engine]
References = Callable[[str], PreTrainedModel]

LENGTH = 44
TOLERANCE = 1e-4
SALTS = ["salt", "salt", "salt", None]
SMALL: dict[str, Any] = {"kv_cache_tokens": 96, "max_num_batched_tokens": 16}  # two sequences fit, the others evict


@dataclass(frozen=True)
class Draw:
    """One step before it is known what the engine holds."""

    sequence: int
    position: float  # part of the tokens believed to be cached
    count: int
    num_logits: float  # part of count
    max_computed: int | None


draws = st.builds(
    Draw,
    st.integers(0, 3),
    st.just(0.0) | st.floats(0, 1),
    st.integers(1, 20) | st.just(LENGTH),
    st.floats(0, 1),
    st.none() | st.integers(1, 20),
)
schedules = st.lists(st.lists(draws, min_size=1, max_size=5), min_size=3, max_size=10)


def tokens_of(sequence: int) -> list[int]:
    return random.Random(sequence).choices(range(VOCAB_SIZE), k=LENGTH)


def alike(sequence: int) -> list[int]:
    """Two blocks, one block or less in common with the other sequences."""
    common = (36, 32, 20, 36)[sequence]
    return tokens_of(0)[:common] + tokens_of(1 + sequence)[common:]


def expected_path(architecture: str) -> str:
    return "padded" if architecture in PADDED else "compact+paged" if architecture in COMPACT else "ragged+paged"


def to_step(draw: Draw, believed: dict[int, int]) -> SequenceStep:
    position = min(round(draw.position * believed.get(draw.sequence, 0)), LENGTH - 1)
    tokens = alike(draw.sequence)[position : position + draw.count]
    salt = None if position else SALTS[draw.sequence]
    return SequenceStep(
        str(draw.sequence), position, tokens, round(draw.num_logits * len(tokens)), salt, draw.max_computed
    )


def assert_answers(
    steps: Sequence[SequenceStep], outputs: Sequence[StepOutput], logits: dict[int, Tensor], believed: dict[int, int]
) -> None:
    for step, output in zip(steps, outputs, strict=True):
        assert output.sequence_id == step.sequence_id
        assert output.error is None
        sequence, end = int(step.sequence_id), step.position + len(step.token_ids)
        if output.num_computed_tokens is not None:
            assert output.logits is None
            assert 0 <= output.num_computed_tokens < end
            believed[sequence] = output.num_computed_tokens
            continue
        assert output.logits is not None
        wanted = logits[sequence][end - step.num_logits : end]
        torch.testing.assert_close(output.logits, wanted, atol=TOLERANCE, rtol=0)
        assert output.logits.argmax(-1).tolist() == wanted.argmax(-1).tolist()
        believed[sequence] = end


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=schedules)
def test_any_schedule_gives_the_stock_models_logits(
    architecture: str, schedule: list[list[Draw]], load: Load, references: References
) -> None:
    engine = load(architecture, **SMALL)
    assert engine.info.attention == expected_path(architecture), "the other path would hide this one's mistakes"
    engine.free(map(str, range(4)))
    logits = {i: stock_logits(references(architecture), alike(i)) for i in range(4)}
    believed: dict[int, int] = {}
    for call in schedule:
        steps = []
        for draw in call:
            steps.append(to_step(draw, believed))
            believed[draw.sequence] = steps[-1].position + len(steps[-1].token_ids)
        outputs = engine.forward(steps)
        if outputs[0].num_computed_tokens is not None and outputs[0].num_computed_tokens >= steps[0].position:
            assert steps[0].max_computed is not None, "the first step has room"
        assert_answers(steps, outputs, logits, believed)
        assert_consistent(engine._cache)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_generate(architecture: str, load: Load, references: References) -> None:
    engine, model = load(architecture), references(architecture)
    assert engine.info.attention == expected_path(architecture)
    seen: set[int] = set()
    for length in (1, 7, 30):
        prompt = tokens_of(9)[:length]
        ids = torch.tensor([prompt])
        generated = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        continuation = generated[0, length:].tolist()
        for salt in ("salt", "salt", None):
            assert greedy(engine, "greedy", prompt, 24, salt) == continuation
        seen.update(continuation)
    assert len(seen) > 3, "a degenerate model proves nothing"
    hits = engine.registry.get_sample_value("eft_engine_prefix_hit_tokens_total", {"model": architecture})
    assert hits is not None
    assert hits >= 16, "the second one found the first one's prompt"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_known_prompt_costs_one_token_whether_its_last_block_is_taken_or_copied(
    architecture: str, load: Load, references: References
) -> None:
    engine, tokens = load(architecture), tokens_of(5)
    wanted = stock_logits(references(architecture), [*tokens[:32], 1, 2])
    engine.forward([SequenceStep("first", 0, tokens[:32], 0, "known")])
    engine.free(["first"])
    for name in ("takes", "copies"):
        computed = engine.registry.get_sample_value("eft_engine_tokens_computed_total", {"model": architecture})
        (output,) = engine.forward([SequenceStep(name, 0, tokens[:32], 1, "known")])
        assert output.logits is not None
        torch.testing.assert_close(output.logits[0], wanted[31], atol=TOLERANCE, rtol=0)
        after = engine.registry.get_sample_value("eft_engine_tokens_computed_total", {"model": architecture})
        assert (after or 0) - (computed or 0) == 1
    for position, token in ((32, 1), (33, 2)):
        for output in engine.forward([SequenceStep(name, position, [token], 1) for name in ("takes", "copies")]):
            assert output.logits is not None
            torch.testing.assert_close(output.logits[0], wanted[position], atol=TOLERANCE, rtol=0)
    engine.free(["takes", "copies"])


def test_resending_a_step_changes_nothing(load: Load) -> None:
    engine = load("llama")
    tokens = tokens_of(0)
    engine.forward([SequenceStep("r", 0, tokens[:20], 0)])
    first, again = (engine.forward([SequenceStep("r", 12, tokens[12:17], 5)])[0].logits for _ in range(2))
    assert first is not None
    assert again is not None
    torch.testing.assert_close(first, again, atol=0, rtol=0)


def test_rollback_forgets_the_rejected_draft(load: Load, references: References) -> None:
    engine, tokens = load("mistral"), tokens_of(1)
    wrong = [(token + 1) % VOCAB_SIZE for token in tokens[10:14]]
    engine.forward([SequenceStep("draft", 0, tokens[:10] + wrong, 1)])
    (output,) = engine.forward([SequenceStep("draft", 10, tokens[10:11], 1)])
    assert output.logits is not None
    wanted = stock_logits(references("mistral"), tokens)[10:11]
    torch.testing.assert_close(output.logits, wanted, atol=TOLERANCE, rtol=0)


def test_logits_span_the_forwards_that_a_long_step_is_split_into(load: Load, references: References) -> None:
    engine, tokens = load("qwen2", max_num_batched_tokens=5), tokens_of(2)
    steps = [SequenceStep("long", 0, tokens[:23], 20), SequenceStep("short", 0, tokens[:2], 2)]
    long, short = engine.forward(steps)
    wanted = stock_logits(references("qwen2"), tokens)
    assert long.logits is not None
    assert short.logits is not None
    torch.testing.assert_close(long.logits, wanted[3:23], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(short.logits, wanted[:2], atol=TOLERANCE, rtol=0)


def test_two_steps_for_one_sequence_are_computed_in_order(load: Load, references: References) -> None:
    engine, tokens = load("llama"), tokens_of(3)
    steps = [SequenceStep("twice", 0, tokens[:4], 1), SequenceStep("twice", 4, tokens[4:9], 1)]
    _, second = engine.forward(steps)
    assert second.logits is not None
    torch.testing.assert_close(second.logits, stock_logits(references("llama"), tokens)[8:9], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("architecture", ["gemma2", "falcon-new"])
def test_bfloat16_is_close(architecture: str, load: Load, references: References) -> None:
    engine, tokens = load(architecture, dtype="bfloat16"), tokens_of(4)
    (output,) = engine.forward([SequenceStep("half", 0, tokens, LENGTH)])
    assert output.logits is not None
    assert output.logits.dtype == torch.bfloat16
    wanted = stock_logits(references(architecture), tokens)
    assert (output.logits.float() - wanted).norm() < 0.05 * wanted.norm()
