"""Answers from the real decode loop and the real engines, all in this process: no Ray, no sockets.

Every request of this package is built here.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.config import CoordinatorConfig, ModelConfig
from eft_serve.coordinator.decode_loop import DecodeLoop
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.coordinator.request import Request
from eft_serve.engine.engine import Engine
from eft_serve.errors import EftServeError
from eft_serve.types import Combination, Delta, Endpoint, GenerationRequest, SamplingParams, StepBatch, StepResult

ROWS = 128  # requests decoded together
KV_CACHE_TOKENS = ROWS * 512
TIMEOUT_S = 3600.0  # also of a request that waits: a busy machine may stop this process for minutes


@dataclass(frozen=True, slots=True)
class Job:
    """One message to one system."""

    system: Combination
    message: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class Answer:
    """An answer; the end token is the last id unless the answer was cut."""

    text: str = ""
    token_ids: tuple[int, ...] = ()


class InProcess:
    """A `LogitsBackend` of engines in this process, one replica each, by model name."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines
        self._finished: dict[str, StepResult] = {}

    def set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        """There is nothing to connect."""

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def fan_out(
        self, batches: Mapping[str, StepBatch], timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> Mapping[str, StepResult]:
        if meanwhile is not None:
            meanwhile()
        return {model: self._step(self._engines[model], batch) for model, batch in batches.items()}

    def begin(self, batches: Mapping[str, StepBatch], timeout_s: float) -> None:
        self._finished |= self.fan_out(batches, timeout_s)

    def finished(self) -> Mapping[str, StepResult]:
        finished, self._finished = self._finished, {}
        return finished

    def _step(self, engine: Engine, batch: StepBatch) -> StepResult:
        started = time.monotonic()
        try:
            engine.free(batch.freed)
            outputs = engine.forward(batch.steps)
        except EftServeError as error:
            return StepResult(failure=error.message)
        seconds = time.monotonic() - started
        return StepResult(outputs=outputs, seconds=seconds, forward_seconds=seconds)


class Product:
    """The served product without its network, over checkpoints of one directory."""

    def __init__(self, checkpoints: Path, models: Sequence[str]) -> None:
        paths = {model: checkpoints / model for model in models}
        self.vocabularies = {model: Vocabulary.load(path) for model, path in paths.items()}
        self._engines = {
            model: Engine.load(model, ModelConfig(path=str(path), kv_cache_tokens=KV_CACHE_TOKENS))
            for model, path in paths.items()
        }
        self._answers: dict[str, Answer] = {}
        self._num_open = 0
        config = CoordinatorConfig(
            max_num_seqs=ROWS, max_num_batched_tokens=4096, max_prefill_slowdown=1e3, recovery_timeout_s=TIMEOUT_S
        )
        metrics = CoordinatorMetrics()
        self._loop = DecodeLoop(config, InProcess(self._engines), self.vocabularies, self._collect, metrics)
        self._loop.set_replicas({model: endpoint_of(engine) for model, engine in self._engines.items()})
        self._loop.receive()

    def prompt(self, model: str, message: str) -> list[int]:
        """Token ids of a one-message conversation by the model's own chat template."""
        tokenizer = self.vocabularies[model].tokenizer
        turn = [{"role": "user", "content": message}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text)["input_ids"])

    def answer(self, jobs: Iterable[Job]) -> list[Answer]:
        """Answers in the order of the jobs.

        Raises:
            RuntimeError: a request failed.
        """
        self._answers = {}
        waiting = self._requests(jobs)
        while True:
            for request in itertools.islice(waiting, 2 * ROWS - self._num_open):
                self._num_open += 1
                self._loop.submit(request)
            if not self._num_open:
                self._loop.step()  # tells the engines what is over
                return list(self._answers.values())
            self._loop.receive()
            self._loop.step()

    def close(self) -> None:
        self._loop.backend.close()

    def _requests(self, jobs: Iterable[Job]) -> Iterator[Request]:
        for index, job in enumerate(jobs):
            self._answers[str(index)] = Answer()
            generation = GenerationRequest(
                request_id=str(index),
                combination=job.system,
                prompts={term.name: self.prompt(term.model, job.message) for term in job.system.terms},
                sampling=SamplingParams(temperature=job.temperature, seed=job.seed, max_tokens=job.max_tokens),
                timeout_s=TIMEOUT_S,
            )
            yield Request.create(generation, time.monotonic())

    def _collect(self, deltas: Sequence[tuple[Request, Delta]]) -> None:
        for request, delta in deltas:
            if delta.failure is not None:
                raise RuntimeError(f"request {request.request_id}: {delta.failure.message}")
            answer = self._answers[request.request_id]
            answer.text += delta.text
            answer.token_ids += tuple(delta.token_ids)
            self._num_open -= delta.finish_reason is not None


def endpoint_of(engine: Engine) -> Endpoint:
    """The endpoint of an engine in this process, without an address."""
    return Endpoint(replica_id=engine.info.model, address="", public_key=b"", info=engine.info)
