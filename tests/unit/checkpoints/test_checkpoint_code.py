"""Python files that come with a checkpoint are never run, whatever a prompt for consent would be answered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eft_serve.api.model_tokenizer import ModelTokenizer
from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.config import ZOO_CHECKPOINTS
from eft_serve.errors import CheckpointError


@pytest.mark.parametrize("load", [ModelTokenizer.load, Vocabulary.load], ids=["api", "coordinator"])
def test_a_tokenizer_that_brings_its_own_code_is_refused_and_the_code_not_run(
    load: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, trace = tmp_path / "checkpoint", tmp_path / "was-run"
    shutil.copytree(ZOO_CHECKPOINTS / "base-small", checkpoint)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    (checkpoint / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Own: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks, unless it is told
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(CheckpointError, match="custom code"):
        load(checkpoint)
    assert not trace.exists()
