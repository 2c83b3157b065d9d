"""A request that outlives its coordinator: what its reader has been given, and what the next coordinator is asked.

Draws are keyed by seed and position, so another coordinator goes on with the very tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from eft_serve.errors import CoordinatorLostError, from_failure
from eft_serve.types import Delta, GenerationRequest, Resumption

MAX_FRUITLESS = 3  # coordinators that a request loses without a token from any: it may be what ends them


@dataclass(slots=True)
class Migration:
    """One request on its way from coordinator to coordinator.

    Args:
        request: as it came; it arrived now.
    """

    request: GenerationRequest
    num_lost: int = 0  # coordinators
    _arrival: float = field(default_factory=time.monotonic)
    _token_ids: list[int] = field(default_factory=list)
    _num_characters: int = 0
    _num_prompt_logprobs: int = 0
    _num_fruitless: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the reader was told of."""
        return self._num_prompt_logprobs + len(self._token_ids)

    def current(self) -> GenerationRequest:
        """What to ask of the next coordinator: to begin, or to go on from here in the time that is left."""
        if not self.num_lost:
            return self.request
        return msgspec.structs.replace(
            self.request,
            # The engines may still hold sequences of the one before.
            request_id=f"{self.request.request_id}.{self.num_lost}",
            resumption=Resumption(
                token_ids=list(self._token_ids),
                num_characters=self._num_characters,
                num_prompt_logprobs=self._num_prompt_logprobs,
            ),
            timeout_s=max(0.0, self.request.timeout_s - (time.monotonic() - self._arrival)),
        )

    def take(self, delta: Delta) -> None:
        """The reader gets this; raises `CoordinatorLostError` if it says that the coordinator stops."""
        if delta.failure is not None and delta.failure.kind == CoordinatorLostError.__name__:
            raise from_failure(delta.failure)
        self._token_ids += delta.token_ids
        self._num_characters += len(delta.text)
        self._num_prompt_logprobs += len(delta.prompt_logprobs)
        if delta.num_tokens:
            self._num_fruitless = 0

    def lose(self, error: CoordinatorLostError) -> None:
        """The coordinator is gone; raises the error when the request is not worth another one."""
        self.num_lost += 1
        self._num_fruitless += 1
        if self._num_fruitless >= MAX_FRUITLESS or time.monotonic() - self._arrival >= self.request.timeout_s:
            raise error
