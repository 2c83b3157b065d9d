"""The coordinator that benchmarks drive step by step, over engines in real processes."""

from __future__ import annotations

from contextlib import closing

from eft_serve.bench.fanout import ROLES, SleepingModels


def test_a_stack_is_ready_for_its_first_step_and_steps_take_their_slowest_model() -> None:
    with closing(SleepingModels([0.02, 0.0, 0.0], vocab_size=16)) as stack:
        assert stack.loop.missing_models == []
        assert all(0.02 <= seconds < 1.0 for seconds in stack.measure(batch=2, num_steps=3))
        assert {len(tokens) for tokens in stack.tokens.values()} == {3 + 5}
    assert len(stack.processes) == len(ROLES)
    assert not any(process.is_alive() for process in stack.processes)
