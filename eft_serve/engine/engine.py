"""One model behind the step contract; knows no Ray, no sockets and no other model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from eft_serve.config import ModelConfig
from eft_serve.engine.batch import BatchRow, ForwardBatch
from eft_serve.engine.block_pool import BLOCK_SIZE
from eft_serve.engine.draft_grammars import DraftGrammars
from eft_serve.engine.drafting import DraftState, draw_drafts
from eft_serve.engine.kv_cache import KVCache
from eft_serve.engine.metrics import EngineMetrics
from eft_serve.engine.scheduler import Admitted, Limits, StepScheduler, waves
from eft_serve.engine.startup import start, within
from eft_serve.engine.worker_group import WorkerGroup
from eft_serve.errors import EngineError
from eft_serve.types import ModelInfo, SequenceStep, StepOutput

NO_ADAPTERS: Mapping[str, Path] = MappingProxyType({})


class Engine:
    """Holds one model's sequences and computes their steps. Not thread-safe: call it from one thread.

    Args:
        info: what the model is.
        group: the started ranks.
        config: limits, lease and budget.
        vocab_size: token ids run below this.
        adapters: names that a step may give.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        info: ModelInfo,
        group: WorkerGroup,
        config: ModelConfig,
        vocab_size: int,
        adapters: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = info
        self._group = group
        self._lease_s = config.lease_s
        self._most_rows = config.max_num_batched_tokens
        self._clock = clock
        self._failure: str | None = None
        self._grammars = DraftGrammars(lambda: (config.checkpoint / "tokenizer.json").read_text())
        self._cache = KVCache(info.kv_capacity_tokens // BLOCK_SIZE)
        limits = Limits(vocab_size, info.max_model_len, config.max_num_batched_tokens, frozenset(adapters))
        self._scheduler = StepScheduler(self._cache, limits)
        self._metrics = EngineMetrics(info.model)
        self._metrics.kv_capacity_tokens.set(info.kv_capacity_tokens)

    @classmethod
    def load(
        cls,
        name: str,
        config: ModelConfig,
        adapters: Mapping[str, Path] = NO_ADAPTERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> Engine:
        """Load a model on all its ranks and check that it computes what the checkpoint does.

        Args:
            name: of the model, for messages and metrics.
            config: where it is and how it runs.
            adapters: name → PEFT directory with a LoRA; sequences may use any of them.
            clock: seconds, monotonic.

        Raises:
            CheckpointError: the model directory, or an adapter's, is not one that can be served.
            EngineError: a rank failed, or nothing was ready within `startup_timeout_s`.
        """
        group = WorkerGroup(config, adapters)
        try:
            info, vocab_size = within(config.startup_timeout_s, lambda: start(name, config, group), name)
        except BaseException:
            group.close()
            raise
        return cls(info, group, config, vocab_size, adapters, clock)

    @property
    def registry(self) -> CollectorRegistry:
        """The engine's metrics."""
        return self._metrics.registry

    def forward(self, steps: Sequence[SequenceStep]) -> list[StepOutput]:
        """Compute steps; the answers are in their order.

        Two steps for one sequence are computed one after the other. Bad steps are answered with `error`. Logits are the
        caller's own, to be changed under `torch.inference_mode` only.

        Raises:
            EngineError: the model itself failed; sequences of this call are rolled back to what was computed.
        """
        self._check_alive()
        outputs: dict[int, StepOutput] = {}
        for wave in waves(steps):
            admitted, answered = self._scheduler.admit(wave, self._clock())
            outputs.update(answered)
            outputs.update(self._compute(admitted))
        self._observe(outputs.values())
        return [outputs[index] for index in range(len(steps))]

    def free(self, sequence_ids: Iterable[str]) -> None:
        """Drop sequences; those that are not here are no error."""
        for sequence_id in sequence_ids:
            self._cache.free(sequence_id)
            self._grammars.free(sequence_id)
        self._observe(())

    def expire(self) -> None:
        """Drop sequences without a step for `lease_s`."""
        expired = self._cache.stepped_before(self._clock() - self._lease_s)
        self._metrics.expirations.inc(len(expired))
        self.free(expired)

    def close(self) -> None:
        """Stop the other ranks and give back the memory; may be called twice."""
        self._failure = self._failure or "closed"
        self._grammars.close()
        self._group.close()

    def _compute(self, admitted: list[Admitted]) -> dict[int, StepOutput]:
        pieces: dict[int, list[Tensor]] = {item.index: [] for item in admitted}
        non_finite: set[int] = set()
        drafts: dict[int, DraftState] = {}
        try:
            for chunks in self._scheduler.pack(admitted):
                rows = [chunk.row() for chunk in chunks]
                logits = self._run(rows)
                for chunk, piece, bad in zip(chunks, _by_row(rows, logits), _non_finite(rows, logits), strict=True):
                    self._cache.commit(chunk.admitted.sequence, chunk.token_ids)
                    pieces[chunk.admitted.index].append(piece)
                    if bad:
                        non_finite.add(chunk.admitted.index)
            drafts = {
                item.index: state
                for item in admitted
                if item.num_logits and item.index not in non_finite and (state := self._draft_state(item)) is not None
            }
            non_finite |= self._draft(drafts, pieces)
        finally:
            for item in admitted:  # after a failure there are blocks reserved for tokens that were not computed
                self._cache.truncate(item.sequence, item.sequence.num_computed_tokens)
        salted = [item for item in admitted if item.step.salt is not None]
        self._metrics.prefix_queried_tokens.inc(sum(len(item.step.token_ids) for item in salted))
        self._metrics.prefix_hit_tokens.inc(sum(item.start for item in salted))
        return {
            item.index: self._output(item, pieces[item.index], item.index in non_finite, drafts.get(item.index))
            for item in admitted
        }

    def _draft_state(self, item: Admitted) -> DraftState | None:
        """Of a computed step; None if it is not to be drafted after it."""
        draft = item.step.draft
        if draft is None or draft.sampling.grammar is None:
            return None if draft is None else DraftState(item.sequence, draft)
        matcher = self._grammars.matcher(item.sequence, draft)
        return None if matcher is None else DraftState(item.sequence, draft, matcher)

    def _draft(self, drafts: Mapping[int, DraftState], pieces: Mapping[int, list[Tensor]]) -> set[int]:
        """Draft for each, one forward for all that want one more; returns those whose logits are not finite."""
        non_finite: set[int] = set()
        if drafts:
            draw_drafts(list(drafts.values()), torch.stack([pieces[index][-1][-1] for index in drafts]))
        while going_on := [
            i for i, each in drafts.items() if i not in non_finite and each.wants_more and self._extend(each)
        ]:
            for part in (going_on[i : i + self._most_rows] for i in range(0, len(going_on), self._most_rows)):
                rows = [drafts[index].next_row() for index in part]
                logits = self._run(rows)
                non_finite_rows = _non_finite(rows, logits)
                for index, row, bad in zip(part, logits, non_finite_rows, strict=True):
                    self._cache.commit(drafts[index].sequence, drafts[index].token_ids[-1:])
                    drafts[index].rows.append(row)
                    if bad:
                        non_finite.add(index)
                healthy = [i for i, bad in enumerate(non_finite_rows) if not bad]
                draw_drafts(
                    [drafts[part[i]] for i in healthy], logits if len(healthy) == len(part) else logits[healthy]
                )
        return non_finite

    def _extend(self, drafts: DraftState) -> bool:
        """Make room for one more token if blocks are free; no sequence is evicted for a draft token."""
        num_tokens = drafts.sequence.num_computed_tokens + 1
        if num_tokens > self.info.max_model_len or self._cache.num_missing_blocks(drafts.sequence, num_tokens) > 0:
            return False
        self._cache.reserve(drafts.sequence, num_tokens)
        return True

    def _output(self, item: Admitted, pieces: list[Tensor], non_finite: bool, drafts: DraftState | None) -> StepOutput:
        step = item.step
        if item.stop < len(step.token_ids):
            num_computed = item.sequence.num_computed_tokens
            return StepOutput(step.sequence_id, num_computed_tokens=num_computed, num_cached_tokens=item.start)
        if non_finite:
            self._cache.forget_prefix(item.sequence)
            return StepOutput(step.sequence_id, error="logits: the model computed infinities or NaN; try dtype float32")
        if drafts is not None and (rows := drafts.rows[: len(drafts.token_ids) - 1]):
            pieces = [*pieces, torch.stack(rows)]
        logits = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return StepOutput(
            step.sequence_id,
            logits=logits,
            drafted=drafts.token_ids if drafts is not None else (),
            confidences=drafts.confidences if drafts is not None else (),
            num_cached_tokens=item.start,
        )

    def _run(self, rows: list[BatchRow]) -> Tensor:
        """One forward; logits [num_logits, vocab_size] of all rows in their order."""
        batch = ForwardBatch(rows, self._cache.copies)
        started = time.perf_counter()
        try:
            logits = self._group.forward(batch)
        except Exception as error:
            self._cache.forget_copies()
            # Ranks may be out of step with one another now; one rank alone is where it was before.
            self._failure = str(error) if self._group.workers else None
            raise EngineError(f"{self.info.model}: {error}") from error
        self._cache.copies = []
        self._metrics.forward_seconds.observe(time.perf_counter() - started)
        self._metrics.tokens_computed.inc(batch.num_tokens)
        return logits

    def _observe(self, outputs: Iterable[StepOutput]) -> None:
        self._metrics.cache_misses.inc(sum(output.num_computed_tokens is not None for output in outputs))
        self._metrics.evictions.inc(self._scheduler.take_num_evictions())
        self._metrics.num_sequences.set(len(self._cache))
        self._metrics.kv_used_tokens.set(self._cache.used_tokens)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineError(f"{self.info.model}: the engine has failed: {self._failure}")


def _by_row(rows: list[BatchRow], logits: Tensor) -> tuple[Tensor, ...]:
    return torch.split(logits, [row.num_logits for row in rows])


def _non_finite(rows: list[BatchRow], logits: Tensor) -> list[bool]:
    """Whether a row's logits have infinities or NaN, found for all of them at once."""
    with np.errstate(invalid="ignore", over="ignore"):
        finite = iter(np.isfinite(logits.float().numpy().sum(axis=-1)).tolist())
    return [not all(list(islice(finite, row.num_logits))) for row in rows]
