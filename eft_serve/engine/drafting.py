"""An engine's draft tokens after a step, drawn from its own logits as a coordinator draws from the combined ones.

With the same seed and position both draws use the same noise, so that they agree wherever the distributions do.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eft_serve.engine.batch import BatchRow
from eft_serve.engine.kv_cache import Sequence
from eft_serve.numerics.sampling import sample
from eft_serve.types import Draft


@dataclass(slots=True, eq=False)
class DraftState:
    """One sequence's draft tokens so far."""

    sequence: Sequence
    draft: Draft
    rows: list[Tensor] = field(default_factory=list)  # each [vocab_size], of the draft tokens that were computed
    token_ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)  # of each draft token

    @property
    def wants_more(self) -> bool:
        confidence = self.draft.confidence * prod(self.confidences)
        return len(self.token_ids) < self.draft.num_tokens and confidence >= self.draft.min_confidence

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
    """Draw the next token of each.

    Args:
        drafts: the sequences that draft.
        logits: [len(drafts), vocab_size], the newest row of each; finite.
    """
    num_ids = [each.draft.num_ids for each in drafts]
    for width in set(num_ids):
        places = [i for i, n in enumerate(num_ids) if n == width]
        rows = (logits if len(places) == len(drafts) else logits[places])[:, :width]
        group = [drafts[i] for i in places]
        positions = [each.draft.position + len(each.token_ids) for each in group]
        drawn = sample(rows, [each.draft.sampling for each in group], positions)
        for each, token_id, confidence in zip(group, drawn.tolist(), _probabilities(rows, drawn).tolist(), strict=True):
            each.token_ids.append(token_id)
            each.confidences.append(confidence)


def _probabilities(logits: Tensor, token_ids: Tensor) -> NDArray[np.float32]:
    """[num_rows], each token's probability at temperature 1, whatever it was drawn at: how sure the model is of it."""
    rows = logits.float().numpy()  # a third of the time of torch's logsumexp
    with np.errstate(over="ignore"):  # a token far behind the others is practically impossible
        behind = np.exp(rows - rows[np.arange(len(rows)), token_ids.numpy()][:, None])
    sums: NDArray[np.float32] = behind.sum(axis=-1)
    return np.float32(1) / sums
