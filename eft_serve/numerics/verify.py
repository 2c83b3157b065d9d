"""Accepts the draft tokens that plain decoding would have sampled (Gumbel coupling by keyed noise)."""

from __future__ import annotations

from collections.abc import Sequence

from eft_serve.numerics.rows import RequestRows


def verify(request: RequestRows, drawn: Sequence[int]) -> list[int]:
    """The request's next tokens: draft tokens are accepted while they equal the model's own keyed draws.

    The first rejected draft token is replaced by the model's own draw; the row without a draft token adds one. So the
    output is that of plain decoding, whatever was drafted.

    Args:
        request: the rows with their draft tokens.
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
