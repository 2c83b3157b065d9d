"""One batch, run by the process that holds its lease, from where the one before left off.

Requests go to an HTTP client, which is the tenant's: whatever the API would answer it, the batch gets. The process
that takes a newer lease is the batch's; this one notices at its next beat and stops without a word.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass

import httpx
import msgspec

from eft_serve.batches.answers import Answer
from eft_serve.batches.client import UnreachedError, ask, body_of
from eft_serve.batches.files import Files
from eft_serve.batches.ids import FILE, new_id
from eft_serve.batches.input import check_input, read_lines
from eft_serve.batches.ledger import Ledger, address_of
from eft_serve.batches.lines import Line, answer
from eft_serve.batches.offload import Offload
from eft_serve.batches.outputs import UNANSWERED, Outputs
from eft_serve.batches.records import End, Facts, Lease, Mistake, Outcome
from eft_serve.errors import EftServeError

FLUSH_BYTES = 2**20  # answers in memory; what is lost when the process dies
INLINE_BYTES = 2**15  # a larger answer is worded in a thread, or it would stall every stream
LET_GO_S = 5.0  # for the last answers of a process that stops

ClientOf = Callable[[str], httpx.AsyncClient]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all runs of a process share."""

    ledger: Ledger
    files: Files
    offload: Offload
    client_of: ClientOf
    """A client for requests in the name of a tenant; raises `EftServeError` when the tenant may not ask any more."""
    concurrency: int
    beat_s: float


class LeaseLostError(Exception):
    """Another process has the batch, or has ended it."""


class BatchRun:
    """A batch in the hands of this process.

    Args:
        facts: as of before the lease.
        epoch: number of the lease that this process has taken.
        lease: its contents.
    """

    def __init__(self, shared: Shared, facts: Facts, epoch: int, lease: Lease) -> None:
        self.spec = facts.spec
        self._shared = shared
        self._address = address_of(facts.spec)
        self._epoch = epoch
        self._lease = lease
        self._log = shared.ledger.answers(self._address)
        self._outputs = Outputs(shared.files, self._log, self.spec)
        self._answers: list[Answer] = []  # not written yet
        self._num_bytes = 0  # of them
        self._num_parts = 0
        self._done: dict[int, bool] = {}  # lines that were answered before: whether with success
        self._run = shared.offload.run
        self._writing, self._beating = asyncio.Lock(), asyncio.Lock()
        self._ending = False
        self._cancelled = asyncio.Event()
        if facts.cancelling_at is not None:
            self._cancelled.set()
        self.poke = asyncio.Event()  # beat now

    async def run(self) -> None:
        """Until the batch ends, or another process has it.

        Raises:
            OSError: the store failed; the answers so far are kept, and the lease is let go.
        """
        work, beats = asyncio.create_task(self._work()), asyncio.create_task(self._beat_always())
        try:
            done, _ = await asyncio.wait((work, beats), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except LeaseLostError:
            logger.info("batch %s goes on in another process", self.spec.id)
            await _ended(work, beats)
            await self._drop_late_answers()
        except BaseException:
            await _ended(work, beats)
            await self._let_go()
            raise
        finally:
            await _ended(work, beats)

    async def _work(self) -> None:
        await self._resume()
        outcome, mistakes = await self._outcome()
        self._lease.finalizing_at = _now() if outcome != "failed" else None
        await self._flush()
        await self._finish(outcome, mistakes)

    async def _outcome(self) -> tuple[Outcome, list[Mistake]]:
        """Answer what can be answered, and say how it ended."""
        if self._cancelled.is_set():
            return "cancelled", []
        if self._left_s() <= 0:
            return "expired", []
        try:
            client = self._shared.client_of(self.spec.tenant)
            async with client:
                if self._lease.in_progress_at is None and (mistakes := await self._check()):
                    return "failed", mistakes
                return await self._answer_all(client), []
        except EftServeError as error:
            return "failed", [Mistake(code=error.code or error.error_type, message=error.message, param=error.param)]

    async def _check(self) -> list[Mistake]:
        pieces = await self._input()
        total, mistakes = await self._run(check_input, pieces, self.spec.endpoint)
        if not mistakes:
            self._lease.total, self._lease.in_progress_at = total, _now()
            await self._beat()
        return mistakes

    async def _resume(self) -> None:
        """Count what the processes before this one were answered."""
        self._done = await self._run(self._tally, await self._run(self._log.parts))

    def _tally(self, parts: list[str]) -> dict[int, bool]:
        done = {each.number: each.succeeded for each in self._log.read(parts)}
        self._lease.completed = sum(done.values())
        self._lease.failed = len(done) - self._lease.completed
        return done

    async def _answer_all(self, client: httpx.AsyncClient) -> Outcome:
        answering = asyncio.create_task(self._answer_lines(client))
        cancelled = asyncio.create_task(self._cancelled.wait())
        try:
            ends = (answering, cancelled)
            await asyncio.wait(ends, timeout=self._left_s(), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return "completed" if answering.result() else "expired"
            return "cancelled" if cancelled.done() else "expired"
        finally:
            await _ended(answering, cancelled)

    async def _answer_lines(self, client: httpx.AsyncClient) -> bool:
        """Whether every line got an answer; those that were answered before are not asked again."""
        pieces = await self._input()
        wanted = (line for line in read_lines(pieces) if line.number not in self._done)
        queue: asyncio.Queue[Line | None] = asyncio.Queue(maxsize=1)  # a line may be 4 MiB
        try:
            async with asyncio.TaskGroup() as tasks, aclosing(self._shared.offload.each(wanted)) as lines:
                workers = [tasks.create_task(self._answer_from(queue, client)) for _ in range(self._shared.concurrency)]
                async for line in lines:
                    await queue.put(line)
                for _ in workers:
                    await queue.put(None)
        except ExceptionGroup as group:
            raise group.exceptions[0] from group
        return all(worker.result() for worker in workers)

    async def _answer_from(self, queue: asyncio.Queue[Line | None], client: httpx.AsyncClient) -> bool:
        reached = True
        while (line := await queue.get()) is not None:
            request_id = f"{self.spec.id}-{line.number}"
            headers = {"x-request-id": request_id}
            try:
                response = await ask(client, line.url, line.body, self._left_s(), headers)
            except UnreachedError:
                reached = False  # until the deadline, so the batch expires
                continue
            word = _worded(line, request_id, response)
            inline = len(response.content) <= INLINE_BYTES
            await self._keep(Answer(line.number, response.is_success, word() if inline else await self._run(word)))
        return reached

    async def _keep(self, each: Answer) -> None:
        self._answers.append(each)
        self._num_bytes += len(each.text)
        self._lease.completed += each.succeeded
        self._lease.failed += not each.succeeded
        if self._num_bytes >= FLUSH_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        """Write the answers so far; they are kept when that fails."""
        async with self._writing:
            if not (answers := self._answers):
                return
            index, self._num_parts = self._num_parts, self._num_parts + 1
            self._answers, self._num_bytes = [], 0
            try:
                await self._run(self._log.append, self._epoch, index, answers)
            except BaseException:
                self._answers = answers + self._answers
                raise

    async def _finish(self, outcome: Outcome, mistakes: list[Mistake]) -> None:
        lease = self._lease
        # One look at the parts: another process may still be writing one, which must not count in one file only.
        parts = await self._run(self._log.parts)
        done = await self._run(self._tally, parts)
        if outcome in UNANSWERED:
            lease.failed += lease.total - len(done)
        lease.output_file_id = new_id(FILE) if lease.completed else None
        lease.error_file_id = new_id(FILE) if lease.failed else None
        await self._beat()  # so that a successor knows which files to drop
        await self._run(self._outputs.write, lease, parts, outcome)
        async with self._beating:
            self._ending = True
        end = End(outcome=outcome, at=_now(), lease=lease, mistakes=mistakes)
        won = await self._run(self._shared.ledger.end, self._address, end)
        await self._run(self._drop_files, range(1, self._epoch) if won else [self._epoch])
        if not won:
            raise LeaseLostError
        await self._run(self._shared.ledger.close, self._address)
        logger.info("batch %s: %s, %d + %d answers", self.spec.id, outcome, lease.completed, lease.failed)

    def _drop_files(self, epochs: Iterable[int]) -> None:
        """Drop the outputs of leases that did not end the batch."""
        for epoch in epochs:
            self._outputs.drop(self._shared.ledger.lease(self._address, epoch))

    async def _beat_always(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._shared.beat_s):
                    await self.poke.wait()
            self.poke.clear()
            await self._flush()
            await self._beat()

    async def _beat(self) -> None:
        async with self._beating:
            if self._ending:
                return
            self._lease.beat += 1
            ledger = self._shared.ledger
            await self._run(ledger.beat, self._address, self._epoch, msgspec.structs.replace(self._lease))
            facts = await self._run(ledger.find, self._address)
        if facts is None or facts.epoch != self._epoch or facts.end is not None:
            raise LeaseLostError
        if facts.cancelling_at is not None:
            self._cancelled.set()

    async def _let_go(self) -> None:
        """Keep the answers so far and let another process go on at once; without it, that waits for the lease."""
        self._lease.released = True
        try:
            async with asyncio.timeout(LET_GO_S):
                await self._flush()
                await self._beat()
        except Exception as error:  # of the store, each has its own; the lease runs out by itself
            logger.warning("batch %s: not let go: %s: %s", self.spec.id, type(error).__name__, error)

    async def _drop_late_answers(self) -> None:
        """Drop what this process wrote after another had ended the batch."""
        facts = await self._run(self._shared.ledger.find, self._address)
        if facts is not None and facts.end is not None:
            await self._run(self._shared.ledger.close, self._address)

    async def _input(self) -> Iterator[bytes]:
        files, spec = self._shared.files, self.spec
        stored = await self._run(files.get, spec.tenant, spec.input_file_id, "input_file_id")
        return files.read(spec.tenant, stored)

    def _left_s(self) -> float:
        return max(0.0, self.spec.expires_at - time.time())


def _worded(line: Line, request_id: str, response: httpx.Response) -> Callable[[], bytes]:
    def word() -> bytes:
        return json.dumps(answer(line, response.status_code, request_id, body_of(response))).encode()

    return word


def _now() -> int:
    return int(time.time())


async def _ended(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
