"""What answers show of their prompts: OpenAI's `echo` and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eft_serve.api.logprobs import JsonObject, finite_logprob, possible_top
from eft_serve.types import TokenComponents


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPrompt:
    """One prompt of a request."""

    token_ids: Sequence[int]
    text: str | None  # that the answer begins with; None: no echo
    num_top: int | None  # `prompt_logprobs`; None: not asked for
    bytes_of: Callable[[int], bytes]

    def logprobs(self, tokens: Sequence[TokenComponents]) -> list[JsonObject | None]:
        """vLLM's `prompt_logprobs`: for each token, itself and the most likely ones by their ids; null for the first.

        Args:
            tokens: all but the first.
        """
        return [None, *map(self._alternatives, tokens)]

    def _alternatives(self, token: TokenComponents) -> JsonObject:
        top = possible_top(token, self.num_top)
        ranked = [(token, token.rank), *((other, rank) for rank, other in enumerate(top, start=1))]
        return {
            str(each.token_id): {
                "logprob": finite_logprob(each),
                "rank": rank,
                "decoded_token": self.bytes_of(each.token_id).decode(errors="replace"),
            }
            for each, rank in ranked
        }
