"""The turns that sides take, the growth of a series, and the model that they compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eft_serve.bench import engine as bench_engine
from eft_serve.bench.context import growth_exponent
from eft_serve.bench.engine_sides import load_stock


class Recording:
    """A side that only notes what it is given."""

    def __init__(self, name: str, calls: list[tuple[str, torch.Tensor]]) -> None:
        self.name, self.calls = name, calls
        self.num_ended = 0

    def forward(self, token_ids: torch.Tensor) -> None:
        self.calls.append((self.name, token_ids))

    def end(self) -> None:
        self.num_ended += 1


def test_sides_get_the_same_tokens_in_turn_and_another_begins_each_time() -> None:
    calls: list[tuple[str, torch.Tensor]] = []
    sides = {name: Recording(name, calls) for name in ("a", "b", "c")}
    seconds = bench_engine.decode(sides, batch=2, num_steps=4)
    assert {name: len(each) for name, each in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    prompts, steps = calls[:3], calls[3:]
    assert {tuple(token_ids.shape) for _, token_ids in prompts} == {(2, bench_engine.CONTEXT)}
    turns = [steps[n : n + 3] for n in range(0, len(steps), 3)]
    assert ["".join(name for name, _ in turn) for turn in turns[:4]] == ["abc", "bca", "cab", "abc"]
    for turn in turns:
        assert all(torch.equal(token_ids, turn[0][1]) for _, token_ids in turn)
    assert [side.num_ended for side in sides.values()] == [1, 1, 1]


def test_ratios_are_of_pairs_that_were_measured_together() -> None:
    assert bench_engine.median_ratio({"a": [1.0, 9.0, 4.0], "b": [1.0, 1.0, 2.0]}, "a", "b") == 2.0


def test_the_random_model_has_12_5_million_parameters(tmp_path: Path) -> None:
    bench_engine.write_random_llama(tmp_path)
    assert load_stock(tmp_path).num_parameters() == pytest.approx(12.5e6, rel=0.01)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_growth_is_the_exponent_of_the_upper_half(exponent: float) -> None:
    series = dict.fromkeys((1, 2, 4), 5.0) | {x: 5.0 * x**exponent for x in (8, 16, 32)}
    assert growth_exponent(series) == pytest.approx(exponent, abs=1e-6)
