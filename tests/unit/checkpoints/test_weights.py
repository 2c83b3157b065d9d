"""The header of a safetensors file: shapes of every dtype, and what cannot be right."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft_serve.checkpoints.json_file import BrokenFileError
from eft_serve.checkpoints.weights import SINGLE, tensor_shapes


def write(path: Path, header: Any, num_bytes: int = 8) -> Path:
    """A file with this header and so many bytes of tensors."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("F32", [2, 1]), ("BF16", [4]), ("F8_E4M3", [8]), ("F8_E8M0", [2, 4]), ("I64", []), ("F4", [16])],
)
def test_shapes_are_read_of_dtypes_that_numpy_lacks_too(tmp_path: Path, dtype: str, shape: list[int]) -> None:
    header = {"__metadata__": {"format": "pt"}, "a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}}
    assert tensor_shapes(write(tmp_path / SINGLE, header)) == {"a": tuple(shape)}


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},  # half of the tensor
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},  # a gap
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "U8", "shape": [0]}},
        {"a": 1},
        [],
    ],
)
def test_a_header_that_contradicts_itself_or_the_file(tmp_path: Path, header: Any) -> None:
    with pytest.raises(BrokenFileError, match=SINGLE):
        tensor_shapes(write(tmp_path / SINGLE, header))


@given(st.binary(max_size=64))
def test_no_bytes_break_the_reader_itself(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(data)
    with suppress(BrokenFileError):
        assert tensor_shapes(file) == {}
