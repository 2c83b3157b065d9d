"""The naive peer in a process of its own, so that nothing of Ray's stands beside it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from eft_serve.bench.load import Wanted
from eft_serve.bench.naive_peer import NaivePeer
from eft_serve.bench.report import num_cores
from eft_serve.bench.timeline import Timeline

REPLAY_TIMEOUT_S = 600.0

_peer: NaivePeer  # in the peer's process


@dataclass(frozen=True, slots=True)
class PeerProcess:
    """Runs a load there."""

    pool: ProcessPoolExecutor

    def replay(self, load: Sequence[Wanted], max_batch: int) -> list[Timeline]:
        return self.pool.submit(_replay, load, max_batch).result(timeout=REPLAY_TIMEOUT_S)


@contextmanager
def naive_peer() -> Iterator[PeerProcess]:
    """One that uses all cores; it sleeps while it has no load."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_start, initargs=(num_cores(),)) as pool:
        yield PeerProcess(pool)


def _start(num_threads: int) -> None:
    global _peer
    _peer = NaivePeer(num_threads)


def _replay(load: Sequence[Wanted], max_batch: int) -> list[Timeline]:
    return _peer.replay(load, max_batch)
