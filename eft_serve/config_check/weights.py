"""Checks a model's weights: files that are missing, broken, or without their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from eft_serve.checkpoints.json_file import BrokenFileError
from eft_serve.checkpoints.weights import INDEX, SINGLE, tensor_shapes, weight_map
from eft_serve.config_check.problem import Problem

PICKLED = "pytorch_model*.bin"


def weight_problems(where: str, directory: Path) -> Iterator[Problem]:
    """Why tensors of a checkpoint are missing; empty if none is."""
    whole = [directory / SINGLE, directory / INDEX]
    if not any(path.is_file() for path in whole) and any(directory.glob(PICKLED)):
        message = f"{directory} has pickled weights, which only loading can check; save them as safetensors"
        yield Problem(f"{where}.path", message, "warning")
        return
    for mistake in _mistakes(directory):
        yield Problem(f"{where}.path", f"{mistake}; copy or save the checkpoint again")


def _mistakes(directory: Path) -> Iterator[str]:
    if (directory / SINGLE).is_file():
        yield from _shard_mistakes(directory / SINGLE, set())
        return
    if not (directory / INDEX).is_file():
        yield f"{directory} has neither {SINGLE} nor {INDEX}"
        return
    try:
        files = weight_map(directory)
    except BrokenFileError as error:
        yield str(error)
        return
    for shard in sorted(set(files.values())):
        yield from _shard_mistakes(directory / shard, {tensor for tensor, file in files.items() if file == shard})


def _shard_mistakes(path: Path, wanted: set[str]) -> Iterator[str]:
    if not path.is_file():
        yield f"{path} is missing, and {INDEX} names it"
        return
    try:
        if lacking := wanted - tensor_shapes(path).keys():
            yield f"{path} lacks {len(lacking)} tensors of {INDEX}, such as {min(lacking)}"
    except BrokenFileError as error:
        yield str(error)
