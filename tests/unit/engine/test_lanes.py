"""Dense lanes: the same logits whatever is copied, evicted, rolled back or goes around them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, stock_logits
from transformers import PreTrainedModel

from eft_serve.engine import lanes, layout
from eft_serve.engine.batch import BatchRow
from eft_serve.engine.engine import Engine
from eft_serve.engine.lanes import Lanes
from eft_serve.engine.paged_tensors import PagedTensors
from eft_serve.types import SequenceStep

LENGTH = 80
Step = tuple[int, float, int]  # sequence, part of what is held to keep, tokens to append


@pytest.fixture(scope="module", params=["llama", "gemma2", "mistral"])
def narrow(
    request: pytest.FixtureRequest, load: Callable[..., Engine], references: Callable[[str], PreTrainedModel]
) -> Iterator[tuple[Engine, PreTrainedModel]]:
    """An engine with three short lanes, so that they are taken from one another and outgrown."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "NUM_LANES", 3)
        patch.setattr(lanes, "LANE_TOKENS", 64)
        patch.setattr(lanes, "MAX_NEW_TOKENS", 4)
        patch.setattr(lanes, "IDLE_FORWARDS", 1)
        patch.setattr(layout, "_CALL_ELEMENTS", 400)  # rows of unequal length are attended to apart
        yield load(request.param, lease_s=77.0), references(request.param)


rows_in_lanes = st.dictionaries(st.integers(0, 40), st.integers(1, 700), min_size=1, max_size=20)


@given(rows_in_lanes, st.integers(0, 500))
def test_rows_are_attended_to_once_each_and_together_where_little_is_read_in_vain(
    rows: dict[int, int], worth: int
) -> None:
    lanes, lengths = zip(*sorted(rows.items()), strict=True)
    runs = layout._runs(lanes, lengths, worth)
    assert [i for of, _ in runs for i in range(of.start, of.stop)] == list(range(len(rows)))
    assert [lane for _, of in runs for lane in range(of.start, of.stop)] == list(lanes)
    for of, _ in runs:
        wasted = sum(max(lengths[of]) - length for length in lengths[of])
        assert wasted <= worth * (of.stop - of.start - 1)


def test_equal_rows_in_neighbouring_lanes_are_one_run_and_an_odd_one_is_left_out() -> None:
    assert layout._runs([3, 4, 5], [70, 70, 70], 0) == [(slice(0, 3), slice(3, 6))]
    assert layout._runs([3, 4, 6], [70, 70, 70], 0) == [(slice(0, 2), slice(3, 5)), (slice(2, 3), slice(6, 7))]
    assert [of for of, _ in layout._runs([0, 1, 2, 3], [90, 90, 9, 90], 80)] == [
        slice(0, 2),
        slice(2, 3),
        slice(3, 4),
    ]


def tokens_of(sequence: int) -> list[int]:
    return random.Random(sequence).choices(range(VOCAB_SIZE), k=LENGTH)


forwards = st.lists(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([1.0, 1.0, 1.0, 0.7, 0.0]), st.sampled_from([1, 1, 1, 3, 9, 40])),
        min_size=1,
        max_size=5,
        unique_by=lambda step: step[0],
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=forwards)
def test_any_mix_of_decodes_rollbacks_and_prefills(
    narrow: tuple[Engine, PreTrainedModel], schedule: list[list[Step]]
) -> None:
    engine, model = narrow
    engine.free(map(str, range(5)))
    expected = {i: stock_logits(model, tokens_of(i)) for i in range(5)}
    held = dict.fromkeys(range(5), 0)
    for call in schedule:
        steps = []
        for sequence, keep, count in call:
            position = min(int(held[sequence] * keep), LENGTH - 1)
            steps.append(SequenceStep(str(sequence), position, tokens_of(sequence)[position : position + count], 1))
            held[sequence] = position + len(steps[-1].token_ids)
        for step, output in zip(steps, engine.forward(steps), strict=True):
            sequence = int(step.sequence_id)
            assert output.logits is not None
            torch.testing.assert_close(output.logits[0], expected[sequence][held[sequence] - 1], atol=1e-4, rtol=0)


def test_another_future_after_a_rollback_around_the_lane(narrow: tuple[Engine, PreTrainedModel]) -> None:
    """A rollback whose new tokens are a prefill: the lane must not keep what was decoded before it."""
    engine, model = narrow
    first, second = tokens_of(7), tokens_of(8)
    other = [*first[:10], *second[:30]]
    engine.forward([SequenceStep("r", 0, first[:20], 0)])
    for position in range(20, 36):
        engine.forward([SequenceStep("r", position, first[position : position + 1], 1)])
    engine.forward([SequenceStep("r", 10, other[10:39], 0)])
    (output,) = engine.forward([SequenceStep("r", 39, other[39:40], 1)])
    assert output.logits is not None
    torch.testing.assert_close(output.logits[0], stock_logits(model, other)[-1], atol=1e-4, rtol=0)
    engine.free(["r"])


def test_an_adopted_beginning_replaces_what_a_lane_had(narrow: tuple[Engine, PreTrainedModel]) -> None:
    """One sequence, begun again with other tokens that are all found in the cache."""
    engine, model = narrow
    first, second = tokens_of(11), tokens_of(12)
    engine.forward([SequenceStep("other", 0, second[:33], 0, salt="s")])
    engine.forward([SequenceStep("r", 0, first[:33], 0, salt="s")])
    for position in range(33, 36):
        engine.forward([SequenceStep("r", position, first[position : position + 1], 1)])
    (output,) = engine.forward([SequenceStep("r", 0, second[:33], 1, salt="s")])
    assert output.logits is not None
    torch.testing.assert_close(output.logits[0], stock_logits(model, second[:33])[-1], atol=1e-4, rtol=0)
    engine.free(["r", "other"])


def paged(value: float) -> PagedTensors:
    tensors = [torch.full((9, 2, 16, 4), value)]
    return PagedTensors(tensors, [tensor.clone() for tensor in tensors])


def row(owner: int, position: int) -> BatchRow:
    return BatchRow([1], position, [1, 2, 3, 4], 1, owner)


def test_a_new_owner_finds_nothing_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked columns still take part in a product, and 0 · NaN is NaN."""
    monkeypatch.setattr(lanes, "NUM_LANES", 1)
    monkeypatch.setattr(lanes, "LANE_TOKENS", 64)
    cache = paged(float("nan"))
    dense = Lanes(cache)
    dense.begin_forward()
    assert dense.assign([row(1, 40)]) == [0]
    assert dense.keys[0][0, :, :40].isnan().all()
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(2.0)
    dense.begin_forward()
    assert dense.assign([row(2, 17)]) == [0]
    assert dense.keys[0][0, :, :17].eq(2.0).all()
    assert not dense.values[0].isnan().any()


def test_a_forward_never_gives_one_lane_to_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "NUM_LANES", 2)
    monkeypatch.setattr(lanes, "LANE_TOKENS", 64)
    dense = Lanes(paged(0.0))
    dense.begin_forward()
    assert dense.assign([row(1, 3), row(2, 3)]) == [0, 1]
    assert dense.assign([row(3, 3)]) is None
    dense.begin_forward()
    assert dense.assign([row(3, 3), row(4, 3), row(5, 3)]) is None
    dense.begin_forward()
    assert dense.assign([row(2, 64)]) is None, "longer than a lane"
