"""An engine's draft tokens after a step, drawn from its own logits as a coordinator draws from the combined ones.

With the same seed and position both draws use the same noise, so that they agree wherever the distributions do.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eft_serve.engine.batch import BatchRow
from eft_serve.engine.kv_cache import Sequence
from eft_serve.errors import InvalidRequestError
from eft_serve.grammars.matcher import GrammarMatcher
from eft_serve.numerics.bitmask import apply_bitmask
from eft_serve.numerics.sampling import sample
from eft_serve.types import Draft


@dataclass(slots=True, eq=False)
class DraftState:
    """One sequence's draft tokens so far."""

    sequence: Sequence
    draft: Draft
    matcher: GrammarMatcher | None = None  # at the first draft token; None: no grammar
    has_ended: bool = False  # its grammar allows no further draft token
    rows: list[Tensor] = field(default_factory=list)  # each [vocab_size], of the draft tokens that were computed
    token_ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)  # of each draft token

    @property
    def wants_more(self) -> bool:
        confidence = self.draft.confidence * prod(self.confidences)
        is_sure = confidence >= self.draft.min_confidence
        return not self.has_ended and len(self.token_ids) < self.draft.num_tokens and is_sure

    def narrow(self, row: Tensor) -> None:
        """Make impossible what its grammar does not allow, or end where it allows no token.

        Args:
            row: [num_ids] float32, changed in place.
        """
        if self.matcher is None:
            return
        try:
            apply_bitmask(self.matcher.allowed(), row)
        except InvalidRequestError:  # too complex here, as the coordinator will find and say
            self.has_ended = True
        self.has_ended |= not bool(row.isfinite().any())

    def take(self, token_id: int, confidence: float) -> None:
        """Add a draft token."""
        self.token_ids.append(token_id)
        self.confidences.append(confidence)
        if self.matcher is None:
            return
        try:
            self.matcher.advance([token_id])
            self.has_ended = self.matcher.is_finished
        except InvalidRequestError:
            self.has_ended = True

    def next_row(self) -> BatchRow:
        """The row that computes the newest draft token; its block is reserved."""
        return BatchRow(
            token_ids=self.token_ids[-1:],
            position=self.sequence.num_computed_tokens,
            block_ids=list(self.sequence.block_ids),
            num_logits=1,
            adapter=self.sequence.adapter,
        )


def draw_drafts(drafts: SequenceOf[DraftState], logits: Tensor) -> None:
    """Draw the next token of each whose grammar, if it has one, allows a token.

    Args:
        drafts: the sequences that draft.
        logits: [len(drafts), vocab_size], the newest row of each; finite.
    """
    num_ids = [each.draft.num_ids for each in drafts]
    for width in set(num_ids):
        places = [i for i, n in enumerate(num_ids) if n == width]
        rows = (logits if len(places) == len(drafts) else logits[places])[:, :width]
        _draw([drafts[i] for i in places], rows)


def _draw(drafts: SequenceOf[DraftState], rows: Tensor) -> None:
    """As `draw_drafts`, of rows that have no padding."""
    if any(each.matcher is not None for each in drafts):
        rows = rows.float().clone(memory_format=torch.contiguous_format)  # the models' logits are the coordinator's
        for each, row in zip(drafts, rows, strict=True):
            each.narrow(row)
        kept = [i for i, each in enumerate(drafts) if not each.has_ended]
        drafts, rows = [drafts[i] for i in kept], rows[kept]
    if not drafts:
        return
    positions = [each.draft.position + len(each.token_ids) for each in drafts]
    drawn = sample(rows, [each.draft.sampling for each in drafts], positions)
    for each, token_id, confidence in zip(drafts, drawn.tolist(), _probabilities(rows, drawn).tolist(), strict=True):
        each.take(token_id, confidence)


def _probabilities(logits: Tensor, token_ids: Tensor) -> NDArray[np.float32]:
    """[num_rows], each token's probability at temperature 1, whatever it was drawn at: how sure the model is of it."""
    rows = logits.float().numpy()  # a third of the time of torch's logsumexp
    with np.errstate(over="ignore"):  # a token far behind the others is practically impossible
        behind = np.exp(rows - rows[np.arange(len(rows)), token_ids.numpy()][:, None])
    sums: NDArray[np.float32] = behind.sum(axis=-1)
    return np.float32(1) / sums
