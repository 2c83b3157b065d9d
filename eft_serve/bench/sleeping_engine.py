"""An engine that only sleeps, in its own process: the step contract with a given latency and width of logits."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from eft_serve.transport.server import StepServer
from eft_serve.types import Endpoint, ModelInfo, SequenceStep, StepOutput

MAX_MODEL_LEN = 100_000
START_TIMEOUT_S = 60.0


class SleepingEngine:
    """Holds every sequence, computes nothing."""

    def __init__(self, latency_s: float, vocab_size: int) -> None:
        self.latency_s = latency_s
        self.row = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(vocab_size))

    def forward(self, steps: Sequence[SequenceStep]) -> list[StepOutput]:
        if steps and self.latency_s:
            time.sleep(self.latency_s)
        return [self._answer(step) for step in steps]

    def _answer(self, step: SequenceStep) -> StepOutput:
        if step.max_computed is not None and step.max_computed < len(step.token_ids):
            return StepOutput(step.sequence_id, held=step.position + step.max_computed)
        return StepOutput(step.sequence_id, logits=self.row.expand(step.num_logits, -1))

    def free(self, sequence_ids: Iterable[str]) -> None:
        """Nothing is held."""

    def expire(self) -> None:
        """Nothing is held."""


def _run(connection: Connection, model: str, latency_s: float, vocab_size: int) -> None:
    torch.set_num_threads(1)
    server = StepServer(SleepingEngine(latency_s, vocab_size), host="127.0.0.1")
    server.start()
    info = ModelInfo(
        model=model,
        vocab_size=vocab_size,
        max_model_len=MAX_MODEL_LEN,
        kv_capacity_tokens=100 * MAX_MODEL_LEN,
        kv_block_size=16,
        dtype="float32",
        tensor_parallel=1,
        attention="none",
    )
    connection.send(Endpoint(replica_id=model, address=server.address, public_key=server.public_key, info=info))
    server.allow(connection.recv())
    connection.send(None)
    connection.recv()  # until the other side says stop, or is gone
    server.close()


def start(model: str, latency_s: float, vocab_size: int, client_public_key: bytes) -> tuple[BaseProcess, Endpoint]:
    """Start one; it ends with its parent."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, model, latency_s, vocab_size), daemon=True)
    process.start()
    theirs.close()  # so that its death is an end of file here
    if not ours.poll(START_TIMEOUT_S):
        raise TimeoutError(f"engine {model} has not started within {START_TIMEOUT_S:g} s")
    endpoint: Endpoint = ours.recv()
    ours.send(client_public_key)
    ours.recv()
    process._eft_connection = ours  # type: ignore[attr-defined]  # closing it would stop the engine
    return process, endpoint
