"""A combination that is decoded in several ways in turn: by what a side's draft tokens gain, never by other tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from eft_serve.bench.local_stack import LocalStack
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.structured_output import GrammarCompiler
from eft_serve.types import Combination, GenerationRequest, Grammar, SamplingParams, SpecDecodeStats, Speculative


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of decoding."""

    name: str
    speculative: Speculative | None

    @classmethod
    def of(cls, num_tokens: int, **settings: Any) -> Variant:
        return cls(str(num_tokens), Speculative(num_tokens=num_tokens, **settings))


@dataclass(slots=True)
class Outcome:
    """One side's share of a measurement."""

    seconds: list[float]
    tokens: int
    report: SpecDecodeStats

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / sum(self.seconds)

    def speedup(self, plain: Outcome) -> float:
        return statistics.median(a / b for a, b in zip(plain.seconds, self.seconds, strict=True))


class Stage:
    """A combination, and prompts for it.

    Args:
        stack: started engines.
        combination: what a request runs.
        prompts: token ids, the same for every model.
        max_tokens: of one answer.
        grammars: compiles those of `measure`.
    """

    def __init__(
        self,
        stack: LocalStack,
        combination: Combination,
        prompts: Sequence[list[int]],
        max_tokens: int,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.stack = stack
        self.combination = combination
        self.prompts = prompts
        self.max_tokens = max_tokens
        self._grammars = grammars
        self._count = 0

    def measure(
        self,
        sides: Sequence[Variant],
        batch: int,
        temperature: float = 0.0,
        *,
        num_batches: int | None = None,
        ignore_eos: bool = False,
        grammar: Grammar | None = None,
    ) -> dict[str, Outcome]:
        """Every side on so many batches of prompts, or as many as there are, in turn.

        Raises:
            RuntimeError: sides gave different tokens.
        """
        outcomes = {side.name: Outcome([], 0, SpecDecodeStats()) for side in sides}
        sampling = SamplingParams(
            temperature=temperature, max_tokens=self.max_tokens, ignore_eos=ignore_eos, grammar=grammar
        )
        batches = [self.prompts[i : i + batch] for i in range(0, len(self.prompts) - batch + 1, batch)][:num_batches]
        for number, prompts in enumerate([batches[0], *batches]):  # the first one warms up
            said = set()
            for side in sides:
                requests = [self._request(prompt, side, sampling) for prompt in prompts]
                seconds = self.stack.run(requests)
                tokens = [self.stack.tokens.pop(request.request_id) for request in requests]
                said.add(repr(tokens))
                if number:
                    outcome = outcomes[side.name]
                    outcome.seconds.append(seconds)
                    outcome.tokens += sum(map(len, tokens))
                    outcome.report = sum((r.speculation.stats for r in requests), outcome.report)
            if len(said) > 1:
                raise RuntimeError("sides that must give the same tokens gave different ones")
        return outcomes

    def _request(self, prompt: list[int], side: Variant, sampling: SamplingParams) -> Request:
        self._count += 1
        generation = GenerationRequest(
            request_id=f"bench-{self._count}",
            combination=self.combination,
            prompts={term.name: prompt for term in self.combination.terms},
            sampling=structs.replace(sampling, seed=len(prompt)),
            speculative=side.speculative,
        )
        request = Request.create(generation, time.monotonic())
        return request if self._grammars is None else self._grammars.matched(request)
