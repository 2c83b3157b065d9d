"""A real engine over a model that is a memory: whatever is shared, rolled back or evicted, it reads its own tokens."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cache_checks import assert_consistent
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tiny_models import Clock
from torch import Tensor

from eft_serve.config import ModelConfig
from eft_serve.engine.batch import BatchRow, ForwardBatch
from eft_serve.engine.block_pool import BLOCK_SIZE
from eft_serve.engine.engine import Engine
from eft_serve.errors import EngineError
from eft_serve.types import ModelInfo, SequenceStep, StepOutput

NUM_BLOCKS = 7
LENGTH = 5 * BLOCK_SIZE
LEASE_S = 10.0
SALTS = {"a": "red", "b": "red", "c": "red", "d": "blue", "e": "blue", "f": None, "g": None}
PATTERNS = [0, 0b10, 0b11, 0b1000, 0b10000]  # tokens 8k to 8k+7 are bit k: beginnings are shared, also in part


def fingerprint(token_ids: list[int]) -> Tensor:
    digest = hashlib.sha256(bytes(token_ids)).digest()
    return torch.tensor([float(byte) for byte in digest[:4]])


@dataclass
class MemoryGroup:
    """Stands for the ranks: a token's logits are a fingerprint of every token that its sequence's slots hold."""

    slots: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)  # (block, offset) → (whose, token)
    engine: Engine | None = None
    workers: tuple[()] = ()
    forwards_until_failure: int | None = None
    num_computed_tokens: int = 0
    num_copies: int = 0

    def forward(self, batch: ForwardBatch) -> Tensor:
        copied = {(target, i): self.slots[source, i] for source, target in batch.copies for i in range(BLOCK_SIZE)}
        self.slots |= copied
        self.num_copies += len(batch.copies)
        owners = [self._write(row) for row in batch.rows]
        if self.forwards_until_failure is not None:
            self.forwards_until_failure -= 1
            if self.forwards_until_failure < 0:
                self.slots |= dict.fromkeys(copied, ("nobody", -1))
                raise EngineError("no memory")
        self.num_computed_tokens += batch.num_tokens
        rows = [logits for row, owner in zip(batch.rows, owners, strict=True) for logits in self._read(row, owner)]
        return torch.stack(rows) if rows else torch.empty(0, 4)

    def _write(self, row: BatchRow) -> str:
        assert self.engine is not None
        cache = self.engine._cache
        (writer,) = [s.sequence_id for s in cache if row.block_ids[-1] in s.block_ids]
        owner = SALTS[writer] or f"only {writer}"
        for position, token in enumerate(row.token_ids, row.position):
            block = row.block_ids[position // BLOCK_SIZE]
            assert cache.pool.num_references(block) == 1, "a shared block is written"
            assert block not in cache.pool._digests, "a block that can be found is written"
            self.slots[block, position % BLOCK_SIZE] = (owner, token)
        return owner

    def _read(self, row: BatchRow, owner: str) -> list[Tensor]:
        end = row.position + len(row.token_ids)
        seen = [self.slots[row.block_ids[p // BLOCK_SIZE], p % BLOCK_SIZE] for p in range(end)]
        assert {whose for whose, _ in seen} == {owner}, "somebody else's tokens are read"
        tokens = [token for _, token in seen]
        return [fingerprint(tokens[: end - back]) for back in reversed(range(row.num_logits))]


def memory_engine(group: MemoryGroup, clock: Clock, **settings: Any) -> Engine:
    info = ModelInfo(
        model="memory",
        vocab_size=4,
        max_model_len=LENGTH,
        kv_capacity_tokens=NUM_BLOCKS * BLOCK_SIZE,
        kv_block_size=BLOCK_SIZE,
        dtype="float32",
        tensor_parallel=1,
        attention="none",
    )
    config = ModelConfig(path="none", lease_s=LEASE_S, **settings)
    group.engine = Engine(info, group, config, vocab_size=2, clock=clock)  # type: ignore[arg-type]
    return group.engine


@dataclass(frozen=True)
class Draw:
    """One step before it is known what the engine holds."""

    name: str
    position: float  # part of the tokens believed to be cached; 0 often
    pattern: int
    count: int
    num_logits: int
    max_computed: int | None


draws = st.builds(
    Draw,
    st.sampled_from(sorted(SALTS)),
    st.sampled_from([0.0, 0.0, 0.5, 0.9, 1.0, 1.0]),
    st.sampled_from(PATTERNS),
    st.integers(1, LENGTH),
    st.integers(0, 3),
    st.none() | st.integers(1, 40),
)


class SharingMachine(RuleBasedStateMachine):
    """Random steps, frees, lapsed leases and failures, with room for less than two long sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.group = Clock(), MemoryGroup()
        self.engine = memory_engine(self.group, self.clock, max_num_batched_tokens=24)
        self.tokens: dict[str, list[int]] = {name: [] for name in SALTS}  # as of the last step sent
        self.believed: dict[str, int] = dict.fromkeys(SALTS, 0)

    def to_step(self, draw: Draw) -> SequenceStep:
        position = min(round(draw.position * self.believed[draw.name]), LENGTH - 1)
        end = min(LENGTH, position + draw.count)
        token_ids = [draw.pattern >> (p // 8) & 1 for p in range(position, end)]
        self.tokens[draw.name] = self.tokens[draw.name][:position] + token_ids
        self.believed[draw.name] = end
        salt = SALTS[draw.name] if position == 0 else None
        return SequenceStep(
            draw.name, position, token_ids, min(draw.num_logits, len(token_ids)), salt, draw.max_computed
        )

    @rule(call=st.lists(draws, min_size=1, max_size=5, unique_by=lambda draw: draw.name))
    def forward(self, call: list[Draw]) -> None:
        self.clock.now += 1
        steps = [self.to_step(draw) for draw in call]
        computed = self.group.num_computed_tokens
        outputs = self.engine.forward(steps)
        for step, output in zip(steps, outputs, strict=True):
            self.check(step, output)
        assert outputs[0].logits is not None or steps[0].position > 0 or steps[0].max_computed is not None
        limits = [len(step.token_ids) if step.max_computed is None else step.max_computed for step in steps]
        assert self.group.num_computed_tokens - computed <= sum(limits)

    def check(self, step: SequenceStep, output: StepOutput) -> None:
        end = step.position + len(step.token_ids)
        assert output.error is None
        if output.num_computed_tokens is not None:
            assert output.num_computed_tokens < end
            self.believed[step.sequence_id] = output.num_computed_tokens
            return
        tokens = self.tokens[step.sequence_id]
        assert output.logits is not None
        assert len(output.logits) == step.num_logits
        for row, back in zip(output.logits, reversed(range(step.num_logits)), strict=True):
            assert torch.equal(row, fingerprint(tokens[: end - back]))

    @rule(draw=draws, forwards=st.integers(0, 2))
    def fail(self, draw: Draw, forwards: int) -> None:
        self.group.forwards_until_failure = forwards
        with contextlib.suppress(EngineError):
            self.check(step := self.to_step(draw), self.engine.forward([step])[0])
        self.group.forwards_until_failure = None

    @rule(names=st.lists(st.sampled_from(sorted(SALTS)), max_size=3))
    def free(self, names: list[str]) -> None:
        self.engine.free(names)
        for name in names:
            self.believed[name] = 0

    @precondition(lambda self: len(self.engine._cache) > 2)
    @rule()
    def lapse(self) -> None:
        self.clock.now += LEASE_S - 1
        self.engine.expire()

    @invariant()
    def accounts_balance(self) -> None:
        assert_consistent(self.engine._cache)

    @invariant()
    def sequences_hold_a_beginning_of_their_tokens(self) -> None:
        for sequence in self.engine._cache:
            token_ids = list(sequence.token_ids)
            assert token_ids == self.tokens[sequence.sequence_id][: len(token_ids)]

    def teardown(self) -> None:
        self.engine.free(SALTS)
        assert self.engine._cache.used_tokens == 0
        assert self.engine._cache.pool.num_free == NUM_BLOCKS


TestSharing = SharingMachine.TestCase
TestSharing.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.fixture
def group() -> MemoryGroup:
    return MemoryGroup()


@pytest.fixture
def engine(group: MemoryGroup, clock: Clock) -> Engine:
    return memory_engine(group, clock)


PROMPT = [i % 3 % 2 for i in range(40)]


def counted(engine: Engine, name: str) -> float | None:
    return engine.registry.get_sample_value(f"eft_engine_{name}_total", {"model": "memory"})


def start(engine: Engine, name: str, token_ids: list[int], num_logits: int = 1, **step: Any) -> StepOutput:
    """A sequence's first step, with its salt."""
    return engine.forward([SequenceStep(name, 0, token_ids, num_logits, SALTS[name], **step)])[0]


def test_equal_salts_share_what_is_equal_and_compute_the_rest(engine: Engine, group: MemoryGroup) -> None:
    start(engine, "a", PROMPT)
    assert group.num_computed_tokens == 40
    start(engine, "b", [*PROMPT[:35], 1, 1, 1])
    assert group.num_computed_tokens == 40 + 6, "two blocks of 16 were found"
    assert engine._cache.used_tokens == (3 + 1) * BLOCK_SIZE
    assert (counted(engine, "prefix_queried_tokens"), counted(engine, "prefix_hit_tokens")) == (78, 32)


@pytest.mark.parametrize(("first", "second"), [("a", "d"), ("a", "f"), ("f", "a"), ("f", "g"), ("f", "f")])
def test_other_salts_and_none_share_nothing_not_even_what_was_freed(
    engine: Engine, group: MemoryGroup, first: str, second: str
) -> None:
    start(engine, first, PROMPT)
    engine.free([first])
    start(engine, second, PROMPT)
    assert group.num_computed_tokens == 80
    assert counted(engine, "prefix_hit_tokens") == 0


def test_a_sequence_is_found_after_it_was_freed_with_what_it_generated(engine: Engine, group: MemoryGroup) -> None:
    start(engine, "a", PROMPT)
    for position in range(40, 48):
        engine.forward([SequenceStep("a", position, [1], 1)])
    engine.free(["a"])
    assert engine._cache.used_tokens == 0
    start(engine, "b", [*PROMPT, *[1] * 8, 0])
    assert group.num_computed_tokens == 48 + 1


@pytest.mark.parametrize(("count", "num_logits", "computed"), [(32, 1, 1), (33, 1, 1), (33, 0, 1), (40, 9, 9)])
def test_what_logits_are_wanted_of_is_always_computed(
    engine: Engine, group: MemoryGroup, count: int, num_logits: int, computed: int
) -> None:
    start(engine, "a", PROMPT)
    output = start(engine, "b", PROMPT[:count], num_logits)
    assert output.logits is not None
    assert len(output.logits) == num_logits
    assert group.num_computed_tokens == 40 + computed


def test_a_limit_counts_what_is_computed_and_not_what_is_found(engine: Engine, group: MemoryGroup) -> None:
    start(engine, "a", PROMPT)
    long = [*PROMPT[:35], *[1] * 20]
    assert start(engine, "b", long, 0, max_computed=5).num_computed_tokens == 37
    assert group.num_computed_tokens == 45
    (output,) = engine.forward([SequenceStep("b", 37, long[37:], 1, max_computed=18)])
    assert output.logits is not None
    assert torch.equal(output.logits[0], fingerprint(long))


def test_a_limited_step_reserves_no_more_than_it_computes_and_gives_no_logits(engine: Engine) -> None:
    output = start(engine, "a", PROMPT, 40, max_computed=16)
    assert (output.num_computed_tokens, output.logits) == (16, None)
    assert engine._cache.used_tokens == BLOCK_SIZE


def test_sending_a_first_step_again_is_harmless_and_cheap(engine: Engine, group: MemoryGroup) -> None:
    first, again = start(engine, "a", PROMPT), start(engine, "a", PROMPT)
    assert first.logits is not None
    assert again.logits is not None
    assert torch.equal(first.logits, again.logits)
    assert group.num_computed_tokens == 40 + 8


def test_a_rollback_into_a_shared_block_goes_on_in_a_copy(engine: Engine, group: MemoryGroup) -> None:
    start(engine, "a", PROMPT)
    start(engine, "b", PROMPT)
    (output,) = engine.forward([SequenceStep("b", 20, [1], 1)])
    assert output.logits is not None
    assert torch.equal(output.logits[0], fingerprint([*PROMPT[:20], 1]))
    assert group.num_copies == 1
    (output,) = engine.forward([SequenceStep("a", 40, [1], 1)])
    assert output.logits is not None, "the other one kept its blocks"


def test_without_room_for_a_copy_a_rollback_falls_back_to_the_blocks_beginning(
    engine: Engine, group: MemoryGroup
) -> None:
    start(engine, "a", PROMPT)
    start(engine, "b", PROMPT)
    start(engine, "f", [0] * 48)
    assert engine._cache.pool.num_free == 0
    assert engine.forward([SequenceStep("b", 20, [1], 1), SequenceStep("f", 48, [1], 1)])[0].num_computed_tokens == 16
    assert group.num_copies == 0


def test_a_whole_prompt_without_references_is_taken_and_found_again(engine: Engine, group: MemoryGroup) -> None:
    for name in ("a", "b", "c"):
        output = start(engine, name, PROMPT[:32])
        assert output.logits is not None
        assert torch.equal(output.logits[0], fingerprint(PROMPT[:32]))
        engine.free([name])
    assert (group.num_computed_tokens, group.num_copies) == (32 + 1 + 1, 0)


def test_a_whole_prompt_that_others_hold_is_copied_and_stays_theirs(engine: Engine, group: MemoryGroup) -> None:
    start(engine, "a", PROMPT[:32])
    start(engine, "b", PROMPT[:32])
    assert (group.num_computed_tokens, group.num_copies) == (32 + 1, 1)
    assert engine._cache.used_tokens == 3 * BLOCK_SIZE
    for name in ("a", "b"):
        (output,) = engine.forward([SequenceStep(name, 32, [1], 1)])
        assert output.logits is not None
        assert torch.equal(output.logits[0], fingerprint([*PROMPT[:32], 1]))


def test_a_copy_that_failed_is_forgotten(engine: Engine, group: MemoryGroup) -> None:
    start(engine, "a", PROMPT[:32])
    group.forwards_until_failure = 0
    with pytest.raises(EngineError):
        start(engine, "b", PROMPT[:32])
    group.forwards_until_failure = None
    assert engine.forward([SequenceStep("b", 31, PROMPT[31:32], 1)])[0].num_computed_tokens == 16
    (output,) = engine.forward([SequenceStep("b", 16, PROMPT[16:32], 1)])
    assert output.logits is not None
    assert torch.equal(output.logits[0], fingerprint(PROMPT[:32]))


def test_a_source_that_is_evicted_in_the_same_call_is_copied_as_it_was(engine: Engine, group: MemoryGroup) -> None:
    start(engine, "a", PROMPT[:32])
    engine.forward([SequenceStep("a", 32, [1] * 16, 1)])
    steps = [SequenceStep("b", 0, PROMPT[:32], 1, "red"), SequenceStep("f", 0, [0] * 80, 1)]
    first, second = engine.forward(steps)
    assert counted(engine, "evictions") == 1
    assert group.num_copies == 1
    assert first.logits is not None
    assert second.logits is not None
    assert torch.equal(first.logits[0], fingerprint(PROMPT[:32]))


def test_a_rollback_into_a_block_of_ones_own_takes_it_out_of_the_cache(engine: Engine, group: MemoryGroup) -> None:
    start(engine, "a", PROMPT)
    assert engine.forward([SequenceStep("a", 20, [1] * 12, 1)])[0].logits is not None
    start(engine, "b", PROMPT)
    assert group.num_computed_tokens == 40 + 12 + 24, "only the first block is as it was"
    start(engine, "c", [*PROMPT[:20], *[1] * 12, 0])
    assert group.num_computed_tokens == 40 + 12 + 24 + 1, "the rewritten block is found by what it holds now"


def test_cached_blocks_are_reused_before_a_sequence_is_evicted(engine: Engine) -> None:
    start(engine, "a", PROMPT)
    engine.free(["a"])
    start(engine, "d", PROMPT)
    start(engine, "f", [0] * 64)
    assert counted(engine, "evictions") == 0
    assert engine.forward([SequenceStep("d", 40, [1], 1)])[0].logits is not None
