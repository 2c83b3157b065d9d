"""The next tokens of each request whose models have all answered: combine → process → sample → verify → describe.

It knows requests and the backends for the arithmetic. It does not know where logits come from or where tokens go.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from eft_serve.coordinator.components import describe
from eft_serve.coordinator.controls import used_controls
from eft_serve.coordinator.request import Request
from eft_serve.errors import EftServeError, EngineError, InvalidRequestError
from eft_serve.numerics.backends import SamplingBackend
from eft_serve.numerics.device_sampling import filtered_logits
from eft_serve.numerics.rows import RequestRows, RowBatch, tiles
from eft_serve.numerics.sampling_rows import SamplingRows
from eft_serve.numerics.verify import verify
from eft_serve.types import SamplingParams, TokenComponents

logger = logging.getLogger(__name__)

PHASES = ("combine", "process", "sample", "describe")
Seconds = dict[str, float]  # by phase


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """A request's next tokens, at least one, and their components if requested."""

    token_ids: list[int]
    components: list[TokenComponents] | None = None
    is_cut: bool = False  # no token is possible behind these, which are draft tokens; it matters if they do not end it


class Sampler:
    """Runs the pipeline tile by tile: a tile's logits stay in the CPU cache until its tokens are drawn.

    Args:
        backend: combines and draws.
        num_threads: number of tiles processed in parallel.
        observe: called with the seconds of each phase of a step.
    """

    def __init__(self, backend: SamplingBackend, num_threads: int, observe: Callable[[str, float], None]) -> None:
        self._backend = backend
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="sampler") if num_threads > 1 else None
        self._observe = observe

    def sample(self, requests: Sequence[Request]) -> list[SamplerOutput | EftServeError]:
        """The next tokens of each request, or an error where its distribution does not exist.

        Args:
            requests: their sequences' rows follow the output and each draft token that all have computed.
        """
        rows = [request.rows() for request in requests]
        num_elements = sum(r.num_rows * r.vocab_size for r in rows)
        parts = list(tiles(rows, min(self._backend.tile_elements, -(-num_elements // self._num_threads))))

        def run(part: range) -> tuple[list[SamplerOutput | EftServeError], Seconds]:
            return self._guarded(rows[part.start : part.stop], requests[part.start : part.stop])

        done = list(map(run, parts) if self._threads is None or len(parts) == 1 else self._threads.map(run, parts))
        for phase in PHASES:  # summed over threads, divided by how many ran in parallel
            spent = sum(seconds[phase] for _, seconds in done)
            self._observe(phase, spent / min(self._num_threads, max(1, len(parts))))
        return [output for outputs, _ in done for output in outputs]

    def _guarded(
        self, rows: Sequence[RequestRows], requests: Sequence[Request]
    ) -> tuple[list[SamplerOutput | EftServeError], Seconds]:
        """Sample a tile; if it fails, each of its requests by itself, so that only the one at fault ends."""
        try:
            return self._run(RowBatch(rows), requests)
        except Exception as error:  # whatever logits, a device or a processor may raise
            if len(requests) == 1 and isinstance(error, InvalidRequestError):
                return [error], dict.fromkeys(PHASES, 0.0)
            if len(requests) == 1:
                logger.exception("request %s cannot be sampled", requests[0].request_id)
                failure = EngineError(f"request {requests[0].request_id}: cannot be sampled: {error}")
                return [failure], dict.fromkeys(PHASES, 0.0)
        alone = [self._guarded([row], [request]) for row, request in zip(rows, requests, strict=True)]
        seconds = {phase: sum(spent[phase] for _, spent in alone) for phase in PHASES}
        return [output for outputs, _ in alone for output in outputs], seconds

    def _run(self, batch: RowBatch, requests: Sequence[Request]) -> tuple[list[SamplerOutput | EftServeError], Seconds]:
        seconds = dict.fromkeys(PHASES, 0.0)
        with _timed(seconds, "combine"):
            combined, errors = self._backend.combine(batch)
        with _timed(seconds, "process"):
            processed, impossible = process(batch, combined, keep_combined=any(map(_shows_combined, requests)))
        with _timed(seconds, "sample"):
            drawn = self._backend.sample(batch, processed)
        with _timed(seconds, "describe"):
            outputs: list[SamplerOutput | EftServeError] = []
            for index, (request, (rows, where)) in enumerate(zip(requests, batch, strict=True)):
                token_ids = verify(rows, drawn[where])
                if index in errors:
                    outputs.append(EngineError(f"request {request.request_id}: {errors[index]}"))
                elif (num_possible := impossible.get(index, rows.num_rows)) == 0:
                    outputs.append(_nothing_possible(rows.sampling))
                else:
                    is_cut, token_ids = num_possible < len(token_ids), token_ids[:num_possible]
                    output = _described(request, rows, token_ids, combined[where], processed[where])
                    outputs.append(replace(output, is_cut=is_cut) if isinstance(output, SamplerOutput) else output)
        return outputs, seconds


def process(batch: RowBatch, combined: Tensor, *, keep_combined: bool) -> tuple[Tensor, dict[int, int]]:
    """The logits to sample from: the combined logits, changed by the requests' processors.

    Args:
        batch: rows of requests.
        combined: their combined logits.
        keep_combined: leave them as they are and change a copy, which costs as much as a mask.

    Returns:
        The logits, and by index of a request its first row with NaN, +inf or no possible token; it holds 0 then. A row
        behind a draft token that cannot be accepted may be one and does no harm.
    """
    impossible: dict[int, int] = {}
    if not any(request.processors for request in batch.requests):
        return combined, impossible
    processed = combined.clone() if keep_combined else combined
    for index, (request, rows) in enumerate(batch):
        if request.processors:
            logits = processed[rows, : request.vocab_size]
            for processor in request.processors:
                processor(request.output_token_ids, request.draft_token_ids, logits)
            bad = ~logits.amax(dim=-1).isfinite()
            if bad.any():
                logits[bad] = 0
                impossible[index] = int(bad.nonzero()[0])
    return processed, impossible


def _nothing_possible(sampling: SamplingParams) -> InvalidRequestError:
    names = used_controls(sampling)
    if sampling.grammar is not None:
        names = [name if name != "grammar" else sampling.grammar.param for name in names]
    return InvalidRequestError(f"{', '.join(names)}: no token is possible with these together", param=names[0])


def _shows_combined(request: Request) -> bool:
    """Whether its output's log-probabilities are wanted as they were before the processors; forced tokens have none."""
    generation = request.generation
    is_described = generation.components is not None or generation.logprobs is not None
    return is_described and generation.logprobs_mode == "raw_logprobs"


def _described(
    request: Request, rows: RequestRows, token_ids: list[int], combined: Tensor, processed: Tensor
) -> SamplerOutput | EftServeError:
    generation = request.generation
    is_prompt = request.is_forcing and not request.is_forced
    wanted = generation.prompt_logprobs if is_prompt else generation.logprobs
    if generation.components is None and wanted is None:
        return SamplerOutput(token_ids)
    logits = combined
    if generation.logprobs_mode == "processed_logprobs" and not is_prompt:
        logits = _as_sampled(processed[: len(token_ids), : rows.vocab_size], rows)
    try:
        return SamplerOutput(token_ids, describe(request, rows, token_ids, logits, wanted, with_ranks=is_prompt))
    except ValueError as error:  # a term of coefficient 0 whose logits are not finite
        return EngineError(f"request {request.request_id}: {error}")


def _as_sampled(logits: Tensor, rows: RequestRows) -> Tensor:
    """What tokens are drawn from: after temperature, top-k, top-p and min-p; greedy rows have none of these."""
    if rows.sampling.temperature == 0:
        return logits.contiguous()
    positions = rows.positions[: len(logits)]
    return filtered_logits(logits, SamplingRows.of([rows.sampling] * len(positions), positions))


@contextmanager
def _timed(seconds: Seconds, phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] += time.perf_counter() - started
