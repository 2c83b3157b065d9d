"""Who fits, who is evicted, and how steps become forwards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft_serve.engine.block_pool import BLOCK_SIZE
from eft_serve.engine.kv_cache import KVCache
from eft_serve.engine.scheduler import Admitted, Limits, StepScheduler, find_mistake, waves
from eft_serve.types import SequenceStep, StepOutput

LIMITS = Limits(vocab_size=10, max_model_len=1000, max_num_batched_tokens=8)


def step(name: str, position: int, count: int, num_logits: int = 0) -> SequenceStep:
    return SequenceStep(name, position, [1] * count, num_logits)


def shared(name: str, count: int, max_computed: int | None = None) -> SequenceStep:
    """A first step; all of these begin alike."""
    return SequenceStep(name, 0, [1] * count, 0, "salt", max_computed)


def admit(
    scheduler: StepScheduler, *steps: SequenceStep, now: float = 0.0
) -> tuple[list[Admitted], list[tuple[int, StepOutput]]]:
    """Admit one wave and count it as computed."""
    admitted, answered = scheduler.admit(list(enumerate(steps)), now)
    for chunks in scheduler.pack(admitted):
        for chunk in chunks:
            scheduler._cache.commit(chunk.admitted.sequence, chunk.token_ids)
    return admitted, answered


def served(admitted: list[Admitted]) -> list[str]:
    return [item.step.sequence_id for item in admitted]


@pytest.fixture
def cache() -> KVCache:
    return KVCache(4)


@pytest.fixture
def scheduler(cache: KVCache) -> StepScheduler:
    return StepScheduler(cache, LIMITS)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9))))
def test_waves_keep_every_step_and_each_sequences_order(drawn: list[tuple[str, int]]) -> None:
    steps = [step(name, position, 1) for name, position in drawn]
    result = waves(steps)
    assert sorted(index for wave in result for index, _ in wave) == list(range(len(steps)))
    for wave in result:
        assert len({s.sequence_id for _, s in wave}) == len(wave)
    for name in "abc":
        in_order = [index for wave in result for index, s in wave if s.sequence_id == name]
        assert in_order == sorted(in_order)


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1)), min_size=1, max_size=6))
def test_packing_loses_no_token_and_no_logit(drawn: list[tuple[int, float]]) -> None:
    scheduler = StepScheduler(KVCache(100), LIMITS)
    steps = [step(str(i), 0, count, round(part * count)) for i, (count, part) in enumerate(drawn)]
    admitted, _ = scheduler.admit(list(enumerate(steps)), 0.0)
    forwards = scheduler.pack(admitted)
    assert all(sum(c.stop - c.start for c in chunks) <= LIMITS.max_num_batched_tokens for chunks in forwards)
    for item in admitted:
        chunks = [c for forward in forwards for c in forward if c.admitted is item]
        assert [token for c in chunks for token in c.row().token_ids] == item.step.token_ids
        assert [c.row().position for c in chunks] == [c.start for c in chunks]
        assert sum(c.num_logits for c in chunks) == item.step.num_logits
        assert all(len(c.row().block_ids) * BLOCK_SIZE >= c.stop for c in chunks)


def test_the_least_recently_stepped_outsider_goes_first(scheduler: StepScheduler, cache: KVCache) -> None:
    admit(scheduler, step("old", 0, BLOCK_SIZE), now=1.0)
    admit(scheduler, step("new", 0, 2 * BLOCK_SIZE), now=2.0)
    admitted, answered = admit(scheduler, step("mine", 0, 2 * BLOCK_SIZE), now=3.0)
    assert (served(admitted), answered) == (["mine"], [])
    assert cache.get("old") is None
    assert cache.get("new") is not None
    assert scheduler.take_num_evictions() == 1
    assert scheduler.take_num_evictions() == 0


def test_an_evicted_sequence_finds_out_by_zero_computed_tokens(scheduler: StepScheduler) -> None:
    admit(scheduler, step("victim", 0, 3 * BLOCK_SIZE))
    admit(scheduler, step("mine", 0, 4 * BLOCK_SIZE))
    _, answered = admit(scheduler, step("victim", 3 * BLOCK_SIZE, 1))
    assert answered == [(0, StepOutput("victim", num_computed_tokens=0))]


def test_the_first_step_takes_blocks_from_later_steps_of_the_same_call(scheduler: StepScheduler) -> None:
    names = ["a", "b", "c", "d"]
    admit(scheduler, *(step(name, 0, BLOCK_SIZE) for name in names))
    admitted, answered = admit(scheduler, *(step(name, BLOCK_SIZE, 1) for name in names))
    assert served(admitted) == ["a", "b"], "the last ones gave way"
    assert [(output.sequence_id, output.num_computed_tokens) for _, output in answered] == [("c", 0), ("d", 0)]


def test_a_step_without_room_is_answered_with_its_computed_tokens_and_evicts_no_sequence(
    scheduler: StepScheduler, cache: KVCache
) -> None:
    admit(scheduler, step("waiting", 0, 8))
    admitted, answered = admit(scheduler, step("first", 0, 3 * BLOCK_SIZE), step("waiting", 8, 3 * BLOCK_SIZE))
    assert served(admitted) == ["first"]
    assert answered == [(1, StepOutput("waiting", num_computed_tokens=8))]
    assert cache.get("first") is not None


def test_rollback_gives_blocks_back(scheduler: StepScheduler, cache: KVCache) -> None:
    admit(scheduler, step("a", 0, 4 * BLOCK_SIZE))
    admitted, _ = admit(scheduler, step("a", BLOCK_SIZE, 1), step("b", 0, 2 * BLOCK_SIZE))
    assert served(admitted) == ["a", "b"]
    assert cache.pool.num_free == 0


def test_blocks_shared_with_a_sequence_that_stays_are_not_freed_by_eviction(
    scheduler: StepScheduler, cache: KVCache
) -> None:
    admit(scheduler, shared("outsider", 2 * BLOCK_SIZE))
    admitted, answered = admit(scheduler, shared("first", 2 * BLOCK_SIZE + 1), step("second", 0, 2 * BLOCK_SIZE))
    assert served(admitted) == ["first"]
    assert answered == [(1, StepOutput("second", num_computed_tokens=0))]
    assert cache.get("outsider") is not None, "evicting it would have freed nothing"


def test_an_outsider_whose_eviction_frees_nothing_is_passed_over(scheduler: StepScheduler, cache: KVCache) -> None:
    admit(scheduler, shared("sharer", BLOCK_SIZE))
    admit(scheduler, step("owner", 0, BLOCK_SIZE))
    admitted, _ = admit(scheduler, shared("first", BLOCK_SIZE + 1), step("second", 0, 2 * BLOCK_SIZE))
    assert served(admitted) == ["first", "second"]
    assert cache.get("sharer") is not None
    assert cache.get("owner") is None


def test_a_step_is_admitted_from_what_is_found_to_its_limit(scheduler: StepScheduler) -> None:
    admit(scheduler, shared("old", 2 * BLOCK_SIZE))
    (item,), _ = admit(scheduler, shared("new", 3 * BLOCK_SIZE, max_computed=3))
    assert (item.start, item.stop) == (2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 3)
    assert len(item.sequence.block_ids) == 3


def test_a_step_that_is_left_half_way_computes_no_logits(scheduler: StepScheduler) -> None:
    (item,), _ = scheduler.admit([(0, SequenceStep("s", 0, [1] * 9, 9, max_computed=4))], 0.0)
    assert [(c.token_ids, c.row().num_logits) for (c,) in scheduler.pack([item])] == [([1] * 4, 0)]


def test_found_blocks_are_kept_while_there_is_no_room_for_the_rest(scheduler: StepScheduler, cache: KVCache) -> None:
    admit(scheduler, shared("old", BLOCK_SIZE))
    cache.free("old")
    _, answered = admit(scheduler, step("first", 0, 3 * BLOCK_SIZE), shared("second", 2 * BLOCK_SIZE))
    found = StepOutput("second", num_computed_tokens=BLOCK_SIZE, num_cached_tokens=BLOCK_SIZE)
    assert answered == [(1, found)]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (step("s", -1, 1), "position"),
        (step("s", 0, 0), "token_ids"),
        (step("s", 0, 2, 3), "num_logits"),
        (step("s", 0, 2, -1), "num_logits"),
        (SequenceStep("s", 0, [3, 10], 1), "token_ids: 10"),
        (SequenceStep("s", 0, [-1], 1), "token_ids: -1"),
        (step("s", 0, 4 * BLOCK_SIZE + 1), "kv_cache_tokens"),
        (step("s", 1000, 1), "max_model_len"),
        (shared("s", 2, max_computed=0), "max_computed"),
        (SequenceStep("s", 1, [1], 1, "salt"), "salt"),
    ],
)
def test_a_step_that_can_never_be_served_names_the_field(bad: SequenceStep, field: str) -> None:
    mistake = find_mistake(bad, LIMITS, capacity_tokens=4 * BLOCK_SIZE)
    assert mistake is not None
    assert field in mistake


def test_a_bad_step_changes_nothing(scheduler: StepScheduler, cache: KVCache) -> None:
    admit(scheduler, step("a", 0, 5))
    admit(scheduler, step("a", 2, 1, num_logits=7))
    sequence = cache.get("a")
    assert sequence is not None
    assert sequence.num_computed_tokens == 5
