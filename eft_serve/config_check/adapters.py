"""Checks an adapter: its files, and whether they fit the model that it adapts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from eft_serve.checkpoints.json_file import BrokenFileError
from eft_serve.checkpoints.lora import Lora, misfits, read_lora, summary
from eft_serve.checkpoints.weights import checkpoint_shapes
from eft_serve.config import AdapterConfig, AppConfig
from eft_serve.config_check.problem import Problem

OUTPUT_HEADS = ("lm_head", "embed_out")


def adapter_problems(config: AppConfig) -> Iterator[Problem]:
    """Every problem with the adapters; a model's own broken files are reported elsewhere."""
    for name, adapter in config.models.items():
        if isinstance(adapter, AdapterConfig):
            yield from _problems(f"models.{name}", adapter, config)


def _problems(where: str, adapter: AdapterConfig, config: AppConfig) -> Iterator[Problem]:
    model = config.deployments[adapter.model]
    if model.tensor_parallel > 1:
        message = (
            f"{adapter.model} has tensor_parallel: {model.tensor_parallel}, and adapters are not split; set it to 1"
        )
        yield Problem(f"{where}.model", message)
    if not adapter.directory.is_dir():
        yield Problem(f"{where}.adapter", f"{adapter.directory} is not a directory; copy the adapter there")
        return
    try:
        lora = read_lora(adapter.directory)
    except BrokenFileError as error:
        yield Problem(f"{where}.adapter", str(error))
        return
    try:
        matrices = _matrices(model.checkpoint, lora)
    except BrokenFileError:
        return
    mistakes = misfits(lora, matrices)
    if mistakes:
        message = f"{adapter.directory} does not fit {adapter.model} ({model.checkpoint}): {summary(mistakes)}"
        yield Problem(f"{where}.adapter", f"{message}; name the model that it was trained on")
    elif lora.base and Path(lora.base).name != model.checkpoint.name:
        message = (
            f"it was trained on {lora.base}, and {adapter.model} is {model.checkpoint}; check that they are the same"
        )
        yield Problem(f"{where}.adapter", message, "warning")


def _matrices(checkpoint: Path, lora: Lora) -> dict[str, tuple[int, int]]:
    """(num_inputs, num_outputs) by module; embeddings are included, but no adapter has tensors for them."""
    found: dict[str, tuple[int, int]] = {}
    for name, shape in checkpoint_shapes(checkpoint).items():
        module = name.removesuffix(".weight")
        if module != name and len(shape) == 2 and module not in OUTPUT_HEADS:
            found[module] = (shape[0], shape[1]) if lora.is_transposed else (shape[1], shape[0])
    if not found.keys() & set(
        lora.modules
    ):  # a file may leave out the common prefix of all names, such as `transformer`
        prefixes = {module.partition(".")[0] for module in lora.modules}
        found = {f"{prefix}.{module}": sizes for prefix in prefixes for module, sizes in found.items()}
    return found
