"""The files of a checkpoint: JSON that parses, weights that are whole, token → id maps. Loads no weights.

safetensors layout (huggingface/safetensors): eight bytes of header length, little endian; the header, JSON; the
tensors' bytes without gaps, so that the last offset is the file's end.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class BrokenFileError(Exception):
    """A file that cannot be used; the message names it and why."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BrokenFileError: it cannot be read, or is no JSON object.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise BrokenFileError(f"{path} holds no JSON object")
    return data


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file that is whole, by name.

    Raises:
        BrokenFileError: it is truncated or corrupt.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise BrokenFileError(f"{path} is truncated or corrupt: a header of {length} bytes in {size}")
            header = json.loads(file.read(length))
        tensors = {name: _extent(tensor) for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise BrokenFileError(f"{path} is truncated or corrupt: {error!r}") from error
    end = 0
    for start, stop in sorted(tensors.values()):
        if start != end:
            raise BrokenFileError(f"{path} is corrupt: a gap or overlap at byte {start} of its tensors")
        end = stop
    if 8 + length + end != size:
        raise BrokenFileError(f"{path} is truncated or corrupt: {size} bytes, its header tells of {8 + length + end}")
    return {name: tuple(header[name]["shape"]) for name in tensors}


def _extent(tensor: dict[str, Any]) -> tuple[int, int]:
    start, stop = tensor["data_offsets"]
    bits = DTYPE_BITS.get(tensor["dtype"])
    if bits is not None and math.prod(tensor["shape"]) * bits != (stop - start) * 8:
        raise ValueError(f"{stop - start} bytes for {tensor['shape']} of {tensor['dtype']}")
    return int(start), int(stop)


def checkpoint_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The same of all tensors of a checkpoint.

    Raises:
        BrokenFileError: a file is missing, truncated or corrupt.
    """
    if (directory / SINGLE).is_file():
        return tensor_shapes(directory / SINGLE)
    shards = sorted(set(_weight_map(directory).values()))
    return {name: shape for shard in shards for name, shape in tensor_shapes(directory / shard).items()}


def weight_mistakes(directory: Path) -> Iterator[str]:
    """Why the tensors of a checkpoint are not all there; nothing when they are."""
    if (directory / SINGLE).is_file():
        yield from _shard_mistakes(directory / SINGLE, set())
        return
    if not (directory / INDEX).is_file():
        yield f"{directory} has neither {SINGLE} nor {INDEX}"
        return
    try:
        weight_map = _weight_map(directory)
    except BrokenFileError as error:
        yield str(error)
        return
    for shard in sorted(set(weight_map.values())):
        yield from _shard_mistakes(directory / shard, {tensor for tensor, file in weight_map.items() if file == shard})


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor → file of a checkpoint of several files."""
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise BrokenFileError(f"{directory / INDEX} has no weight_map of tensors to files")
    return weight_map


def _shard_mistakes(path: Path, wanted: set[str]) -> Iterator[str]:
    if not path.is_file():
        yield f"{path} is missing, and {INDEX} names it"
        return
    try:
        if lacking := wanted - tensor_shapes(path).keys():
            yield f"{path} lacks {len(lacking)} tensors of {INDEX}, such as {min(lacking)}"
    except BrokenFileError as error:
        yield str(error)


def token_ids(tokenizer: Path) -> dict[str, int]:
    """Token → id of a `tokenizer.json`, added tokens included.

    Raises:
        BrokenFileError: it cannot be read, or its kind is not known.
    """
    data = read_json(tokenizer)
    try:
        vocab = data["model"]["vocab"]
        # Unigram lists [token, score] pairs in the order of the ids; the others map tokens to ids.
        ids = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        ids |= {added["content"]: added["id"] for added in data.get("added_tokens", ())}
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenFileError(f"{tokenizer} has no vocabulary: {error!r}") from error
    if not ids or not all(isinstance(token_id, int) for token_id in ids.values()):
        raise BrokenFileError(f"{tokenizer} has no vocabulary of tokens with whole numbers as ids")
    return ids
