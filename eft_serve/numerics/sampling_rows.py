"""How each row of a batch is sampled, as arrays; knows no logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eft_serve.numerics.keyed_noise import row_keys, to_int64
from eft_serve.types import SamplingParams

_LEAST_TEMPERATURE = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each row is sampled; every array is [num_rows]."""

    temperature: NDArray[np.float32]  # 0 is greedy, the lowest id on ties
    top_k: NDArray[np.int64]  # 0 keeps all
    top_p: NDArray[np.float32]  # 1 keeps all; the most likely token always stays
    log_min_p: NDArray[np.float32]  # −inf keeps all
    keys: NDArray[np.uint64]  # of the noise, made of seed and position

    @classmethod
    def of(cls, params: Sequence[SamplingParams], positions: Sequence[int]) -> SamplingRows:
        """From each row's parameters and its token's position in the output."""
        temperature = np.array([p.temperature for p in params], np.float32)
        with np.errstate(divide="ignore"):
            log_min_p = np.log(np.array([p.min_p for p in params], np.float32))
        return cls(
            temperature=np.where(temperature > 0, np.maximum(temperature, _LEAST_TEMPERATURE), 0).astype(np.float32),
            top_k=np.array([p.top_k for p in params], np.int64),
            top_p=np.array([p.top_p for p in params], np.float32),
            log_min_p=log_min_p,
            keys=row_keys(np.array([to_int64(p.seed) for p in params]), np.array(positions, np.int64)),
        )

    def __len__(self) -> int:
        return len(self.temperature)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> SamplingRows:
        """Some rows."""
        return SamplingRows(*(getattr(self, name)[rows] for name in self.__slots__))
