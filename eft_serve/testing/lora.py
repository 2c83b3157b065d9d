"""Writes adapters as `peft` saves them, and merges one into a model.

It shares no code with what it checks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eft_serve.testing import naive

CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.05, "inference_mode": True}


@torch.no_grad()
def write_random_lora(
    directory: Path,
    checkpoint: Path,
    targets: Collection[str],
    *,
    rank: int = 4,
    seed: int = 0,
    strength: float = 0.5,
    **fields: Any,
) -> Path:
    """Write random matrices A and B for every module whose name ends in one of `targets`.

    Args:
        directory: to be created.
        checkpoint: the model to adapt.
        targets: suffixes of module names.
        rank: of every update.
        seed: of the random matrices.
        strength: standard deviation of an update over that of its matrix.
        fields: configuration fields to add or replace.
    """
    random = torch.Generator().manual_seed(seed)
    config = CONFIG | {"r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(targets)} | fields
    tensors: dict[str, Tensor] = {}
    for name, module in naive.load(checkpoint).named_modules():
        if name.rpartition(".")[2] in targets:
            weight = _weight(module)
            outputs, inputs = weight.shape
            size = strength * float(weight.std()) * math.sqrt(inputs / rank) / _scaling(config)
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=random) / math.sqrt(inputs)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=random) * size
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@torch.no_grad()
def merge(checkpoint: Path, adapter: Path) -> PreTrainedModel:
    """The model with `W + scaling · B A` for its matrices W, in float32 on the CPU."""
    model = naive.load(checkpoint)
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            _weight(module).add_(update, alpha=_scaling(config))
    return model


def _weight(module: nn.Module) -> Tensor:
    """[num_outputs, num_inputs], a view of the module's matrix."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight


def _scaling(config: dict[str, Any]) -> float:
    rank: int = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))
