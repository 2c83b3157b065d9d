"""The weights of a model directory: tensor names, shapes and files. Loads no tensors."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from eft_serve.checkpoints.json_file import BrokenFileError, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a complete safetensors file, by name.

    Raises:
        BrokenFileError: it is truncated or corrupt.
    """
    try:
        with safe_open(path, framework="numpy") as file:  # it opens only files that match their header to the byte
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping
    except (OSError, SafetensorError) as error:
        raise BrokenFileError(f"{path} is truncated or corrupt: {error}") from error


def checkpoint_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a checkpoint, by name.

    Raises:
        BrokenFileError: a file is missing, truncated or corrupt.
    """
    if (directory / SINGLE).is_file():
        return tensor_shapes(directory / SINGLE)
    shards = sorted(set(weight_map(directory).values()))
    return {name: shape for shard in shards for name, shape in tensor_shapes(directory / shard).items()}


def weight_map(directory: Path) -> dict[str, str]:
    """Tensor → file of a checkpoint of several files.

    Raises:
        BrokenFileError: the index cannot be read, or has no map of tensors to files.
    """
    found = read_json(directory / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise BrokenFileError(f"{directory / INDEX} has no weight_map of tensors to files")
    return found
