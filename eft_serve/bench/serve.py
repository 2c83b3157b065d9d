"""`eft-serve bench serve`: the served embedded family under load, beside what one would write without it.

Both sides get the same requests at the same times, one side after the other, since they share the cores.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eft_serve.bench import report, scenarios
from eft_serve.bench.client import Client
from eft_serve.bench.load import burst, poisson_load
from eft_serve.bench.peer_process import naive_peer
from eft_serve.bench.timeline import Timeline, summarize
from eft_serve.config import AppConfig
from eft_serve.config_check import load_any
from eft_serve.rayserve.local import local_app
from eft_serve.tenancy.store import create_tenant

CONFIG = Path(__file__).parent.parent.parent / "deployments" / "zoo.yaml"
RECIPE = "eft"
READY_TIMEOUT_S = 300.0
HEADROOM = 1.5  # requests that run together begin together: what joins later waits for less
CALIBRATION_SEEDS, FIRST_SEED = (1, 2), 1000

Runs = list[list[Timeline]]  # by round


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How the sides are loaded, and what counts as good."""

    num_requests: int
    concurrency: int
    requests_per_s: float | None  # None: as many as keep the places full
    rounds: int
    ttft_target_s: float
    itl_target_s: float


@dataclass(slots=True)
class Measured:
    """What the rounds gave."""

    runs: dict[str, Runs]  # by side
    client_cpu_shares: list[float] = field(default_factory=list)
    peer_threads: list[int] = field(default_factory=list)


def run(plan: LoadPlan, *, with_peer: bool, long_prompt: bool, repeated_prefix: bool) -> None:
    """Serve, measure what is wanted, print; the last line is JSON.

    Raises:
        SystemExit: a request failed; everything was printed.
    """
    result: dict[str, Any] = {}
    with ExitStack() as stack:
        config, key = _with_a_tenant(Path(stack.enter_context(TemporaryDirectory())))
        app = stack.enter_context(local_app(config, timeout_s=READY_TIMEOUT_S))
        client = Client(app.url, RECIPE, key)
        rate = saturating_rate(client, plan.concurrency)  # warms up, too
        if plan.num_requests:
            result |= _under_load(plan, plan.requests_per_s or rate, client, with_peer)
        if long_prompt:
            result |= asyncio.run(scenarios.long_prompt(client))
        if repeated_prefix:
            result |= asyncio.run(scenarios.repeated_prefix(client))
    report.finish(result)
    if failures := sum(result[side]["failures"] for side in ("ours", "peer") if side in result):
        raise SystemExit(f"{failures} requests failed; the first: {result['first_failure']}")


def _with_a_tenant(directory: Path) -> tuple[AppConfig, str]:
    """The embedded family for one tenant, and its key: as one would serve others, and as HAProxy wants it."""
    tenants_file = directory / "tenants.yaml"
    key = create_tenant(tenants_file, "bench")
    config = load_any(CONFIG)
    server = config.server.model_copy(update={"tenants_file": tenants_file})
    return config.model_copy(update={"server": server}), key


def _under_load(plan: LoadPlan, rate: float, client: Client, with_peer: bool) -> dict[str, Any]:
    measured = _take_turns(plan, rate, client, with_peer)
    figures = {
        side: [summarize(timelines, plan.ttft_target_s, plan.itl_target_s) for timelines in rounds]
        for side, rounds in measured.runs.items()
    }
    result: dict[str, Any] = {side: _medians(each) for side, each in figures.items()}
    _show(plan, rate, result)
    ours = _all(measured.runs["ours"])
    result |= {
        "requests_per_s": round(rate, 3),
        "client_cpu_share": round(statistics.median(measured.client_cpu_shares), 3),  # of one core
        "first_failure": next((t.failure for t in ours if t.failure is not None), None),
    }
    if not with_peer:
        return result
    speeds = [[each["tokens_per_s"] for each in figures[side]] for side in ("ours", "peer")]
    ratios = [round(a / b, 3) for a, b in zip(*speeds, strict=True)]
    pairs = list(zip(ours, _all(measured.runs["peer"]), strict=True))
    return result | {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_by_round": ratios,
        "same_answers": round(sum(a.token_ids == b.token_ids for a, b in pairs) / len(pairs), 3),
        "peer_threads_by_round": measured.peer_threads,
    }


def _take_turns(plan: LoadPlan, rate: float, client: Client, with_peer: bool) -> Measured:
    """The peer, then the server, in every round; the side that is not measured idles."""
    measured = Measured({"ours": [], "peer": []} if with_peer else {"ours": []})
    with ExitStack() as stack:
        peer = stack.enter_context(naive_peer()) if with_peer else None
        for number in range(plan.rounds):
            # Every round has prompts of its own: a server may remember those that it has seen.
            load = poisson_load(plan.num_requests, rate, FIRST_SEED + number)
            if peer is not None:
                measured.peer_threads.append(peer.choose_threads(plan.concurrency))
                measured.runs["peer"].append(peer.replay(load, plan.concurrency))
            wall, cpu = time.perf_counter(), time.process_time()
            measured.runs["ours"].append(asyncio.run(client.replay(load, plan.concurrency)))
            measured.client_cpu_shares.append((time.process_time() - cpu) / (time.perf_counter() - wall))
    return measured


def saturating_rate(client: Client, concurrency: int) -> float:
    """Requests a second that keep so many in flight: by Little's law from as many that run together, and then some.

    The quickest of several trials counts: at less than saturation the two sides would differ in latency only.

    Raises:
        RuntimeError: a request failed.
    """
    trials = [asyncio.run(client.replay(burst(concurrency, seed), concurrency)) for seed in CALIBRATION_SEEDS]
    return (
        HEADROOM
        * concurrency
        / min(statistics.mean(timeline.succeeded().e2e_s for timeline in trial) for trial in trials)
    )


def _all(runs: Runs) -> list[Timeline]:
    return [timeline for timelines in runs for timeline in timelines]


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every figure over the rounds; failures add up."""
    medians = {name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}
    return medians | {"failures": sum(each["failures"] for each in rounds)}


def _show(plan: LoadPlan, rate: float, sides: Mapping[str, Mapping[str, float]]) -> None:
    title = (
        f"{plan.num_requests} requests at {rate:.1f}/s, {plan.concurrency} in flight at most, {plan.rounds} rounds; "
        f"good: TTFT ≤ {plan.ttft_target_s * 1e3:g} ms, mean ITL ≤ {plan.itl_target_s * 1e3:g} ms"
    )
    report.show(title, ["", *sides], [[name, *(side[name] for side in sides.values())] for name in sides["ours"]])
