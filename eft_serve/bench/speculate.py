"""`eft-serve bench speculate`: what speculative decoding gains, on real small models and on the paper's latencies.

Real coordinator, transport and engines, each model in a process of its own. Sides take turns request by request (or
batch by batch), and a side's speed-up is the median of its ratios to plain decoding of the same prompts. All sides must
emit the same tokens; the benchmark fails when one did not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eft_serve.bench import report, simulated
from eft_serve.bench.fanout import Letters
from eft_serve.bench.local_stack import LocalStack
from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.config import ZOO_CHECKPOINTS, ModelConfig
from eft_serve.coordinator.request import Request
from eft_serve.engine.engine import Engine
from eft_serve.types import (
    Combination,
    GenerationRequest,
    ModelInfo,
    SamplingParams,
    SpecDecodeStats,
    Speculative,
    Term,
)
from eft_serve.zoo.questions import long_prompts

BLOCKS = (1, 2, 4, 8, 16)
PAPER = {"plain": 6.0, "2": 9.2, "4": 12.5, "8": 13.8, "16": 12.1}  # tokens/s, Llama-2-70B + 7B-chat on HH
PLAIN = "plain"


def build_zoo(name: str) -> tuple[Engine, ModelInfo]:
    """A model of the embedded family, for a process of its own."""
    engine = Engine.load(name, ModelConfig(path=f"zoo:{name}", kv_cache_tokens=16384))
    return engine, engine.info


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
    """

    def __init__(
        self, stack: LocalStack, combination: Combination, prompts: Sequence[list[int]], max_tokens: int
    ) -> None:
        self.stack = stack
        self.combination = combination
        self.prompts = prompts
        self.max_tokens = max_tokens
        self._count = 0

    def measure(
        self,
        sides: Sequence[Variant],
        batch: int,
        temperature: float = 0.0,
        *,
        num_batches: int | None = None,
        ignore_eos: bool = False,
    ) -> dict[str, Outcome]:
        """Every side on so many batches of prompts, or as many as there are, in turn.

        Raises:
            RuntimeError: sides gave different tokens.
        """
        outcomes = {side.name: Outcome([], 0, SpecDecodeStats()) for side in sides}
        batches = [self.prompts[i : i + batch] for i in range(0, len(self.prompts) - batch + 1, batch)][:num_batches]
        for number, prompts in enumerate([batches[0], *batches]):  # the first one warms up
            said = set()
            for side in sides:
                requests = [self._request(prompt, side, temperature, ignore_eos) for prompt in prompts]
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

    def _request(self, prompt: list[int], side: Variant, temperature: float, ignore_eos: bool) -> Request:
        self._count += 1
        generation = GenerationRequest(
            request_id=f"bench-{self._count}",
            combination=self.combination,
            prompts={term.name: prompt for term in self.combination.terms},
            sampling=SamplingParams(
                temperature=temperature, seed=len(prompt), max_tokens=self.max_tokens, ignore_eos=ignore_eos
            ),
            speculative=side.speculative,
        )
        return Request.create(generation, time.monotonic())


EFT = Combination(
    (
        Term("base-large", "base-large", 1.0),
        Term("base-small", "base-small", -1.0),
        Term("tuned-small", "tuned-small", 1.0, weight=1.0),
    )
)
SIMULATED = Combination(
    (Term("base", "base", 1.0), Term("reference", "reference", -1.0), Term("tuned", "tuned", 1.0, weight=1.0))
)


def zoo_stage(num_prompts: int, max_tokens: int) -> Stage:
    """The embedded family, asked for long answers."""
    vocabularies = {term.model: Vocabulary.load(ZOO_CHECKPOINTS / term.model) for term in EFT.terms}
    stack = LocalStack({term.model: (build_zoo, (term.model,)) for term in EFT.terms}, vocabularies)
    tokenizer = vocabularies["base-large"].tokenizer
    prompts = [tokenizer.encode(f"User: {q.text}\nAssistant:") for q in long_prompts(num_prompts)]
    return Stage(stack, EFT, prompts, max_tokens)


def simulated_stage(latencies_s: Sequence[float], acceptance: float, num_prompts: int, max_tokens: int) -> Stage:
    """Models that sleep."""
    roles = dict(zip(("base", "tuned", "reference"), latencies_s, strict=True))
    builds = {role: (simulated.build, (role, seconds, acceptance)) for role, seconds in roles.items()}
    stack = LocalStack(builds, dict.fromkeys(roles, Letters(simulated.VOCAB_SIZE)))
    return Stage(stack, SIMULATED, [[i + 1] * (i + 2) for i in range(num_prompts)], max_tokens)


def measure_zoo(stage: Stage) -> dict[str, Any]:
    """Part (a): one request at a time, greedy and drawn, by block length."""
    result: dict[str, Any] = {}
    for name, temperature in (("greedy", 0.0), ("t1", 1.0)):
        sides = [Variant(PLAIN, None), *(Variant.of(k) for k in BLOCKS)]
        sides.append(Variant("8, sure or not", Speculative(num_tokens=8, min_confidence=0.0)))
        sides.append(Variant("8, no overlap", Speculative(num_tokens=8, overlap=False)))
        outcomes = stage.measure(sides, batch=1, temperature=temperature)
        result[name] = _show(f"The embedded family, one request at a time, {name}", outcomes)
    return result


def measure_simulated(stage: Stage, latencies_ms: Sequence[float], acceptance: float) -> dict[str, Any]:
    """Part (b): the paper's latencies, beside the paper's figures."""
    sides = [Variant(PLAIN, None)]
    sides += [
        Variant(f"{side.name}{'' if overlap else ', no overlap'}", side.speculative)
        for overlap in (False, True)
        for side in (Variant.of(k, overlap=overlap) for k in ((3, 4, 8) if overlap else (4, 5, 8)))
    ]
    outcomes = stage.measure(sides, batch=1, ignore_eos=True)
    shown = _show(f"Models of {', '.join(f'{ms:g}' for ms in latencies_ms)} ms that agree {acceptance:.0%}", outcomes)
    best = {
        overlap: max(o.tokens_per_s for name, o in outcomes.items() if name != PLAIN and ("no" in name) != overlap)
        for overlap in (False, True)
    }
    return {
        "tokens_per_s": round(best[False], 2),
        "tokens_per_s_overlap": round(best[True], 2),
        "sides": shown["sides"],
        "paper": PAPER,
    }


def measure_batched(stage: Stage, batches: Sequence[int]) -> dict[str, Any]:
    """Part (c): the default, 8 at a time while the drafter is confident, against plain, by batch size."""
    ratios: dict[str, float] = {}
    rows = []
    for batch in batches:
        outcomes = stage.measure(
            [Variant(PLAIN, None), Variant("drafted", Speculative())], batch, num_batches=max(3, 8 // batch)
        )
        drafted, plain = outcomes["drafted"], outcomes[PLAIN]
        ratios[str(batch)] = round(drafted.speedup(plain), 3)
        per_pass = drafted.tokens / drafted.report.num_passes
        rows.append(
            [batch, f"{plain.tokens_per_s:.0f}", f"{drafted.tokens_per_s:.0f}", ratios[str(batch)], f"{per_pass:.2f}"]
        )
    report.show(
        "The embedded family, 8 draft tokens at a time against plain",
        ["batch", "plain tokens/s", "drafted tokens/s", "ratio, median", "tokens a base pass"],
        rows,
    )
    return {"ratio": ratios, "min_ratio": min(ratios.values())}


def _show(title: str, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    plain = outcomes[PLAIN]
    sides = {
        name: {
            "tokens_per_s": round(o.tokens_per_s, 2),
            "speedup": round(o.speedup(plain), 3),
            "acceptance": round(o.report.num_accepted / max(1, o.report.num_drafted), 3),
            "tokens_per_pass": round(o.tokens / o.report.num_passes, 3),
        }
        for name, o in outcomes.items()
    }
    columns = ["tokens_per_s", "speedup", "acceptance", "tokens_per_pass"]
    report.show(
        title,
        ["block", "tokens/s", "speed-up", "accepted", "tokens a base pass"],
        [[name, *(side[column] for column in columns)] for name, side in sides.items()],
    )
    best = max((name for name in sides if name != PLAIN), key=lambda name: sides[name]["speedup"])
    return {"speedup": sides[best]["speedup"], "best": best, "sides": sides}


def run(
    parts: Sequence[str], latencies_ms: Sequence[float], acceptance: float, prompts: int, batches: Sequence[int]
) -> None:
    """The parts asked for, of zoo, simulated and batched; the last line as JSON."""
    result: dict[str, Any] = {}
    if "zoo" in parts:
        stage = zoo_stage(prompts, max_tokens=80)
        result["zoo"] = _closing(stage, lambda: measure_zoo(stage))
    if "simulated" in parts:
        slow = simulated_stage([ms / 1e3 for ms in latencies_ms], acceptance, num_prompts=2, max_tokens=60)
        result["simulated"] = _closing(slow, lambda: measure_simulated(slow, latencies_ms, acceptance))
    if "batched" in parts:
        wide = zoo_stage(4 * max(batches), max_tokens=80)
        result["batched"] = _closing(wide, lambda: measure_batched(wide, batches))
    report.finish(result)


def _closing(stage: Stage, work: Any) -> dict[str, Any]:
    try:
        measured: dict[str, Any] = work()
        return measured
    finally:
        stage.stack.close()
