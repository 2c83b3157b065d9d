"""The processes that share one model: this one is rank 0, the others follow it; knows no sequences and no budget.

Workers are plain subprocesses that run the same runner on the same plain-data commands, so that their caches stay
identical. They die with this process, however it ends: each watches a pipe that only we hold.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eft_serve.config import ModelConfig
from eft_serve.engine.batch import ForwardBatch
from eft_serve.errors import CheckpointError, EftServeError, EngineError, from_failure
from eft_serve.types import Failure

if TYPE_CHECKING:
    from torch import Tensor

    from eft_serve.engine.model_runner import ModelRunner, Probes

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 1.0  # a worker holds nothing that has to be saved
REPORT_TIMEOUT_S = 2.0  # for a failed worker to say why
WORKER_MODULE = "eft_serve.engine.worker"
UNANSWERED = "forward"  # logits are the leader's own; nothing to send back


class Worker:
    """Another rank, as the leader sees it."""

    def __init__(self, rank: int, directory: Path) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        watched, self._lifeline = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER_MODULE, str(theirs.fileno()), str(watched), str(directory)],
            pass_fds=(theirs.fileno(), watched),
            env=_worker_environment(),
        )
        theirs.close()
        os.close(watched)
        self._connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: tuple[Any, ...]) -> None:
        """First (config, rank), then (method of the runner, its arguments)."""
        try:
            self._connection.send(message)
        except OSError as error:
            raise EngineError(f"tensor-parallel rank {self.rank} is gone: {self.report() or error}") from error

    def receive(self, timeout_s: float) -> Any:
        """The answer to the oldest unanswered command.

        Raises:
            EftServeError: what the worker raised, or that it died or did not answer in time.
        """
        try:
            if not self._connection.poll(timeout_s):
                raise EngineError(f"tensor-parallel rank {self.rank} did not answer within {timeout_s:.0f} s")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.poll()
            raise EngineError(f"tensor-parallel rank {self.rank} died (exit status {code})") from error
        if isinstance(answer, Failure):
            raise from_failure(answer)
        return answer

    def report(self) -> str | None:
        """Why it failed, if it did and reports that soon."""
        try:
            if self._connection.poll(REPORT_TIMEOUT_S):
                self.receive(0)
        except (EftServeError, OSError) as error:
            return str(error)
        return None

    def stop(self) -> None:
        """End the process, by force when it does not end by itself."""
        self._connection.close()
        os.close(self._lifeline)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self._process.kill()
        self._process.wait()


def _worker_environment() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # so that workers can import what this process can
        **loopback_only(),
    }


def loopback_only() -> dict[str, str]:
    """Environment that keeps the ranks' own sockets on the loopback interface."""
    return {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class WorkerGroup:
    """All ranks of one model. `start`, then `call` and `forward` as often as wanted, then `close`."""

    runner: ModelRunner

    def __init__(self, config: ModelConfig, adapters: Mapping[str, Path]) -> None:
        self._config = config
        self._adapters = adapters
        self._deadline = time.monotonic() + config.startup_timeout_s
        self._directory: Path | None = None
        self._closed = False
        self.workers: list[Worker] = []

    def start(self) -> Probes:
        """Load the model on every rank and split it; the probe logits of the unsplit model, plain and adapted."""
        store = None
        if self._config.tensor_parallel > 1:
            if self._adapters:
                raise EngineError(
                    f"tensor_parallel: adapters ({', '.join(self._adapters)}) are not split; set tensor_parallel: 1"
                )
            if torch.distributed.is_initialized():
                raise EngineError("tensor_parallel: a process holds one tensor-parallel model; start another process")
            os.environ.update(loopback_only())
            self._directory = Path(tempfile.mkdtemp(prefix="eft-serve-group-"))
            store = self._directory / "store"
            for rank in range(1, self._config.tensor_parallel):
                self.workers.append(Worker(rank, self._directory))
                self.workers[-1].send((self._config, rank))
        from eft_serve.engine.model_runner import ModelRunner  # seconds of imports, beside the workers' own

        self.runner = ModelRunner(self._config, rank=0, adapters=self._adapters)
        references: Probes = self.call("load")[0]
        self.call("split", store)
        return references

    def call(self, method: str, *args: Any) -> list[Any]:
        """Run a runner's method on every rank; the answers, ours first.

        Raises:
            EftServeError: a rank failed; the message is that of the worker where one caused it.
        """
        if self._closed:  # by a caller that no longer waits for the start
            raise EngineError("the ranks were stopped")
        for worker in self.workers:
            worker.send((method, args))
        try:
            answer = getattr(self.runner, method)(*args)
        except CheckpointError:
            raise
        except Exception as error:
            reports = [f"rank {f.rank}: {report}" for f in self.workers if (report := f.report())]
            raise EngineError("; ".join([f"{method} failed: {error}", *reports])) from error
        if method == UNANSWERED:
            return [answer]
        return [answer, *(f.receive(max(0.0, self._deadline - time.monotonic())) for f in self.workers)]

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [batch.num_logits, vocab_size] on the CPU."""
        logits: Tensor = self.call(UNANSWERED, batch)[0]
        return logits

    def close(self) -> None:
        """Stop the workers and remove what the group left on disk."""
        self._closed = True
        if hasattr(self, "runner"):
            self.runner.close()
        for worker in self.workers:
            worker.stop()
        self.workers = []
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
