"""The naive peer in a process of its own, without Ray beside it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from eft_serve.bench.load import Wanted, burst
from eft_serve.bench.naive_peer import NaivePeer
from eft_serve.bench.report import num_cores
from eft_serve.bench.timeline import Timeline

TIMEOUT_S = 600.0
TRIAL_SEED, TRIAL_TOKENS = 5, 24

_peer: NaivePeer  # in the peer's process


@dataclass(frozen=True, slots=True)
class PeerProcess:
    """Runs a load there; sleeps while it has none."""

    pool: ProcessPoolExecutor

    def choose_threads(self, max_batch: int) -> int:
        """One math thread or as many as there are cores, whichever is quicker at this batch size at the moment."""
        return self.pool.submit(_choose_threads, max_batch).result(timeout=TIMEOUT_S)

    def replay(self, load: Sequence[Wanted], max_batch: int) -> list[Timeline]:
        return self.pool.submit(_replay, load, max_batch).result(timeout=TIMEOUT_S)


@contextmanager
def naive_peer() -> Iterator[PeerProcess]:
    """One that ends with the block."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start) as pool:
        yield PeerProcess(pool)


def _start() -> None:
    global _peer
    _peer = NaivePeer()


def _choose_threads(max_batch: int) -> int:
    trial = [Wanted(wanted.prompt, TRIAL_TOKENS) for wanted in burst(max_batch, TRIAL_SEED)]
    return _peer.choose_threads(sorted({1, num_cores()}), trial)


def _replay(load: Sequence[Wanted], max_batch: int) -> list[Timeline]:
    return _peer.replay(load, max_batch)
