"""The next tokens of each request whose models have all answered: combine, draw, and see which guesses stand.

Given tokens are taken as they are.
Blocks are grouped by what their rows have in common, and each group is combined and sampled in one pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from eft_serve.coordinator.combining import combine_rows
from eft_serve.coordinator.components import Block, components_of
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.speculation import NGRAM
from eft_serve.errors import EftServeError, EngineError
from eft_serve.numerics.sampling import SamplingRows, greedy, sample
from eft_serve.numerics.speculative import take_classic, take_keyed
from eft_serve.types import TokenComponents

Timed = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A request's next tokens, at least one, and their components where they are wanted."""

    token_ids: list[int]
    components: list[TokenComponents] | None = None


def draw(requests: Sequence[Request], timed: Timed) -> list[Drawn | EftServeError]:
    """The next tokens of each request; an error for one whose distribution does not exist.

    Args:
        requests: those that are ready: their sequences' rows follow the output and each guess that all have computed.
        timed: gives a context manager that times the phase of that name.
    """
    groups: dict[_Kind, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        groups[_Kind.of(request)].append(index)
    drawn: dict[int, Drawn | EftServeError] = {}
    for indices in groups.values():
        drawn |= zip(indices, _draw_group([requests[index] for index in indices], timed), strict=True)
    return [drawn[index] for index in range(len(requests))]


@dataclass(frozen=True, slots=True)
class _Kind:
    """Blocks of one kind go through one pass."""

    num_terms: int
    num_ids: int
    is_given: bool
    is_classic: bool
    drafting_term: int | None  # index of the term that the guesses were drawn from; None: they were not drawn

    @classmethod
    def of(cls, request: Request) -> _Kind:
        is_classic = request.speculation.settings.method == "classic" and bool(request.guesses)
        drafter = request.speculation.drafter
        drafting_term = None
        if is_classic and drafter not in (None, NGRAM):
            drafting_term = next(i for i, term in enumerate(request.terms) if term.name == drafter)
        return cls(len(request.terms), request.num_ids, request.is_given, is_classic, drafting_term)


def num_rows(request: Request) -> int:
    """Rows that all its models have: those that can be combined."""
    return min(sequence.num_rows for sequence in request.sequences)


def tested(request: Request) -> list[int]:
    """Its guesses for the positions that can be combined."""
    return request.guesses[: num_rows(request)] if request.guesses else []


def _draw_group(requests: Sequence[Request], timed: Timed) -> Sequence[Drawn | EftServeError]:
    try:
        return _combine_and_sample(requests, timed)
    except ValueError as error:
        if len(requests) == 1:
            return [EngineError(f"request {requests[0].request_id}: {error}")]
        return [_draw_group([request], timed)[0] for request in requests]  # only the one at fault may fail


def _combine_and_sample(requests: Sequence[Request], timed: Timed) -> list[Drawn]:
    lengths = [num_rows(request) for request in requests]
    with timed("combine"):
        terms = [
            _stacked(
                [_rows(request, term, n) for request, n in zip(requests, lengths, strict=True)], requests[0].num_ids
            )
            for term in range(len(requests[0].terms))
        ]
        owners = [request for request, n in zip(requests, lengths, strict=True) for _ in range(n)]
        combined = combine_rows(terms, [r.terms for r in owners], [r.truncate_top_p for r in owners])
    with timed("sample"):
        taken = _take(requests, terms, combined, lengths)
    drawn = [Drawn(token_ids) for token_ids in taken]
    starts = accumulate(lengths, initial=0)
    blocks = {
        index: Block(request, start, token_ids)
        for index, (request, start, token_ids) in enumerate(zip(requests, starts, taken, strict=False))
        if request.generation.components is not None
    }
    if blocks:
        with timed("components"):
            for index, components in zip(blocks, components_of(list(blocks.values()), terms, combined), strict=True):
                drawn[index] = Drawn(taken[index], components)
    return drawn


def _take(
    requests: Sequence[Request], terms: Sequence[Tensor], combined: Tensor, lengths: Sequence[int]
) -> list[list[int]]:
    """The tokens of requests of one kind, of which each has so many rows."""
    kind = _Kind.of(requests[0])
    if kind.is_given:
        return [request.next_given(length) for request, length in zip(requests, lengths, strict=True)]
    guesses = [tested(request) for request in requests]
    if kind.is_classic:
        guess_logits = None if kind.drafting_term is None else terms[kind.drafting_term]
        return take_classic(combined, guess_logits, _sampling_rows(requests, lengths), guesses, lengths)
    is_random = any(request.generation.sampling.temperature for request in requests)
    own = (sample(combined, _sampling_rows(requests, lengths)) if is_random else greedy(combined)).tolist()
    return take_keyed(own, guesses, lengths)


def _rows(request: Request, term: int, count: int) -> Tensor:
    rows = request.sequences[term].rows
    assert rows is not None
    return rows if rows.shape[0] == count else rows[:count]


def _stacked(blocks: Sequence[Tensor], num_ids: int) -> Tensor:
    """All rows, [num_rows, num_ids]; a view where they stand evenly in one buffer, as in a replica's answer."""
    first = blocks[0]
    starts = offsets = [int(block.storage_offset()) for block in blocks]
    if any(block.shape[0] > 1 for block in blocks):
        starts = [start + i * b.stride(0) for start, b in zip(offsets, blocks, strict=True) for i in range(b.shape[0])]
    distance = starts[1] - starts[0] if len(starts) > 1 else first.shape[1]
    evenly = distance > 0 and starts == list(range(starts[0], starts[0] + len(starts) * distance, distance))
    if evenly and first.stride(1) == 1 and len(set(map(_buffer, blocks, offsets))) == 1:
        return first.as_strided((len(starts), num_ids), (distance, 1))
    return torch.cat([block[:, :num_ids] for block in blocks])


def _buffer(block: Tensor, offset: int) -> tuple[int, torch.dtype, int]:
    """Where the buffer begins that it is a part of, and how its rows lie there."""
    return block.data_ptr() - offset * block.dtype.itemsize, block.dtype, block.stride(1)


def _sampling_rows(requests: Sequence[Request], lengths: Sequence[int]) -> SamplingRows:
    rows = [
        (p.temperature, p.top_p, p.min_p, p.top_k, p.seed, len(request.output_token_ids) + i)
        for request, length in zip(requests, lengths, strict=True)
        for p in [request.generation.sampling]
        for i in range(length)
    ]
    return SamplingRows.of(rows)
