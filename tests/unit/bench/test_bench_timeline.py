"""The arithmetic of latencies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft_serve.bench.timeline import Timeline, overlapping_itls_s, percentile_ms, summarize


def timeline(arrival_s: float, *arrivals: tuple[float, int]) -> Timeline:
    return Timeline(arrival_s, [(at, [7] * count) for at, count in arrivals])


def test_tokens_that_come_together_share_the_wait() -> None:
    one = timeline(1.0, (3.0, 2), (3.5, 1), (4.1, 3))
    assert one.ttft_s == 2.0
    assert one.e2e_s == pytest.approx(3.1)
    assert one.itls_s == pytest.approx([0.5, 0.2, 0.2, 0.2])


@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(1, 9)), min_size=1, max_size=20))
def test_itls_add_up_to_the_time_after_the_first_token(steps: list[tuple[float, int]]) -> None:
    at = 0.0
    arrivals = [(at := at + wait, count) for wait, count in steps]
    one = timeline(0.0, *arrivals)
    assert sum(one.itls_s) == pytest.approx(one.e2e_s - one.ttft_s, abs=1e-6)
    assert len(one.itls_s) == len(one.token_ids) - steps[0][1]


def test_targets_are_kept_by_the_first_token_and_by_the_mean_of_the_others() -> None:
    one = timeline(0.0, (1.0, 1), (1.01, 1), (1.1, 1))  # mean ITL 50 ms
    assert one.met(ttft_s=1.0, itl_s=0.0501)
    assert not one.met(ttft_s=1.0, itl_s=0.0499)
    assert not one.met(ttft_s=0.999, itl_s=1.0)
    assert timeline(0.0, (1.0, 1)).met(1.0, 0.0)
    assert not Timeline(0.0, one.tokens, "broke off").met(9.0, 9.0)


def test_a_window_has_the_waits_that_reach_into_it() -> None:
    one = timeline(0.0, (1.0, 1), (2.0, 2), (5.0, 1), (6.0, 1))
    assert overlapping_itls_s([one], 3.0, 4.0) == [3.0]  # the stall, though no token came in the window
    assert overlapping_itls_s([one], 2.0, 5.0) == [3.0]
    assert overlapping_itls_s([one, one], 1.5, 2.5) == [0.5, 0.5, 3.0, 0.5, 0.5, 3.0]


def test_percentiles_are_milliseconds_between_neighbours() -> None:
    assert percentile_ms([0.003, 0.001, 0.002], 50) == 2.0
    assert percentile_ms([0.0, 0.1], 99) == 99.0


def test_a_summary_counts_tokens_and_failures_from_the_first_arrival_to_the_last_token() -> None:
    runs = [
        timeline(1.0, (2.0, 1), (5.0, 3)),  # TTFT 1, ITL 1
        timeline(2.0, (2.5, 1), (6.0, 7)),  # TTFT .5, ITL .5
        Timeline(3.0, [(4.0, [7])], "broke off"),
    ]
    figures = summarize(runs, ttft_target_s=1.0, itl_target_s=0.9)
    assert figures["tokens_per_s"] == 12 / 5
    assert figures["num_requests_mean"] == 8 / 5
    assert figures["goodput_requests_per_s"] == 1 / 5
    assert figures["failures"] == 1
    assert figures["ttft_ms_p50"] == 750.0
    assert figures["itl_ms_p50"] == 500.0
    assert figures["e2e_ms_p50"] == 4000.0


def test_a_run_in_which_all_failed_has_no_figures() -> None:
    with pytest.raises(RuntimeError, match="no route"):
        Timeline(0.0, failure="no route").succeeded()
    with pytest.raises(ValueError, match="no route"):
        summarize([Timeline(0.0, failure="no route")], 1.0, 1.0)
