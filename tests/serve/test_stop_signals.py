"""What stops a cluster on this machine: the first signal, and it is not interrupted by the next."""

from __future__ import annotations

import subprocess
import sys

from harness import ROOT

SCRIPT = """
import os, signal
from eft_serve.rayserve.environment import prepare
prepare()
from eft_serve.rayserve.local import _unwind_on_signals
_unwind_on_signals()
try:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
except KeyboardInterrupt:
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    print("stopped to the end")
"""


def test_a_second_signal_does_not_interrupt_the_stop() -> None:
    stopped = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (stopped.returncode, stopped.stdout.strip()) == (0, "stopped to the end"), stopped.stderr
