"""Two real ranks over gloo: the same logits as one, and nothing left behind however a rank ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tiny_models import VOCAB_SIZE, greedy, stock_logits
from transformers import PreTrainedModel

from eft_serve.config import ModelConfig
from eft_serve.engine.engine import Engine
from eft_serve.errors import CheckpointError, EngineError
from eft_serve.types import SequenceStep

pytestmark = pytest.mark.slow

Checkpoints = Callable[[str], Path]
PROMPT = [(11 * i + 5) % VOCAB_SIZE for i in range(30)]


def config_of(path: Path) -> ModelConfig:
    return ModelConfig(path=str(path), tensor_parallel=2, startup_timeout_s=120, kv_cache_tokens=96)


def leftovers() -> set[str]:
    """Group directories and DeepSpeed's shared memory."""
    return {str(path) for path in (*Path("/tmp").glob("eft-serve-group-*"), *Path("/dev/shm").glob("deepspeed*"))}


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pid: int, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.fixture
def clean_after() -> Iterator[None]:
    before = leftovers()
    yield
    assert leftovers() <= before


def assert_equals_one_rank(engine: Engine, model: PreTrainedModel) -> None:
    wanted = stock_logits(model, PROMPT)
    engine.forward([SequenceStep("a", 0, PROMPT[:20], 0), SequenceStep("b", 0, PROMPT[:9], 0)])
    a, b = engine.forward([SequenceStep("a", 17, PROMPT[17:23], 6), SequenceStep("b", 9, PROMPT[9:10], 1)])
    assert a.logits is not None
    assert b.logits is not None
    torch.testing.assert_close(a.logits, wanted[17:23], atol=1e-4, rtol=0)
    torch.testing.assert_close(b.logits, wanted[9:10], atol=1e-4, rtol=0)
    for name in ("first", "copies"):  # the second one's last block, on every rank
        (output,) = engine.forward([SequenceStep(name, 0, PROMPT[:16], 1, "known")])
        assert output.logits is not None
        torch.testing.assert_close(output.logits[0], wanted[15], atol=1e-4, rtol=0)
    ids = torch.tensor([PROMPT])
    generated = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    assert greedy(engine, "greedy", PROMPT, 12) == generated[0, len(PROMPT) :].tolist()


class TestLlama:
    """One group for several tests; the last one breaks it."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, checkpoints: Checkpoints) -> Iterator[Engine]:
        before = leftovers()
        engine = Engine.load("llama", config_of(checkpoints("llama")))
        yield engine
        worker = engine._group.workers[0].pid
        engine.close()
        assert not is_running(worker)
        assert leftovers() <= before

    def test_two_ranks_equal_one(self, engine: Engine, references: Callable[[str], PreTrainedModel]) -> None:
        assert (engine.info.tensor_parallel, engine.info.attention) == (2, "compact+paged")
        assert_equals_one_rank(engine, references("llama"))

    def test_a_second_group_is_refused_and_harms_not_the_first(self, engine: Engine, checkpoints: Checkpoints) -> None:
        with pytest.raises(EngineError, match="one tensor-parallel model"):
            Engine.load("mistral", config_of(checkpoints("mistral")))
        assert engine.forward([SequenceStep("a", 0, PROMPT, 1)])[0].logits is not None

    def test_nothing_listens_beyond_loopback(self, engine: Engine) -> None:
        ranks = (psutil.Process(), psutil.Process(engine._group.workers[0].pid))
        connections = [c for rank in ranks for c in rank.net_connections() if c.status == psutil.CONN_LISTEN]
        assert connections
        assert {connection.laddr[0] for connection in connections} == {"127.0.0.1"}

    def test_a_killed_worker_fails_the_engine_in_bounded_time(self, engine: Engine) -> None:
        os.kill(engine._group.workers[0].pid, signal.SIGKILL)
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(EngineError, match="llama"):
                engine.forward([SequenceStep("a", 0, PROMPT, 1)])
        assert time.monotonic() - started < 10


def test_a_split_falcon_equals_a_whole_one(
    checkpoints: Checkpoints, references: Callable[[str], PreTrainedModel], clean_after: None
) -> None:
    engine = Engine.load("falcon", config_of(checkpoints("falcon-new")))
    try:
        assert engine.info.attention == "padded"
        assert_equals_one_rank(engine, references("falcon-new"))
    finally:
        engine.close()


def test_what_deepspeed_splits_wrongly_is_refused(checkpoints: Checkpoints, clean_after: None) -> None:
    with pytest.raises(CheckpointError, match=r"\(olmo2\) cannot be run by DeepSpeed .* set tensor_parallel: 1"):
        Engine.load("olmo2", config_of(checkpoints("olmo2")))


LEADER = """
import sys, time
from eft_serve.config import ModelConfig
from eft_serve.engine.engine import Engine
engine = Engine.load("llama", ModelConfig(path=sys.argv[1], tensor_parallel=2))
print(engine._group.workers[0].pid, flush=True)
time.sleep(600)
"""


def test_a_worker_dies_with_its_killed_leader(checkpoints: Checkpoints, clean_after: None) -> None:
    command = [sys.executable, "-c", LEADER, str(checkpoints("llama"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        worker = int(leader.stdout.readline())
        assert is_running(worker)
        leader.kill()
    assert wait_until_gone(worker)


def test_a_workers_failure_to_load_is_the_engines(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, clean_after: None
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="rank 1"):
        Engine.load("llama", config_of(checkpoints("llama")))
