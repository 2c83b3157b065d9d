"""Applies the replicas' answers to the requests: computed tokens, ready requests, failures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from eft_serve.coordinator.request import Request, SequenceState
from eft_serve.coordinator.scheduler import ScheduledStep, SchedulerOutput
from eft_serve.errors import EftServeError, EngineError
from eft_serve.types import StepOutput, StepResult


@dataclass(slots=True)
class Gathered:
    """The outcome of one fan-out."""

    ready: list[Request] = field(default_factory=list)  # all their sequences have the rows for the next tokens
    errors: dict[Request, EftServeError] = field(default_factory=dict)
    failed_replicas: dict[str, str] = field(default_factory=dict)  # why
    num_cache_misses: int = 0


def gather(scheduled: SchedulerOutput, results: Mapping[str, StepResult], now: float) -> Gathered:
    """Apply every answer to its sequence; a request is ready when all its models gave logits in this step."""
    gathered = Gathered()
    logits: dict[Request, list[SequenceState]] = defaultdict(list)
    for replica_id, result in results.items():
        entries = scheduled.entries.get(replica_id, [])
        failure = result.failure
        if failure is None and len(result.outputs) != len(entries):
            failure = f"{len(result.outputs)} answers to {len(entries)} steps"
        if failure is not None:
            gathered.failed_replicas[replica_id] = failure
            continue
        for entry, output in zip(entries, result.outputs, strict=True):
            _apply(entry, output, now, gathered, logits)
    for request in scheduled.to_sample:
        if len(logits[request]) == len(request.sequences):
            gathered.ready.append(request)
        else:
            # A model gave no logits: the other models compute the last token again to give its logits again.
            request.drop_draft_tokens()
    return gathered


def _apply(
    entry: ScheduledStep, output: StepOutput, now: float, gathered: Gathered, logits: dict[Request, list[SequenceState]]
) -> None:
    request, sequence, step = entry.request, entry.sequence, entry.step
    if output.error is None:
        sequence.count(step, output)
    end = step.position + len(step.token_ids)
    if output.error is not None:
        gathered.errors[request] = EngineError(f"model {sequence.model}: {output.error}")
    elif output.num_computed_tokens is not None and output.num_computed_tokens >= end:
        message = f"it holds {output.num_computed_tokens} tokens where {end} were sent"
        gathered.errors[request] = EngineError(f"model {sequence.model}: {message}")
    elif output.num_computed_tokens is not None:
        sequence.num_computed_tokens = output.num_computed_tokens
        if output.num_computed_tokens > step.position:
            request.last_progress = now
        else:
            gathered.num_cache_misses += 1
    else:
        sequence.num_computed_tokens = end + max(0, len(output.drafted) - 1)
        if not step.num_logits:
            request.last_progress = now
        known = sequence.rows
        if output.logits is not None and step.num_logits and known is not None and not _alike(known, output.logits):
            message = f"its logits were {list(known.shape)} and are {list(output.logits.shape)} now"
            gathered.errors[request] = EngineError(f"model {sequence.model}: {message}")
        elif output.logits is not None and step.num_logits:
            sequence.rows = output.logits if known is None else torch.cat([known, output.logits])
            logits[request].append(sequence)
        if output.drafted:
            request.draft_token_ids += output.drafted
            request.speculation.confidences += output.confidences
            request.speculation.count_drafted(len(output.drafted))


def _alike(known: torch.Tensor, logits: torch.Tensor) -> bool:
    return known.shape[1:] == logits.shape[1:] and known.dtype == logits.dtype
