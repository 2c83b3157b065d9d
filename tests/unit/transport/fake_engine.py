"""Handlers that stand for an engine, and a process that serves one."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection

import msgspec
import torch

from eft_serve.transport.server import StepServer
from eft_serve.types import Endpoint, ModelInfo, SequenceStep, StepOutput

INFO = ModelInfo(
    model="fake",
    vocab_size=8,
    max_model_len=64,
    kv_capacity_tokens=64,
    kv_block_size=1,
    dtype="float32",
    tensor_parallel=1,
    attention="none",
)


class FakeEngine:
    """Row i of a step's logits holds the sum of its tokens up to there; sequences by name answer oddly."""

    def __init__(self, dtype: torch.dtype = torch.float32, vocab_size: int = 8) -> None:
        self.dtype, self.vocab_size = dtype, vocab_size
        self.forwards: list[list[str]] = []
        self.freed: list[str] = []
        self.num_expiries = 0
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, steps: Sequence[SequenceStep]) -> list[StepOutput]:
        self.forwards.append([step.sequence_id for step in steps])
        self.gate.wait(30)
        if any(step.sequence_id == "raise" for step in steps):
            raise RuntimeError("out of memory")
        return [self._answer(step) for step in steps if step.sequence_id != "forgotten"]

    def free(self, sequence_ids: Iterable[str]) -> None:
        self.freed.extend(sequence_ids)

    def expire(self) -> None:
        self.num_expiries += 1

    def _answer(self, step: SequenceStep) -> StepOutput:
        if step.sequence_id == "sleep":
            time.sleep(60)
        if step.sequence_id == "evicted":
            return StepOutput(step.sequence_id, num_computed_tokens=3)
        if step.sequence_id == "bad":
            return StepOutput(step.sequence_id, error="token 99 is out of vocabulary")
        sums = torch.tensor(step.token_ids, dtype=torch.float32).cumsum(0)[len(step.token_ids) - step.num_logits :]
        return StepOutput(step.sequence_id, logits=sums[:, None].expand(-1, self.vocab_size).to(self.dtype))


def endpoint_of(server: StepServer, replica_id: str, vocab_size: int = INFO.vocab_size) -> Endpoint:
    info = msgspec.structs.replace(INFO, vocab_size=vocab_size)
    return Endpoint(replica_id=replica_id, address=server.address, public_key=server.public_key, info=info)


def serve_in_process(client_public_key: bytes, replica_id: str) -> tuple[multiprocessing.Process, Endpoint]:
    """A started process and where it listens; the caller ends it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, client_public_key), daemon=True)
    process.start()
    assert ours.poll(60), "the engine process did not come up"
    address, public_key = ours.recv()
    ours.close()
    return process, Endpoint(replica_id=replica_id, address=address, public_key=public_key, info=INFO)  # type: ignore[return-value]


def _serve(pipe: Connection, client_public_key: bytes) -> None:
    server = StepServer(FakeEngine())
    server.allow(client_public_key)
    pipe.send((server.address, server.public_key))
    server.run()
