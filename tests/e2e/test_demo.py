"""The main job as a user runs it: the paper's claim, through the whole stack, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 240  # on a busy machine; 90 on a quiet one


def test_the_demo_shows_emulated_fine_tuning_and_leaves_nothing() -> None:
    shm_before = set(os.listdir("/dev/shm"))
    before = {p.pid for p in psutil.process_iter()}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-m", "eft_serve.cli", "demo"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓" in done.stdout
    summary = json.loads(done.stdout.splitlines()[-1])
    facts, form = summary["accuracy"], summary["format_rate"]
    gap = facts["tuned-large"] - facts["tuned-small"]
    assert summary["num_questions"] >= 200
    assert facts["eft"] - facts["tuned-small"] >= 0.30
    assert (facts["eft"] - facts["tuned-small"]) / gap >= 0.80
    assert form["eft"] >= 0.95
    assert form["base-large"] < 0.20
    assert {"fan_out", "combine", "sample", "base-large", "base-small", "tuned-small"} <= summary["step_ms_p50"].keys()
    left = [p for p in psutil.process_iter() if p.pid not in before and "ray" in " ".join(p.cmdline())]
    assert left == []
    assert set(os.listdir("/dev/shm")) <= shm_before
