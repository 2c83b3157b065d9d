"""Whether replicas answer: a replica that is new or has failed is probed beside the steps of the others.

A probe is an ordinary step of one token. No step waits for it: its answer is checked for in every later step, so a
replica that hangs costs the others nothing. It knows replicas, and no requests.
"""

from __future__ import annotations

import logging
import uuid

from eft_serve.coordinator.backend import LogitsBackend
from eft_serve.coordinator.replicas import ReplicaTable
from eft_serve.types import SequenceStep, StepBatch

logger = logging.getLogger(__name__)


class ReplicaHealth:
    """Probes the replicas of one table.

    Args:
        timeout_s: for the answer to a probe.
    """

    def __init__(self, replicas: ReplicaTable, backend: LogitsBackend, timeout_s: float) -> None:
        self._replicas = replicas
        self._backend = backend
        self._timeout_s = timeout_s
        self._probe = SequenceStep(f"probe/{uuid.uuid4().hex}", 0, [0], num_logits=1)  # one sequence for all
        self._probes: set[str] = set()  # replicas whose answer is outstanding

    @property
    def is_probing(self) -> bool:
        """Whether an answer is outstanding."""
        return bool(self._probes)

    def check(self, now: float) -> None:
        """Send a probe to every replica that is due for one, and read the answers that have arrived."""
        due = [replica_id for replica_id in self._replicas.due(now) if replica_id not in self._probes]
        if due:
            self._probes.update(due)
            self._backend.begin(dict.fromkeys(due, StepBatch(steps=[self._probe])), self._timeout_s)
        if self._probes:
            self._read(now)

    def _read(self, now: float) -> None:
        for replica_id, result in self._backend.finished().items():
            self._probes.discard(replica_id)
            if (replica := self._replicas.replicas.get(replica_id)) is None:
                continue  # the replica is gone
            freed = self._replicas.freed[replica_id]
            if self._probe.sequence_id not in freed:
                freed.append(self._probe.sequence_id)  # also after a failure: it may be computed late
            reason = result.failure or result.outputs[0].error
            if reason is None:  # "no room now" is an answer too
                replica.succeed()
            else:
                replica.fail(now)
                if replica.num_failures.bit_count() == 1:  # ever more rarely: an outage may be long
                    logger.warning("replica %s did not answer %d times: %s", replica_id, replica.num_failures, reason)
