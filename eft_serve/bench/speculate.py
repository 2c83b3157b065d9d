"""`eft-serve bench speculate`: what speculative decoding gains, on real small models and on the paper's latencies.

Real coordinator, transport and engines, each model in a process of its own. Sides take turns request by request (or
batch by batch), and a side's speed-up is the median of its ratios to plain decoding of the same prompts. All sides must
emit the same tokens; the benchmark fails when one did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eft_serve.bench import documents, report, simulated
from eft_serve.bench.local_stack import LocalStack
from eft_serve.bench.stage import Outcome, Stage, Variant
from eft_serve.bench.word_vocabulary import Words
from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.config import ZOO_CHECKPOINTS, ModelConfig
from eft_serve.coordinator.structured_output import GrammarCompiler
from eft_serve.engine.engine import Engine
from eft_serve.types import Combination, ModelInfo, Speculative, Term
from eft_serve.zoo.questions import long_prompts

BLOCKS = (1, 2, 4, 8, 16)
PAPER = {"plain": 6.0, "2": 9.2, "4": 12.5, "8": 13.8, "16": 12.1}  # tokens/s, Llama-2-70B + 7B-chat on HH
PLAIN = "plain"
PARTS = ("zoo", "simulated", "schema", "batched")
SCHEMA_BLOCK = 3  # the best with the paper's latencies


def build_zoo(name: str) -> tuple[Engine, ModelInfo]:
    """A model of the embedded family, for a process of its own."""
    engine = Engine.load(name, ModelConfig(path=f"zoo:{name}", kv_cache_tokens=16384))
    return engine, engine.info


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


def simulated_stage(
    latencies_s: Sequence[float], acceptance: float, num_prompts: int, max_tokens: int, directory: Path
) -> Stage:
    """Models that sleep; their `tokenizer.json` is written into the directory."""
    roles = dict(zip(("base", "tuned", "reference"), latencies_s, strict=True))
    vocabularies = dict.fromkeys(roles, Words(simulated.VOCAB_SIZE))
    (directory / "tokenizer.json").write_text(vocabularies["base"].tokenizer_json)
    builds = {role: (simulated.build, (role, seconds, acceptance, directory)) for role, seconds in roles.items()}
    stack = LocalStack(builds, vocabularies)
    prompts = [[i + 1] * (i + 2) for i in range(num_prompts)]
    grammars = GrammarCompiler(vocabularies)  # type: ignore[arg-type]
    return Stage(stack, SIMULATED, prompts, max_tokens, grammars)


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


def measure_schema(stage: Stage) -> dict[str, Any]:
    """Part (c): what draft tokens gain under a JSON schema, over what they gain without."""
    sides = [Variant(PLAIN, None), Variant.of(SCHEMA_BLOCK)]
    grammars = {"free": None, "json_schema": documents.grammar(1)}
    shown = {}
    for name, grammar in grammars.items():
        outcomes = stage.measure(sides, batch=1, num_batches=1, ignore_eos=True, grammar=grammar)
        shown[name] = _show(f"{SCHEMA_BLOCK} draft tokens at a time, {name}", outcomes)
    speedup = {name: side["speedup"] for name, side in shown.items()}
    acceptance = {name: side["sides"][str(SCHEMA_BLOCK)]["acceptance"] for name, side in shown.items()}
    over_free = round(speedup["json_schema"] / speedup["free"], 3)
    return {"speedup": speedup, "acceptance": acceptance, "json_schema_over_free": over_free}


def measure_batched(stage: Stage, batches: Sequence[int]) -> dict[str, Any]:
    """Part (d): the default, 8 at a time while the drafter is confident, against plain, by batch size."""
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
    """Those of `PARTS` that are asked for; the last line as JSON."""
    result: dict[str, Any] = {}
    if "zoo" in parts:
        stage = zoo_stage(prompts, max_tokens=80)
        result["zoo"] = _closing(stage, lambda: measure_zoo(stage))
    if "simulated" in parts or "schema" in parts:
        with TemporaryDirectory() as directory:
            latencies_s = [ms / 1e3 for ms in latencies_ms]
            slow = simulated_stage(latencies_s, acceptance, num_prompts=2, max_tokens=60, directory=Path(directory))
            result |= _closing(slow, lambda: _of_simulated(slow, parts, latencies_ms, acceptance))
    if "batched" in parts:
        wide = zoo_stage(4 * max(batches), max_tokens=80)
        result["batched"] = _closing(wide, lambda: measure_batched(wide, batches))
    report.finish(result)


def _of_simulated(
    stage: Stage, parts: Sequence[str], latencies_ms: Sequence[float], acceptance: float
) -> dict[str, Any]:
    result = {}
    if "simulated" in parts:
        result["simulated"] = measure_simulated(stage, latencies_ms, acceptance)
    if "schema" in parts:
        result["schema"] = measure_schema(stage)
    return result


def _closing(stage: Stage, work: Any) -> dict[str, Any]:
    try:
        measured: dict[str, Any] = work()
        return measured
    finally:
        stage.stack.close()
