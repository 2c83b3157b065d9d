"""A coordinator over engines in processes of their own, driven step by step in the caller's thread: no Ray, no HTTP."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from eft_serve.bench.engine_process import Build, start
from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.decode_loop import DecodeLoop
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.coordinator.request import Request
from eft_serve.transport.client import FanOut
from eft_serve.types import Delta

MAX_STEPS = 100_000
READY_TIMEOUT_S = 60.0


class LocalStack:
    """Engines, started by `builds` (by model: what builds it, and from what), and a real decode loop over them."""

    def __init__(
        self,
        builds: Mapping[str, tuple[Build, tuple[Any, ...]]],
        vocabularies: Mapping[str, Any],
        config: CoordinatorConfig | None = None,
    ) -> None:
        self.backend = FanOut()
        self.tokens: dict[str, list[int]] = {}  # by request
        started = [start(build, arguments, self.backend.public_key) for build, arguments in builds.values()]
        self.processes = [process for process, _ in started]
        config = config or CoordinatorConfig()
        self.loop = DecodeLoop(config, self.backend, vocabularies, self._take, CoordinatorMetrics())
        self.loop.set_replicas({endpoint.replica_id: endpoint for _, endpoint in started})
        self.loop.receive()
        try:
            self._wait_until_healthy()
        except BaseException:
            self.close()
            raise

    def run(self, requests: Sequence[Request]) -> float:
        """Seconds until all of them are done."""
        for request in requests:
            self.tokens[request.request_id] = []
            self.loop.submit(request)
        started = time.perf_counter()
        for _ in range(MAX_STEPS):
            self.loop.receive()
            self.loop.step()
            if not self.loop.num_requests:
                break
        seconds = time.perf_counter() - started
        self.loop.step()  # tells the engines that all of it is over
        return seconds

    def step(self) -> float:
        """Seconds of one decode step; raises RuntimeError when there was nothing to compute."""
        started = time.perf_counter()
        if not self.loop.step():
            raise RuntimeError("a step had nothing to compute")
        return time.perf_counter() - started

    def _wait_until_healthy(self) -> None:
        """Raises RuntimeError that names the models of which no engine has answered a step in time."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while missing := self.loop.missing_models:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer within {READY_TIMEOUT_S:g} s of {', '.join(missing)}")
            self.loop.step()
            time.sleep(0.005)

    def close(self) -> None:
        self.backend.close()
        for process in self.processes:
            process.terminate()
            process.join()

    def _take(self, deltas: Sequence[tuple[Request, Delta]]) -> None:
        """A request that fails would make steps look cheap."""
        for request, delta in deltas:
            if delta.failure is not None:
                raise RuntimeError(f"request {request.request_id}: {delta.failure.message}")
            self.tokens[request.request_id] += delta.token_ids
