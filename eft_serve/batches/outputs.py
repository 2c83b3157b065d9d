"""The output and the error file of a batch, made of its answers. Every method blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator

from eft_serve.batches.answers import AnswerLog
from eft_serve.batches.files import OUTPUT, Files
from eft_serve.batches.input import read_lines
from eft_serve.batches.lines import failure
from eft_serve.batches.records import Lease, Outcome, Spec

UNANSWERED: dict[Outcome, tuple[str, str]] = {  # OpenAI's codes
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request had an answer"),
    "expired": ("batch_expired", "the batch's completion window ended before this request had an answer"),
}


class Outputs:
    """The files of one batch."""

    def __init__(self, files: Files, log: AnswerLog, spec: Spec) -> None:
        self._files = files
        self._log = log
        self._spec = spec

    def write(self, lease: Lease, parts: list[str], outcome: Outcome) -> None:
        """Write those whose ids the lease has, out of these parts."""
        spec = self._spec
        if lease.output_file_id is not None:
            succeeded = (each.text + b"\n" for each in self._log.read(parts) if each.succeeded)
            self._files.add(spec.tenant, OUTPUT, f"{spec.id}_output.jsonl", succeeded, lease.output_file_id)
        if lease.error_file_id is not None:
            errors = self._errors(lease.total, parts, outcome)
            self._files.add(spec.tenant, OUTPUT, f"{spec.id}_error.jsonl", errors, lease.error_file_id)

    def drop(self, lease: Lease) -> None:
        """Delete what a process with this lease may have written."""
        for file_id in (lease.output_file_id, lease.error_file_id):
            if file_id is not None:
                self._files.discard(self._spec.tenant, file_id)

    def _errors(self, total: int, parts: list[str], outcome: Outcome) -> Iterator[bytes]:
        done = set()
        for each in self._log.read(parts):
            done.add(each.number)
            if not each.succeeded:
                yield each.text + b"\n"
        if outcome not in UNANSWERED or total == len(done):
            return
        code, message = UNANSWERED[outcome]
        stored = self._files.get(self._spec.tenant, self._spec.input_file_id)
        for line in read_lines(self._files.read(self._spec.tenant, stored)):
            if line.number not in done:
                yield json.dumps(failure(line, code, message)).encode() + b"\n"
