"""A real Ray job against the live application."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness import ROOT, Served


def test_a_submitted_job_answers_every_line_and_resumes(served: Served, tmp_path: Path) -> None:
    lines = [
        {
            "custom_id": f"line-{index}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "eft",
                "messages": [{"role": "user", "content": f"What is the atomic number of element {index}?"}],
                "max_tokens": 8,
                "temperature": 0,
            },
        }
        for index in range(12)
    ]
    lines[5]["body"] = {"model": "nobody", "messages": [{"role": "user", "content": "?"}]}
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    submit(served, source, target)
    answers = {answer["custom_id"]: answer for answer in map(json.loads, target.read_text().splitlines())}
    assert answers.keys() == {line["custom_id"] for line in lines}
    assert answers["line-5"]["response"]["status_code"] == 404
    texts = [a["response"]["body"]["choices"][0]["message"]["content"] for i, a in answers.items() if i != "line-5"]
    assert len(texts) == 11
    kept = target.read_text().splitlines()[:7]
    target.write_text("".join(line + "\n" for line in kept))
    submit(served, source, target)
    resumed = target.read_text().splitlines()
    assert resumed[:7] == kept
    assert len(resumed) == 12


def submit(served: Served, source: Path, target: Path) -> None:
    """As docs/jobs.md says, with the key in the job's environment."""
    environment = {"env_vars": {"EFT_SERVE_API_KEY": served.keys["tests"], "EFT_SERVE_URL": served.url}}
    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", served.dashboard_url),
        *("--working-dir", str(ROOT), "--runtime-env-json", json.dumps(environment)),
        *("--", "python", "-m", "eft_serve.jobs.batch", "--input", str(source), "--output", str(target)),
    ]
    done = subprocess.run(command, env=served.environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
