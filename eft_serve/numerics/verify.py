"""Which draft tokens are accepted: those that plain decoding would have drawn (Gumbel coupling by keyed noise)."""

from __future__ import annotations

from collections.abc import Sequence

from eft_serve.numerics.rows import RequestRows


def verify(request: RequestRows, drawn: Sequence[int]) -> list[int]:
    """The request's next tokens: draft tokens are accepted while they equal the model's own keyed draws.

    The first that is rejected, or the row without a draft token, gives the model's own. So what is taken is what plain
    decoding draws, whoever drafted and however well.

    Args:
        request: what was drafted.
        drawn: the model's draw of each row.
    """
    if request.forced_token_ids is not None:
        return list(request.forced_token_ids[: request.num_rows])
    num_accepted = 0
    for own, drafted in zip(drawn, request.draft_token_ids, strict=False):
        if own != drafted:
            break
        num_accepted += 1
    return list(drawn[: min(num_accepted + 1, request.num_rows)])
