"""One token for each request whose models have all answered: combine, then draw.

Rows are grouped by their number of terms and vocabulary, and each group is combined and sampled in one pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from eft_serve.coordinator.request import Request
from eft_serve.errors import EftServeError, EngineError
from eft_serve.numerics.combine import combine
from eft_serve.numerics.sampling import SamplingRows, greedy, sample

Timed = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Row:
    """A request and its models' next-token logits, in the order of its terms."""

    request: Request
    terms: Sequence[Tensor]  # each [vocab_size of that model], floating
    num_tokens: int  # the vocabulary that the models share; what follows is padding


def draw(rows: Sequence[Row], timed: Timed) -> list[int | EftServeError]:
    """Token ids in the order of the rows; an error for a row whose distribution does not exist.

    Args:
        rows: the requests that are ready.
        timed: gives a context manager that times the phase of that name.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[len(row.terms), row.num_tokens].append(index)
    drawn: dict[int, int | EftServeError] = {}
    for indices in groups.values():
        drawn |= zip(indices, _draw_group([rows[index] for index in indices], timed), strict=True)
    return [drawn[index] for index in range(len(rows))]


def _draw_group(rows: Sequence[Row], timed: Timed) -> Sequence[int | EftServeError]:
    try:
        return _combine_and_sample(rows, timed)
    except ValueError as error:
        if len(rows) == 1:
            return [EngineError(f"request {rows[0].request.request_id}: {error}")]
        return [_draw_group([row], timed)[0] for row in rows]  # only the row at fault may fail


def _combine_and_sample(rows: Sequence[Row], timed: Timed) -> list[int]:
    num_tokens = rows[0].num_tokens
    with timed("combine"):
        logits = [_stacked([row.terms[term] for row in rows], num_tokens) for term in range(len(rows[0].terms))]
        coefficients = torch.tensor([[term.coefficient for term in row.request.terms] for row in rows]).T
        combined = combine(logits, coefficients)
    with timed("sample"):
        is_random = any(row.request.generation.sampling.temperature for row in rows)
        token_ids: list[int] = (sample(combined, _sampling_rows(rows)) if is_random else greedy(combined)).tolist()
    return token_ids


def _stacked(rows: Sequence[Tensor], num_tokens: int) -> Tensor:
    """[len(rows), num_tokens]; a view where the rows stand evenly in one buffer, as in a replica's answer."""
    first = rows[0]
    starts = [row.storage_offset() for row in rows]
    distance = starts[1] - starts[0] if len(rows) > 1 else first.numel()
    evenly = starts == [starts[0] + index * distance for index in range(len(rows))]
    if evenly and distance > 0 and all(_are_alike(first, row) for row in rows):
        return first.as_strided((len(rows), num_tokens), (distance, 1))
    return torch.stack([row[:num_tokens] for row in rows])


def _are_alike(first: Tensor, other: Tensor) -> bool:
    """Parts of one buffer, each of them without gaps."""
    one, two = first.untyped_storage(), other.untyped_storage()
    return one.data_ptr() == two.data_ptr() and first.dtype == other.dtype and other.stride() == (1,)


def _sampling_rows(rows: Sequence[Row]) -> SamplingRows:
    params = [row.request.generation.sampling for row in rows]
    return SamplingRows(
        temperature=torch.tensor([p.temperature for p in params]),
        top_k=torch.tensor([p.top_k for p in params]),
        top_p=torch.tensor([p.top_p for p in params]),
        min_p=torch.tensor([p.min_p for p in params]),
        seed=torch.tensor([p.seed for p in params]),
        position=torch.tensor([len(row.request.output_token_ids) for row in rows]),
    )
