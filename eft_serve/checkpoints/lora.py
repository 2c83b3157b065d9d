"""A PEFT directory with a LoRA (arXiv 2106.09685): its configuration, and whether it fits a model. Loads no tensors.

Settings that change the computation and are not supported are refused, and so are unknown fields.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eft_serve.checkpoints.json_file import BrokenFileError, read_json
from eft_serve.checkpoints.weights import tensor_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REPAIR = "save the adapter again with save_pretrained"
# Initialisations that leave the model's matrices unchanged; others, such as pissa, change them.
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "fan_in_fan_out", "base_model_name_or_path"}
PARTIAL = {"layers_to_transform", "layers_pattern", "exclude_modules"}
# About training or files, or without effect unless another field is set that is refused.
HARMLESS = {"auto_mapping", "task_type", "inference_mode", "revision", "lora_dropout", "peft_version", "eva_config"} | {
    "megatron_core",
    "qalora_group_size",
}
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter's configuration and tensor shapes."""

    rank: int
    scaling: float
    targets: str | list[str]  # a regular expression for module names, or suffixes of names
    is_partial: bool  # not all modules that `targets` names are changed
    is_transposed: bool  # the model stores its matrices as [num_inputs, num_outputs]
    base: str | None  # the model that it was trained on, as named in training
    shapes: Mapping[str, tuple[int, ...]]  # by tensor

    @property
    def modules(self) -> list[str]:
        """The modules whose matrices it changes."""
        return sorted({match[1] for name in self.shapes if (match := _TENSOR.fullmatch(name))})

    def wants(self, module: str) -> bool:
        """Whether the configuration selects a module of this name."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.targets)


def tensor_name(module: str, side: Literal["A", "B"]) -> str:
    """The tensor name of a module's matrix A or B."""
    return f"base_model.model.{module}.lora_{side}.weight"


def read_lora(directory: Path) -> Lora:
    """Read the configuration and the header of the weights.

    Raises:
        BrokenFileError: a file is missing or broken, or a setting is not supported; every mistake is named.
    """
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise BrokenFileError(f"{directory} has no {name}; {REPAIR}")
    config = read_json(directory / CONFIG)
    if mistakes := list(_mistakes(config)):
        raise BrokenFileError(f"{directory / CONFIG}: {'; '.join(mistakes)}")
    rank, alpha = config["r"], config["lora_alpha"]
    return Lora(
        rank=rank,
        scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        targets=config.get("target_modules") or [],
        is_partial=any(config.get(field) for field in PARTIAL),
        is_transposed=bool(config.get("fan_in_fan_out")),
        base=config.get("base_model_name_or_path"),
        shapes=tensor_shapes(directory / WEIGHTS),
    )


def _mistakes(config: dict[str, Any]) -> Iterator[str]:
    """Why this configuration is not supported; empty if it is."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}, and only LORA is supported"
        return
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        yield f"r is {config.get('r')!r}, not a rank"
    if not isinstance(config.get("lora_alpha"), int | float) or not math.isfinite(config["lora_alpha"]):
        yield f"lora_alpha is {config.get('lora_alpha')!r}, not a number"
    targets = config.get("target_modules") or []
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        yield f"target_modules is {targets!r}, not names or a regular expression"
    if isinstance(targets, str) and not _compiles(targets):
        yield f"target_modules is {targets!r}, not a regular expression"
    if config.get("bias", "none") != "none":
        yield f"bias is {config['bias']!r}, and only none is supported"
    beginning = config.get("init_lora_weights")
    if beginning not in PLAIN_BEGINNINGS:
        yield f"init_lora_weights is {beginning!r}, which changes the model's own weights; convert it when saving"
    known = READ | PARTIAL | HARMLESS | {"bias", "init_lora_weights"}
    for field in sorted(config.keys() - known):
        if config[field]:
            yield f"{field} is {config[field]!r}, which is not computed"


def _compiles(expression: str) -> bool:
    try:
        re.compile(expression)
    except (re.error, RecursionError):
        return False
    return True


def misfits(lora: Lora, matrices: Mapping[str, tuple[int, int]]) -> list[str]:
    """Why an adapter does not fit a model; empty when it does.

    Args:
        lora: the adapter.
        matrices: (num_inputs, num_outputs) by module, of all that may be adapted.
    """
    mistakes = [f"{name} is no matrix of a LoRA" for name in sorted(lora.shapes) if not _TENSOR.fullmatch(name)]
    modules = lora.modules
    if not modules:
        mistakes.append("there are no matrices in it")
    wanted = set() if lora.is_partial else {module for module in matrices if lora.wants(module)}
    for module in sorted(wanted.union(modules)):
        if module not in matrices:
            mistakes.append(f"{module} is no matrix in a layer of the model")
            continue
        inputs, outputs = matrices[module]
        for name, fits in (
            (tensor_name(module, "A"), (lora.rank, inputs)),
            (tensor_name(module, "B"), (outputs, lora.rank)),
        ):
            if name not in lora.shapes:
                mistakes.append(f"{name} is missing")
            elif lora.shapes[name] != fits:
                mistakes.append(f"{name} is {list(lora.shapes[name])} where {list(fits)} fits")
    return mistakes


def summary(mistakes: list[str], shown: int = 3) -> str:
    """The first few, and how many there are."""
    return "; ".join(mistakes[:shown]) + (f"; and {len(mistakes) - shown} more" if len(mistakes) > shown else "")
