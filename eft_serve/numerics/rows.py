"""The batch that goes through the sampling pipeline: rows of logits, request by request.

A row is one position of one request: every term's logits of the next token there. This module knows how rows belong
together and how each is to be sampled. It does not know how they are combined or sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from eft_serve.types import SamplingParams


class LogitsProcessor(Protocol):
    """Changes a request's logits before sampling: a bias, a penalty, a mask. Made once for a request."""

    def __call__(self, output_token_ids: Sequence[int], draft_token_ids: Sequence[int], logits: Tensor) -> None:
        """Change the logits in place.

        Args:
            output_token_ids: before the first row; what an earlier call had is their beginning.
            draft_token_ids: row i follows the output and the first i of them.
            logits: [num_rows, vocab_size] float32, combined, not normalised; −inf is impossible.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Confines the up-scaling ratio to a nucleus, see `truncate.truncate_weights`."""

    top_p: float
    unscaled: Sequence[float]  # of each term, its coefficient outside the nucleus
    ratio: Sequence[float]  # of each term, the rest of its coefficient, inside the nucleus


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRows:
    """One request's rows, for successive positions; each, except possibly the last, has a draft token to verify."""

    logits: Sequence[Tensor]  # of each term, [at least num_rows, at least vocab_size], floating
    coefficients: Sequence[float]  # of each term
    num_rows: int
    vocab_size: int  # tokens that all terms have; the rest of a row is padding
    sampling: SamplingParams
    output_token_ids: Sequence[int] = ()  # before the first row
    draft_token_ids: Sequence[int] = ()  # of the rows, in their order; at most one per row
    forced_token_ids: Sequence[int] | None = None  # one for each row; None: they are sampled
    truncation: Truncation | None = None
    processors: Sequence[LogitsProcessor] = ()

    @property
    def positions(self) -> range:
        """Of each row's token within the output."""
        start = len(self.output_token_ids)
        return range(start, start + self.num_rows)


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows of several requests, one request after the other; the pipeline's unit of work."""

    requests: Sequence[RequestRows]
    starts: Sequence[int] = field(init=False)  # first row of each request, and the number of rows at the end

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", list(accumulate((r.num_rows for r in self.requests), initial=0)))

    @property
    def num_rows(self) -> int:
        return self.starts[-1]

    @property
    def vocab_size(self) -> int:
        """The largest vocabulary of any request."""
        return max(request.vocab_size for request in self.requests)

    def __iter__(self) -> Iterator[tuple[RequestRows, slice]]:
        """Every request, and the range of its rows."""
        for request, start in zip(self.requests, self.starts, strict=False):
            yield request, slice(start, start + request.num_rows)


def tiles(requests: Sequence[RequestRows], max_elements: int) -> Iterator[range]:
    """Split a batch, between requests, into ranges of at most this many logits, or of one request."""
    first = num_rows = width = 0
    for index, request in enumerate(requests):
        width_now = max(width, request.vocab_size)
        if index > first and (num_rows + request.num_rows) * width_now > max_elements:
            yield range(first, index)
            first, num_rows, width_now = index, 0, request.vocab_size
        num_rows, width = num_rows + request.num_rows, width_now
    if requests:
        yield range(first, len(requests))
