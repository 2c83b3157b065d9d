"""What the engine promises beside the logits: errors, eviction, leases, metrics, its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prometheus_client import generate_latest
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, Clock, build_config, save_model

from eft_serve.config import ModelConfig
from eft_serve.engine.block_pool import BLOCK_SIZE
from eft_serve.engine.engine import Engine
from eft_serve.errors import EngineError
from eft_serve.types import SequenceStep

Load = Callable[..., Engine]
PROMPT = list(range(20))


def test_info_says_what_was_loaded(load: Load) -> None:
    info = load("llama", kv_cache_tokens=50).info
    assert (info.model, info.vocab_size, info.dtype, info.attention) == (
        "llama",
        VOCAB_SIZE,
        "float32",
        "compact+paged",
    )
    assert (info.kv_capacity_tokens, info.kv_block_size, info.max_model_len) == (64, BLOCK_SIZE, 64)
    assert load("llama", max_model_len=33).info.max_model_len == 33


def test_bad_steps_are_answered_and_good_ones_beside_them_served(load: Load) -> None:
    engine = load("llama")
    steps = [
        SequenceStep("good", 0, PROMPT, 1),
        SequenceStep("vocabulary", 0, [VOCAB_SIZE], 1),
        SequenceStep("empty", 0, [], 0),
        SequenceStep("greedy", 0, [1], 2),
        SequenceStep("negative", -1, [1], 1),
        SequenceStep("long", 96, [1], 1),
        SequenceStep("unknown", 5, [1], 1),
    ]
    good, *errors, unknown = engine.forward(steps)
    assert good.logits is not None
    assert good.logits.shape == (1, VOCAB_SIZE)
    assert unknown.num_computed_tokens == 0
    fields = ["token_ids", "token_ids", "num_logits", "position", "max_model_len"]
    for output, field in zip(errors, fields, strict=True):
        assert output.logits is None
        assert output.error is not None
        assert field in output.error


def test_no_steps_give_no_outputs(load: Load) -> None:
    assert load("llama").forward([]) == []


def test_prefilling_returns_no_rows(load: Load) -> None:
    (output,) = load("llama").forward([SequenceStep("prefill", 0, PROMPT, 0)])
    assert output.logits is not None
    assert output.logits.shape == (0, VOCAB_SIZE)


def test_callers_may_change_their_logits_in_place(load: Load) -> None:
    engine = load("llama")
    first = engine.forward([SequenceStep("place", 0, PROMPT, 1)])[0].logits
    assert first is not None
    kept = first.clone()
    with torch.inference_mode():
        first -= 1
    again = engine.forward([SequenceStep("place", 0, PROMPT, 1)])[0].logits
    assert again is not None
    torch.testing.assert_close(again, kept)


def test_free_is_idempotent_and_forgets(load: Load) -> None:
    engine = load("llama")
    engine.forward([SequenceStep("gone", 0, PROMPT, 0)])
    engine.free(["gone", "gone", "never"])
    assert engine.forward([SequenceStep("gone", 20, [1], 1)])[0].num_computed_tokens == 0


def test_a_lease_runs_out_unless_stepped(load: Load, clock: Clock) -> None:
    engine = load("qwen2", clock, lease_s=10.0)
    engine.forward([SequenceStep("kept", 0, PROMPT, 0), SequenceStep("left", 0, PROMPT, 0)])
    clock.now += 6
    engine.forward([SequenceStep("kept", 20, [1], 1)])
    clock.now += 6
    engine.expire()
    kept, left = engine.forward([SequenceStep("kept", 21, [1], 1), SequenceStep("left", 20, [1], 1)])
    assert kept.logits is not None
    assert left.num_computed_tokens == 0


def test_eviction_shows_as_fewer_computed_tokens_and_is_counted(load: Load) -> None:
    engine = load("mistral", kv_cache_tokens=48)
    engine.forward([SequenceStep("first", 0, PROMPT, 0)])
    engine.forward([SequenceStep("second", 0, PROMPT, 0)])
    assert engine.forward([SequenceStep("first", 20, [1], 1)])[0].num_computed_tokens == 0
    assert engine.registry.get_sample_value("eft_engine_evictions_total", {"model": "mistral"}) == 1
    assert engine.registry.get_sample_value("eft_engine_cache_misses_total", {"model": "mistral"}) == 1


def test_metrics_are_named_and_labelled(load: Load) -> None:
    engine = load("olmo2", kv_cache_tokens=160)
    engine.forward([SequenceStep("a", 0, PROMPT, 1), SequenceStep("b", 0, PROMPT, 1)])
    value = {
        name: engine.registry.get_sample_value(f"eft_engine_{name}", {"model": "olmo2"})
        for name in (
            "forward_seconds_count",
            "tokens_computed_total",
            "num_sequences",
            "kv_used_tokens",
            "kv_capacity_tokens",
        )
    }
    assert list(value.values()) == [1, 40, 2, 64, 160]
    assert b"eft_engine_forward_seconds_bucket" in generate_latest(engine.registry)


def test_a_failed_forward_loses_nothing_and_leaks_no_block(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load("qwen3", kv_cache_tokens=64)
    engine.forward([SequenceStep("a", 0, PROMPT, 0)])
    with monkeypatch.context() as patch:
        patch.setattr(engine._group.runner, "forward", lambda batch: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(EngineError, match="qwen3: forward failed: no memory"):
            engine.forward([SequenceStep("a", 20, PROMPT, 1), SequenceStep("b", 0, PROMPT, 1)])
    assert engine._cache.used_tokens == 32
    assert engine.forward([SequenceStep("a", 20, PROMPT, 1)])[0].logits is not None


def test_infinities_are_an_error_and_reach_no_other_sequence(tmp_path: Path) -> None:
    weights = save_model(build_config("llama"), tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    broken = 48  # none of the tokens by which the engine checks itself
    tensors["model.embed_tokens.weight"][broken] = torch.inf
    save_file(tensors, weights, metadata={"format": "pt"})
    engine = Engine.load("broken", ModelConfig(path=str(tmp_path), kv_cache_tokens=64))
    non_finite, well = engine.forward(
        [SequenceStep("non_finite", 0, [1, broken], 1), SequenceStep("well", 0, [1, 2, 3], 3)]
    )
    assert non_finite.error is not None
    assert "infinities or NaN" in non_finite.error
    assert well.logits is not None
    engine.free(["non_finite", "well"])
    non_finite, well = engine.forward(
        [SequenceStep("well", 0, [1, 2, 3], 3), SequenceStep("non_finite", 0, [broken], 1)]
    )[::-1]
    assert non_finite.error is not None
    assert well.logits is not None
    engine.close()


def test_blocks_with_infinities_are_not_found_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load("opt", kv_cache_tokens=160)
    forward = engine._group.forward
    with monkeypatch.context() as patch:  # a fault that passes, as of a memory cell
        patch.setattr(engine._group, "forward", lambda batch: forward(batch) * torch.nan)
        assert engine.forward([SequenceStep("non_finite", 0, PROMPT, 1, "salt")])[0].error is not None
    engine.forward([SequenceStep("again", 0, PROMPT, 1, "salt"), SequenceStep("non_finite", 20, PROMPT, 1)])
    assert engine.registry.get_sample_value("eft_engine_prefix_hit_tokens_total", {"model": "opt"}) == 0
    assert engine.forward([SequenceStep("healed", 0, PROMPT * 2, 1, "salt")])[0].logits is not None
    assert engine.registry.get_sample_value("eft_engine_prefix_hit_tokens_total", {"model": "opt"}) == 16


def test_closing_twice_is_fine_and_a_closed_engine_says_so(checkpoints: Callable[[str], Path]) -> None:
    engine = Engine.load("llama", ModelConfig(path=str(checkpoints("llama"))))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.forward([SequenceStep("a", 0, [1], 1)])


def test_starting_is_bounded(checkpoints: Callable[[str], Path]) -> None:
    config = ModelConfig(path=str(checkpoints("llama")), startup_timeout_s=0.001)
    with pytest.raises(EngineError, match="startup_timeout_s"):
        Engine.load("bounded", config)
    for thread in threading.enumerate():
        if thread.name == "load-bounded":
            thread.join()  # the stock models of other tests may not be loaded beside it
