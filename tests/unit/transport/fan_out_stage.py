"""Engines behind real servers, and clients of them, for the tests of the fan-out."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

from fake_engine import FakeEngine, endpoint_of

from eft_serve.transport.client import FanOut
from eft_serve.transport.server import StepServer
from eft_serve.types import SequenceStep, StepBatch, StepResult

TIMEOUT_S = 20.0  # never reached unless a test fails


@dataclass
class Stage:
    """Engines and clients that end with the test."""

    stack: ExitStack
    engines: dict[str, FakeEngine] = field(default_factory=dict)
    servers: dict[str, StepServer] = field(default_factory=dict)

    def serve(self, replica_id: str, engine: FakeEngine | None = None, start: bool = True) -> FakeEngine:
        engine = self.engines[replica_id] = engine or FakeEngine()
        server = self.servers[replica_id] = StepServer(engine)
        self.stack.callback(server.close)
        self.stack.callback(engine.gate.set)
        if start:
            server.start()
        return engine

    def client(self, allowed: bool = True) -> FanOut:
        fan_out = FanOut()
        self.stack.callback(fan_out.close)
        for server in self.servers.values() if allowed else ():
            server.allow(fan_out.public_key)
        fan_out.set_replicas({name: endpoint_of(server, name) for name, server in self.servers.items()})
        return fan_out


def batch(*sequence_ids: str, freed: tuple[str, ...] = ()) -> StepBatch:
    return StepBatch([SequenceStep(sequence_id, 0, [1, 2, 3], 2) for sequence_id in sequence_ids], freed)


def assert_answered(result: StepResult, num_steps: int = 1) -> None:
    assert result.failure is None
    assert len(result.outputs) == num_steps
    for output in result.outputs:
        assert output.logits is not None
        assert output.logits.tolist() == [[3.0] * 8, [6.0] * 8]
