"""Which coordinators the next forward waits for a little, so that they share it instead of taking turns.

It knows clients as bytes and how long forwards took, and neither sockets nor messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

MAX_WAIT_S = 0.005
MAX_WAIT_OF_FORWARD = 0.2
LEAST_WAIT_S = 0.001  # sockets wait in whole milliseconds
SKIPPED_FORWARDS = 16


class MergeWindow:
    """Expects the clients of the last forward, except those that others have recently waited for without success."""

    def __init__(self) -> None:
        self._last: frozenset[bytes] = frozenset()
        self._skipped: dict[bytes, int] = {}  # number of forwards that will not wait for this client
        self.wait_s = 0.0  # how long a message may wait for the others

    def awaited(self, present: Set[bytes]) -> frozenset[bytes]:
        """Clients worth waiting for, once some are present."""
        return self._last - present - self._skipped.keys()

    def timed_out(self, clients: Iterable[bytes]) -> None:
        """These clients did not come in time."""
        self._skipped |= dict.fromkeys(clients, SKIPPED_FORWARDS)

    def forwarded(self, clients: Iterable[bytes], seconds: float) -> None:
        """These took part in a forward, which took so many seconds."""
        self._last = frozenset(clients)
        self._skipped = {client: left - 1 for client, left in self._skipped.items() if left > 1}
        wait_s = min(MAX_WAIT_S, MAX_WAIT_OF_FORWARD * seconds)
        self.wait_s = wait_s if wait_s >= LEAST_WAIT_S else 0.0
