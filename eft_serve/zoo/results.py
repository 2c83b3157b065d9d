"""The results file: what was trained, measured and shipped. Knows its shape; does not measure.

`training` and `checkpoints` go by model; `evaluation` and `precision` by family.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS_FILE = Path(__file__).parent / "data" / "results.json"


def load_results(path: Path = RESULTS_FILE) -> dict[str, Any]:
    """The file's sections, none when it is not there yet."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return results


def update_results(section: str, entries: dict[str, Any], path: Path = RESULTS_FILE) -> None:
    """Replaces these entries of one section and keeps everything else."""
    results = load_results(path)
    results[section] = results.get(section, {}) | entries
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe_checkpoints(directory: Path, names: Iterable[str]) -> dict[str, dict[str, object]]:
    """Size of each directory and digest of its weights."""
    described: dict[str, dict[str, object]] = {}
    for name in names:
        path = directory / name
        digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
        described[name] = {"bytes": sum(f.stat().st_size for f in path.iterdir()), "weights_sha256": digest}
    return described
