"""What is known of a batch, as facts that are each written once or by one process, and OpenAI's object made of them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

WINDOW = "24h"
WINDOW_S = 24 * 3600

Outcome = Literal["completed", "failed", "cancelled", "expired"]


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for; never changes."""

    id: str
    tenant: str
    input_file_id: str
    endpoint: str
    metadata: dict[str, str] | None
    created_at: int  # Unix seconds, as all times here

    @property
    def expires_at(self) -> int:
        """When what has no answer yet is given up."""
        return self.created_at + WINDOW_S


class Lease(msgspec.Struct, kw_only=True):
    """What the process that runs a batch says of it. It alone writes this; another process takes the next lease."""

    beat: int = 0  # changes while the process lives
    released: bool = False  # it has let go
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None  # chosen, but not the batch's before its `End` says so
    error_file_id: str | None = None


class Mistake(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed; fields as in OpenAI's object."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How a batch ended; the first one that is written counts."""

    outcome: Outcome
    at: int
    lease: Lease
    mistakes: list[Mistake] = []


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All of a batch at one moment."""

    spec: Spec
    epoch: int = 0  # number of the newest lease; 0: nobody ran it yet
    lease: Lease | None = None
    cancelling_at: int | None = None
    end: End | None = None

    @property
    def status(self) -> str:
        """OpenAI's word for where it stands."""
        if self.end is not None:
            return self.end.outcome
        if self.cancelling_at is not None:
            return "cancelling"
        if self.lease is None or self.lease.in_progress_at is None:
            return "validating"
        return "in_progress" if self.lease.finalizing_at is None else "finalizing"

    def as_json(self) -> dict[str, Any]:
        """OpenAI's object."""
        spec, end = self.spec, self.end
        lease = (end.lease if end else self.lease) or Lease()
        errors = {"object": "list", "data": msgspec.to_builtins(end.mistakes)} if end and end.mistakes else None
        return {
            "id": spec.id,
            "object": "batch",
            "endpoint": spec.endpoint,
            "errors": errors,
            "input_file_id": spec.input_file_id,
            "completion_window": WINDOW,
            "status": self.status,
            "output_file_id": lease.output_file_id if end else None,
            "error_file_id": lease.error_file_id if end else None,
            "created_at": spec.created_at,
            "in_progress_at": lease.in_progress_at,
            "expires_at": spec.expires_at,
            "finalizing_at": lease.finalizing_at,
            "completed_at": self._ended("completed"),
            "failed_at": self._ended("failed"),
            "expired_at": self._ended("expired"),
            "cancelling_at": self.cancelling_at,
            "cancelled_at": self._ended("cancelled"),
            "request_counts": {"total": lease.total, "completed": lease.completed, "failed": lease.failed},
            "metadata": spec.metadata,
        }

    def _ended(self, outcome: Outcome) -> int | None:
        return self.end.at if self.end is not None and self.end.outcome == outcome else None
