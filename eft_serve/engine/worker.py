"""A tensor-parallel rank other than the first: does what the leader says until the leader is gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from eft_serve.engine.worker_group import UNANSWERED
from eft_serve.errors import EftServeError, EngineError, to_failure


def _leave(directory: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)  # a killed leader could not
    os._exit(0)  # a broken group's destructors may wait for peers


def _leave_with_leader(lifeline: int, directory: str) -> None:
    """A collective may never return once the leader is dead, so a thread of its own watches the pipe."""

    def watch() -> None:
        os.read(lifeline, 1)
        _leave(directory)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def run_worker(connection: Connection) -> None:
    """Run commands until the leader closes the connection; a failure is reported and ends the process."""
    try:
        config, rank = connection.recv()
        from eft_serve.engine.model_runner import ModelRunner

        runner = ModelRunner(config, rank)
        while True:
            method, args = connection.recv()
            answer = getattr(runner, method)(*args)
            if method != UNANSWERED:
                connection.send(answer if isinstance(answer, int) else None)  # logits are the leader's own
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        known = error if isinstance(error, EftServeError) else EngineError(traceback.format_exc())
        with contextlib.suppress(OSError):  # the leader may have failed first, for the same reason
            connection.send(to_failure(known))


if __name__ == "__main__":
    _leave_with_leader(int(sys.argv[2]), sys.argv[3])
    run_worker(Connection(int(sys.argv[1])))
    _leave(sys.argv[3])
