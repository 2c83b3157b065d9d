"""What the parts of a recipe say of each token, as JSON objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eft_serve.api.prompts import PromptRenderer
from eft_serve.types import Combination, TokenComponents


@dataclass(frozen=True, slots=True)
class ComponentsFormat:
    """Formats the components of one combination's tokens."""

    terms: tuple[str, ...]
    rewards: tuple[str, ...]  # by fine-tuning; a plain model has none
    decode_token: Callable[[int], str]
    num_top: int

    @classmethod
    def of(cls, combination: Combination, renderer: PromptRenderer, num_alternatives: int) -> ComponentsFormat:
        return cls(
            terms=tuple(term.name for term in combination.terms),
            rewards=tuple(reward.name for reward in combination.rewards),
            decode_token=renderer.token_decoder(combination.counted.model),
            num_top=num_alternatives,
        )

    def token(self, token: TokenComponents) -> dict[str, Any]:
        """One token with its alternatives."""
        shown = self._alone(token)
        return shown | {"top": [self._alone(other) for other in token.top[: self.num_top]]} if self.num_top else shown

    def total(self, tokens: Sequence[TokenComponents]) -> dict[str, Any]:
        """Sums over all tokens of an output."""
        by_term = zip(*(token.models for token in tokens), strict=True)
        return {
            "logprob": sum(token.logprob for token in tokens),
            "models": dict(zip(self.terms, map(sum, by_term), strict=True)),
            "reward": self._reward(sum(token.reward for token in tokens)),
            "num_tokens": len(tokens),
        }

    def _alone(self, token: TokenComponents) -> dict[str, Any]:
        return {
            "token_id": token.token_id,
            "token": self.decode_token(token.token_id),
            "logprob": token.logprob,
            "models": dict(zip(self.terms, token.models, strict=True)),
            "rewards": dict(zip(self.rewards, token.rewards, strict=True)),
            "reward": self._reward(token.reward),
        }

    def _reward(self, reward: float) -> float | None:
        return reward if self.rewards else None
