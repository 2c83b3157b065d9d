"""Loads the model of a directory, complete or not at all; knows nothing of DeepSpeed, caches or sequences.

The only module of the package that imports torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from eft_serve.errors import CheckpointError

_LOADING = Lock()  # transformers patches its classes while it loads; two concurrent loads leave them patched


def read_config(path: Path) -> PretrainedConfig:
    """The directory's `config.json`.

    Raises:
        CheckpointError: the directory or the file is missing or broken, or its model type is unknown.
    """
    if not path.is_dir():
        raise CheckpointError(f"path: {path} is not a directory; give a transformers model directory or zoo:NAME")
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"path: {path} has no config.json; save the model there with save_pretrained")
    try:
        data = json.loads(config_file.read_text())
        model_type = data["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"path: {config_file} is not a transformers configuration: {error!r}") from error
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"path: {config_file}: model type {model_type!r} cannot be read by this transformers version: {error}"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(f"path: {config_file}: model type {model_type!r} has no causal language model to serve")
    return config


def load_model(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model on the CPU in `dtype`, for inference.

    Raises:
        CheckpointError: weights are corrupt, of the wrong shape, missing, or not part of the model.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with _LOADING:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:
        raise CheckpointError(
            f"path: the weights of {path} cannot be loaded, copy or save the checkpoint again: {error}"
        ) from error
    model: PreTrainedModel
    model, info = loaded
    _check_loaded(path, info)
    return model


def _check_loaded(path: Path, info: dict[str, Any]) -> None:
    problems = {
        kind: sorted(str(key) for key in info.get(f"{kind}_keys", ()) or ()) for kind in ("missing", "unexpected")
    }
    problems["mismatched"] = sorted(str(key) for key in info.get("mismatched_keys", ()) or ())
    found = [f"{len(keys)} {kind} ({', '.join(keys[:3])} ...)" for kind, keys in problems.items() if keys]
    if found:
        raise CheckpointError(
            f"path: the weights of {path} are not those that its config.json describes: {'; '.join(found)}; save both "
            "from one model"
        )
