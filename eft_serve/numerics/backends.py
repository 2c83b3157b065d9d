"""Backends that combine and sample a batch of rows: compiled kernels on a CPU, torch operations on a GPU.

Both give the same bits and the same tokens. They know rows, and neither requests nor where logits come from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eft_serve.numerics import device_sampling
from eft_serve.numerics.bitmask import apply_bitmask
from eft_serve.numerics.combine import combine
from eft_serve.numerics.kernels import combining as kernels
from eft_serve.numerics.kernels.masking import set_bits
from eft_serve.numerics.logprobs import require_possible, top_logprobs
from eft_serve.numerics.rows import RequestRows, RowBatch
from eft_serve.numerics.sampling import sample_rows
from eft_serve.numerics.sampling_rows import SamplingRows
from eft_serve.numerics.truncate import truncate_weights
from eft_serve.types import SamplingParams

Errors = dict[int, str]  # by index of the request in its batch: why it cannot be sampled

CPU_TILE_ELEMENTS = 1 << 19  # logits that are combined, processed and sampled while they are in the cache
GPU_TILE_ELEMENTS = 1 << 26

_KINDS = {torch.float32: kernels.FLOAT32, torch.bfloat16: kernels.BFLOAT16, torch.float16: kernels.FLOAT16}
_FAULTS = {
    kernels.NOT_A_NUMBER: "logits: a term has NaN or +inf",
    kernels.OVERFLOW: "coefficients: the combination overflows float32; use smaller ones",
    kernels.NOTHING_POSSIBLE: "logits: no token is possible",
}


class SamplingBackend(Protocol):
    """Combines and samples rows; thread-safe."""

    tile_elements: int  # preferred number of logits at a time

    def combine(self, batch: RowBatch) -> tuple[Tensor, Errors]:
        """Combined logits, [num_rows, batch.vocab_size] float32, not normalised; undefined beyond a row's vocabulary.

        Rows of a request with an error hold 0.
        """
        ...

    def sample(self, batch: RowBatch, logits: Tensor) -> list[int]:
        """A token for each row of logits from `combine`."""
        ...


def choose_backend(device: Literal["auto", "cpu", "cuda"]) -> SamplingBackend:
    """`auto` is a GPU where this process has one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return CpuBackend()
    if not torch.cuda.is_available():
        raise ValueError("coordinator.device: no GPU is visible here; give the coordinator one with resources.num_gpus")
    return TorchBackend(torch.device("cuda"))


class CpuBackend:
    """Every logit is read once, in its own dtype."""

    tile_elements = CPU_TILE_ELEMENTS

    def __init__(self) -> None:
        self._compile()

    def _compile(self) -> None:
        """Compile before the first request: it takes seconds without cached code."""
        sampling = SamplingParams(top_p=0.9)
        rows = RequestRows(logits=[torch.zeros(1, 2)], coefficients=[1.0], num_rows=1, vocab_size=2, sampling=sampling)
        batch = RowBatch([rows])
        logits, _ = self.combine(batch)
        self.sample(batch, logits)
        top_logprobs(logits, 2, [0], num_top=1)
        bitmask = np.zeros(1, np.int32)
        set_bits(bitmask, np.zeros(1, np.int64), True)
        apply_bitmask(bitmask, logits[0])

    def combine(self, batch: RowBatch) -> tuple[Tensor, Errors]:
        addresses: list[int] = []
        kinds: list[int] = []
        coefficients: list[float] = []
        starts = [0]
        errors = _flaws(batch)
        for index, request in enumerate(batch.requests):
            terms = [] if index in errors else [_rows_of(term) for term in request.logits]
            for row in range(request.num_rows):
                addresses += [first + row * pitch for first, pitch, _ in terms]
                kinds += [kind for _, _, kind in terms]
                coefficients += request.coefficients[: len(terms)]
                starts.append(len(addresses))
        out = torch.empty(batch.num_rows, batch.vocab_size)
        status = np.empty((batch.num_rows, 2), np.int64)
        kernels.combine_rows(
            np.array(addresses, np.int64),
            np.array(kinds, np.int8),
            np.array(coefficients, np.float32),
            np.array(starts, np.int64),
            _widths(batch),
            out.numpy(),
            status,
        )
        errors |= _truncate(batch, out, errors)
        if status[:, 0].any():
            errors = self._faults(batch, status, starts) | errors
        return _without(batch, out, errors), errors

    def sample(self, batch: RowBatch, logits: Tensor) -> list[int]:
        token_ids: list[int] = sample_rows(logits, _widths(batch), _sampling_rows(batch)).tolist()
        return token_ids

    @staticmethod
    def _faults(batch: RowBatch, status: NDArray[np.int64], starts: Sequence[int]) -> Errors:
        errors: Errors = {}
        for index, (request, rows) in enumerate(batch):
            bad = np.flatnonzero(status[rows, 0])
            if len(bad) and request.truncation is None:
                row = rows.start + int(bad[0])
                fault, term = status[row]
                where = f" (term {term - starts[row]}, row {bad[0]})" if fault == kernels.NOT_A_NUMBER else ""
                errors[index] = _FAULTS[int(fault)] + where
        return errors


class TorchBackend:
    """Logits are copied to the device once, through pinned memory, and combined there.

    Args:
        device: any of torch's.
    """

    tile_elements = GPU_TILE_ELEMENTS

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def combine(self, batch: RowBatch) -> tuple[Tensor, Errors]:
        out = torch.full((batch.num_rows, batch.vocab_size), -torch.inf, device=self._device)
        errors = _flaws(batch)
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)  # rows that one operation can take
        for index, request in enumerate(batch.requests):
            if request.truncation is None and index not in errors:
                groups[request.vocab_size, *(term.dtype for term in request.logits)].append(index)
        for indices in groups.values():
            self._combine_group(batch, indices, out, errors)
        errors |= _truncate(batch, out, errors)
        return _without(batch, out, errors), errors

    def sample(self, batch: RowBatch, logits: Tensor) -> list[int]:
        token_ids: list[int] = device_sampling.sample_rows(logits, _widths(batch), _sampling_rows(batch)).tolist()
        return token_ids

    def _combine_group(self, batch: RowBatch, indices: Sequence[int], out: Tensor, errors: Errors) -> None:
        """Combine requests with the same dtypes and vocabulary; if one is at fault, each request by itself."""
        requests = [batch.requests[index] for index in indices]
        rows = [row for index in indices for row in range(batch.starts[index], batch.starts[index + 1])]
        coefficients = torch.tensor([r.coefficients for r in requests for _ in range(r.num_rows)]).T
        terms = [
            self._moved([r.logits[term][: r.num_rows, : r.vocab_size] for r in requests])
            for term in range(len(requests[0].logits))
        ]
        try:
            out[rows, : requests[0].vocab_size] = combine(terms, coefficients)
        except ValueError as error:
            if len(indices) == 1:
                errors[indices[0]] = str(error)
                return
            for index in indices:
                self._combine_group(batch, [index], out, errors)

    def _moved(self, blocks: Sequence[Tensor]) -> Tensor:
        """Concatenated on the device, in their own dtype."""
        if self._device.type != "cuda":
            return torch.cat([*blocks])
        shape = (sum(len(block) for block in blocks), blocks[0].shape[1])
        staging = torch.empty(shape, dtype=blocks[0].dtype, pin_memory=True)
        torch.cat([*blocks], out=staging)
        return staging.to(self._device, non_blocking=True)


def _rows_of(term: Tensor) -> tuple[int, int, int]:
    """Address of the first row, row stride in bytes, and kind of dtype."""
    return term.data_ptr(), term.stride(0) * term.dtype.itemsize, _KINDS[term.dtype]


def _flaws(batch: RowBatch) -> Errors:
    """Requests with malformed terms. The kernels read raw addresses, so this is the only check."""
    errors: Errors = {}
    for index, request in enumerate(batch.requests):
        for place, term in enumerate(request.logits):
            is_readable = term.dim() == 2 and term.stride(1) == 1 and term.device.type == "cpu" and term.dtype in _KINDS
            if not is_readable or len(term) < request.num_rows or term.shape[1] < request.vocab_size:
                wanted = f"at least [{request.num_rows}, {request.vocab_size}], each row in one piece"
                errors[index] = f"logits: term {place} is {term.dtype} of shape {list(term.shape)}; want {wanted}"
        if len(request.logits) != len(request.coefficients) or not request.logits:
            errors[index] = f"logits: {len(request.logits)} terms for {len(request.coefficients)} coefficients"
    return errors


def _truncate(batch: RowBatch, out: Tensor, flawed: Errors) -> Errors:
    """Combine the requests whose weights are truncated, into their rows."""
    errors: Errors = {}
    for index, (request, rows) in enumerate(batch):
        if request.truncation is not None and index not in flawed:
            truncation, n = request.truncation, request.num_rows
            try:
                combined = truncate_weights(
                    [term[:n, : request.vocab_size].to(out.device) for term in request.logits],
                    torch.tensor([truncation.unscaled] * n).T,
                    torch.tensor([truncation.ratio] * n).T,
                    torch.full((n,), truncation.top_p, device=out.device),
                )
                require_possible(combined)  # both parts may have possible tokens, but none in common
                out[rows, : request.vocab_size] = combined
            except ValueError as error:
                errors[index] = str(error)
    return errors


def _without(batch: RowBatch, out: Tensor, errors: Errors) -> Tensor:
    """`out` with the rows of requests with an error set to 0."""
    for index in errors:
        out[batch.starts[index] : batch.starts[index + 1]] = 0
    return out


def _widths(batch: RowBatch) -> NDArray[np.int64]:
    return np.array([request.vocab_size for request in batch.requests for _ in range(request.num_rows)], np.int64)


def _sampling_rows(batch: RowBatch) -> SamplingRows:
    rows = [(r.sampling, position) for r in batch.requests for position in r.positions]
    return SamplingRows.of([params for params, _ in rows], [position for _, position in rows])
