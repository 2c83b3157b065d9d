"""What a step of the decode loop takes along, and what it is spared."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
from fake_models import VOCAB_SIZE, ToyBackend, endpoint
from loop_harness import (
    EFT,
    Harness,
    Paced,
    naive,
    prompts_for,
    request,
    three_models,
)

from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.request import Request

METRICS_PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_requests_join_while_others_run_and_a_long_prompt_does_not_stop_them() -> None:
    rng = random.Random(7)
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(max_num_batched_tokens=8))
    short = request("short", {model: [1, 2] for model in EFT}, max_tokens=10, ignore_eos=True)
    harness.submit(short)
    harness.loop.receive()
    harness.loop.step()
    harness.submit(request("long", {model: [rng.randrange(60) for _ in range(60)] for model in EFT}, max_tokens=2))
    for _ in range(8):
        harness.loop.receive()
        before = len(short.output_token_ids)
        harness.loop.step()
        assert len(short.output_token_ids) == before + 1
    assert "long" not in harness.deltas
    harness.drive()
    assert len(harness.tokens("long")) == 2
    assert harness.backend.max_computed <= 8


def test_text_is_detokenized_while_the_next_step_is_computed_and_a_first_token_at_once() -> None:
    emitted_at_fan_out: list[int] = []

    def note(backend: ToyBackend) -> None:
        emitted_at_fan_out.append(len(harness.deltas.get("r", ())))

    harness = Harness(ToyBackend(three_models()))
    req = request("r", {model: [1, 2] for model in EFT}, max_tokens=10, ignore_eos=True)
    harness.submit(req)
    harness.loop.receive()
    harness.backend.disturb = note  # after what is done meanwhile
    for step in range(1, 5):
        harness.loop.step()
        assert len(req.output_token_ids) == step
        assert len(harness.tokens("r")) == max(1, step - 1)
    assert emitted_at_fan_out == [0, 1, 2, 3]
    harness.drive()
    assert harness.tokens("r") == naive(req)


LONG = {model: [i * step % 59 for i in range(60)] for step, model in enumerate(EFT, 1)}


def run_counted(harness: Harness, req: Request) -> tuple[int, int]:
    """Steps until its end, and the tokens that they computed."""
    steps, computed = len(harness.backend.batches), harness.backend.num_computed_tokens
    harness.submit(req)
    harness.drive()
    assert harness.tokens(req.request_id) == naive(req)
    return len(harness.backend.batches) - steps, harness.backend.num_computed_tokens - computed


def test_a_prefill_takes_small_chunks_beside_decodes_and_large_ones_alone() -> None:
    harness = Harness(ToyBackend({"t": endpoint("tuned", "t")}))
    harness.loop.scheduler.pacer = Paced(slowdown=2.0, most=1024)
    prompt = {"tuned": [i % VOCAB_SIZE for i in range(200)]}
    harness.submit(request("alone", prompt, {"tuned": 1.0}, max_tokens=1))
    harness.drive()
    alone = [len(step.token_ids) for batch in harness.backend.batches for b in batch.values() for step in b.steps]
    assert max(alone) == 200
    harness.submit(request("decoding", {"tuned": [1]}, {"tuned": 1.0}, max_tokens=100, ignore_eos=True))
    harness.loop.receive()
    harness.loop.step()
    harness.backend.batches.clear()
    harness.backend.max_computed = 0
    harness.submit(request("late", {"tuned": [9, *prompt["tuned"]]}, {"tuned": 1.0}, max_tokens=1))
    harness.drive()
    assert harness.backend.max_computed == Paced.CHUNK + 1, "the chunk, and the token of the one that decodes"


def test_a_long_prompt_that_is_cached_takes_two_steps() -> None:
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(max_num_batched_tokens=8))
    first = run_counted(harness, request("first", LONG, max_tokens=1))
    assert first == (8 + 1, 3 * 60), "the first goes in chunks; the last step tells the engines of its end"
    again = run_counted(harness, request("again", LONG, max_tokens=1))
    assert again == (2 + 1, 3 * (3 + 1)), "14 of 15 blocks of 4 tokens are found"
    other = run_counted(harness, request("other", LONG, max_tokens=1, tenant="other"))
    assert other == first, "another tenant finds nothing"


def test_a_prompt_within_the_budget_takes_one_step_cached_or_not() -> None:
    harness = Harness(ToyBackend(three_models()))
    assert run_counted(harness, request("first", LONG, max_tokens=1)) == (1 + 1, 3 * 60)
    assert run_counted(harness, request("again", LONG, max_tokens=1)) == (1 + 1, 3 * 4)


def test_an_evicted_sequence_finds_its_blocks_again_with_what_it_generated() -> None:
    harness = Harness(ToyBackend(three_models()))
    req = request("r", LONG, max_tokens=20, ignore_eos=True)
    harness.submit(req)
    for _ in range(13):
        harness.loop.receive()
        harness.loop.step()
    computed = harness.backend.num_computed_tokens
    assert len(req.output_token_ids) == 13
    del harness.backend.sequences["tuned-0"]["r/tuned"]
    harness.drive()
    assert harness.tokens("r") == naive(req)
    # Seven tokens are left. One round is lost: two models compute their token again, the third its last block of four.
    assert harness.backend.num_computed_tokens - computed <= 3 * 7 + 2 + 3


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_an_engine_that_holds_less_is_sent_the_rest_at_once(kept: int) -> None:
    harness = Harness(ToyBackend(three_models()))
    req = request("r", prompts_for(random.Random(2)), max_tokens=12, ignore_eos=True)
    harness.submit(req)
    for _ in range(6):
        harness.loop.receive()
        harness.loop.step()
    sequences = harness.backend.sequences["tuned-0"]
    sequences["r/tuned"] = sequences["r/tuned"][:kept]
    harness.drive(max_steps=12)
    assert harness.tokens("r") == naive(req)


def test_every_phase_of_a_step_is_documented() -> None:
    harness = Harness(ToyBackend(three_models()))
    harness.submit(request("r", {model: [1, 2] for model in EFT}, components=1))
    harness.drive()
    samples = [s for family in harness.metrics.registry.collect() for s in family.samples]
    phases = {s.labels["phase"] for s in samples if s.name == "eft_step_seconds_count"}
    (row,) = [line for line in METRICS_PAGE.read_text().splitlines() if line.startswith("| `eft_step_seconds{phase}`")]
    assert phases == set(re.findall(r"`(\w+)`", row.partition("|")[2].partition("|")[2]))


def test_waiting_for_a_turn_is_not_waiting_for_a_model() -> None:
    """Twelve long prompts through a small budget take far longer than a request's time to recover; so may one step."""
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(max_num_batched_tokens=10, recovery_timeout_s=0.05))
    harness.backend.disturb = lambda backend: time.sleep(0.1 if len(backend.batches) == 20 else 0.002)
    requests = [request(f"r{i}", {m: [i] * 60 for m in EFT}, max_tokens=2) for i in range(12)]
    for req in requests:
        harness.submit(req)
    started = time.monotonic()
    harness.drive()
    assert time.monotonic() - started > 0.1
    assert [harness.tokens(r.request_id) for r in requests] == [naive(r) for r in requests]


def test_a_long_step_is_not_counted_against_who_came_during_it() -> None:
    """Nor is it when an engine then has no room for it at first, so that it makes no progress by itself."""
    harness = Harness(ToyBackend(three_models()), CoordinatorConfig(recovery_timeout_s=0.3))
    harness.submit(request("first", prompts_for(random.Random(1)), max_tokens=2, ignore_eos=True))
    harness.loop.receive()
    harness.loop.step()

    def long_step(backend: ToyBackend) -> None:
        backend.disturb = lambda backend: None
        time.sleep(0.4)
        late = request("late", prompts_for(random.Random(2)), ignore_eos=True)
        harness.submit(late)
        backend.full = {"tuned-0"}

    harness.backend.disturb = long_step
    for _ in range(4):
        harness.loop.step()
        harness.loop.receive()
    harness.backend.full = set()
    harness.drive()
    assert harness.last("late").failure is None
    assert len(harness.tokens("late")) == 12
