"""The timeline of a request; knows clocks and nothing else."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from eft_serve.types import Event, EventKind


@dataclass(slots=True)
class Timeline:
    """One request's events, from its arrival on."""

    arrival: float  # monotonic seconds
    queued_at: float = field(default_factory=time.time)  # Unix seconds, of the same moment
    events: list[Event] = field(default_factory=lambda: [Event(EventKind.QUEUED, 0.0)])

    def add(self, kind: EventKind, now: float) -> None:
        """Record an event at this time of the monotonic clock."""
        self.events.append(Event(kind, now - self.arrival))
