"""Compiles grammars of clients in a process of its own first, where they may take too long or exhaust the stack.

Neither can be interrupted within a process: some grammars of a few lines never end, and deep ones kill it.
"""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import threading
from resource import RLIMIT_AS, RLIMIT_CORE, setrlimit
from selectors import EVENT_READ, DefaultSelector
from threading import Lock

from llguidance import LLMatcher, LLTokenizer

from eft_serve.errors import EngineError, InvalidRequestError
from eft_serve.grammars.matcher import limits_of
from eft_serve.types import Grammar

MAX_SECONDS = 1.0  # of computing, for one grammar
MAX_WAIT_S = 30.0  # for an answer; a process that is starved or stopped does not compute
MAX_START_S = 60
STACK_BYTES = 4 * 2**20  # half of what threads have where the grammar is compiled then
MAX_BYTES = 4 * 2**30  # of addresses, most of which are libraries and never memory
_OK = b"ok\n"


class GrammarTrial:
    """The process, started when it is needed; thread-safe."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def check(self, grammar: Grammar) -> None:
        """Compile it; what is wrong with it is said where it is compiled again.

        Raises:
            InvalidRequestError: that takes too long, or more stack or memory than there is.
            EngineError: the process does not start.
        """
        with self._lock:
            if not self._survives(self._started(), grammar):
                self._stop()
                message = f"{grammar.param}: cannot be used: it is too complex to be compiled; simplify it"
                raise InvalidRequestError(message, param=grammar.param)

    def close(self) -> None:
        """End the process; it also ends with this one."""
        with self._lock:
            self._stop()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            command = [sys.executable, "-m", __name__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if not _says_ok(self._process, MAX_START_S):
                self._stop()
                raise EngineError("the process that tries grammars does not start; see the log")
        return self._process

    @staticmethod
    def _survives(process: subprocess.Popen[bytes], grammar: Grammar) -> bool:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([grammar.definition, grammar.of_schemas]).encode() + b"\n")
            process.stdin.flush()
            return _says_ok(process, MAX_WAIT_S)
        except OSError:
            return False

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes the pipes and waits
                pass
            self._process = None


def _says_ok(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it answers within this time."""
    assert process.stdout is not None
    with DefaultSelector() as selector:
        selector.register(process.stdout, EVENT_READ)
        return bool(selector.select(seconds)) and process.stdout.readline() == _OK


TRIAL = GrammarTrial()  # of this process
atexit.register(TRIAL.close)


def _serve() -> None:
    """Compile what comes, each within its time or not at all: then the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(MAX_START_S)
    setrlimit(RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    setrlimit(RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    tokenizer = LLTokenizer("byte")  # grammars take their time whatever the tokens are
    signal.alarm(0)
    _answer()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        definition, of_schemas = json.loads(line)
        thread = threading.Thread(target=_compile, args=(tokenizer, Grammar(definition, "", of_schemas)))
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer()


def _compile(tokenizer: LLTokenizer, grammar: Grammar) -> None:
    compiled = LLMatcher(tokenizer, grammar.definition, log_level=0, limits=limits_of(grammar))
    if not compiled.is_error():
        compiled.deep_copy().compute_bitmask()


def _answer() -> None:
    sys.stdout.buffer.write(_OK)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
