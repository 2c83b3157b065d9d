"""What combining and drawing a step's tokens takes on the CPU and on the GPU: a table, then one line of JSON.

    python3 tests/gpu/bench_sampling.py --threads 4

The logits are those of `eft-serve bench coordinator`. The sides take turns in every round; figures are medians. On the
GPU the logits come from ordinary (pageable) or from pinned memory, and the backend puts both into a pinned buffer of
its own first. The floors copy as many bytes, in one piece, and do nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eft_serve.bench import report
from eft_serve.bench.peaked_engine import peaked_logits
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.sampler import Sampler, SamplerOutput
from eft_serve.numerics.backends import CpuBackend, SamplingBackend, TorchBackend
from eft_serve.types import Combination, GenerationRequest, SamplingParams, Term

TERMS = (Term("base", "base", 1.0), Term("tuned", "tuned", 1.0), Term("reference", "reference", -1.0))
SIDES = {"greedy": (0.0, 1.0), "t1": (1.0, 1.0), "top_p": (0.7, 0.9)}  # temperature and top-p
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PHASES = ("combine", "sample")


def build_requests(side: str, terms: Sequence[Tensor]) -> list[Request]:
    """One for each row of the terms."""
    temperature, top_p = SIDES[side]
    requests = []
    for row in range(len(terms[0])):
        sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=row)
        prompts = {term.name: [1] for term in TERMS}
        generation = GenerationRequest(
            request_id=str(row), combination=Combination(TERMS), prompts=prompts, sampling=sampling
        )
        request = Request.create(generation, 0.0)
        request.num_ids = terms[0].shape[1]
        for sequence, term in zip(request.sequences, terms, strict=True):
            sequence.rows = term[row : row + 1]
        requests.append(request)
    return requests


@dataclass
class Measured:
    """Milliseconds of each round."""

    step: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    token_ids: list[list[int]] = field(default_factory=list)

    def sample(self, backend: SamplingBackend, threads: int, requests: Sequence[Request]) -> None:
        def observe(phase: str, seconds: float) -> None:
            self.phases[phase].append(seconds * 1e3)

        sampler = Sampler(backend, threads, observe)
        outputs: list[object] = []
        self.step.append(milliseconds(lambda: outputs.extend(sampler.sample(requests))))
        self.token_ids = [output.token_ids for output in outputs if isinstance(output, SamplerOutput)]

    def summary(self) -> dict[str, float]:
        figures = {"step": self.step, **{phase: self.phases[phase] for phase in PHASES}}
        return {name: round(statistics.median(values), 3) for name, values in figures.items()}


def milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def measure(terms: Sequence[Tensor], device: torch.device, threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians by `where, side`, and the floors."""
    cpu, gpu = CpuBackend(), TorchBackend(device)
    is_gpu = device.type == "cuda"
    pinned = [term.pin_memory() for term in terms] if is_gpu else list(terms)
    plans: dict[str, tuple[SamplingBackend, int, Sequence[Tensor]]] = {
        f"cpu, {threads} threads": (cpu, threads, terms),
        "gpu, pageable": (gpu, 1, terms),
        "gpu, pinned": (gpu, 1, pinned),
    }
    measured: dict[str, Measured] = defaultdict(Measured)
    copies: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        if number == 1:  # the first round warms up
            measured.clear()
            copies.clear()
        for side in SIDES:
            tokens = []
            for where, (backend, num_threads, source) in plans.items():
                each = measured[f"{where}: {side}"]
                each.sample(backend, num_threads, build_requests(side, source))
                tokens.append(each.token_ids)
            if any(other != tokens[0] for other in tokens):
                raise RuntimeError(f"{side}: the sides drew different tokens")
        for name, source in (("copy, pageable", terms), ("copy, pinned", pinned)):
            copies[name].append(milliseconds(lambda source=source: [term.to(device, copy=True) for term in source]))  # type: ignore[misc]
    floors = {name: {"step": round(statistics.median(values), 3)} for name, values in copies.items()}
    return {**{name: each.summary() for name, each in measured.items()}, **floors}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Combine and sample, CPU beside GPU.")
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--batch", type=int, default=64, help="at most 64")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU's side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda", help="any of torch's; cpu tries the script itself")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device(asked.device)
    result = {}
    for name, dtype in DTYPES.items():
        terms = [peaked_logits(term.name, asked.vocab)[: asked.batch].to(dtype).contiguous() for term in TERMS]
        result[name] = measure(terms, device, asked.threads, asked.rounds)
        report.show(
            f"Milliseconds of {asked.batch} rows of {asked.vocab} tokens, three terms in {name}",
            ["side", "step", *PHASES],
            [[key, *(row.get(column, "") for column in ("step", *PHASES))] for key, row in result[name].items()],
        )
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    report.finish({"ms": result, "batch": asked.batch, "vocab": asked.vocab, "cpu_threads": asked.threads, "gpu": gpu})


if __name__ == "__main__":
    main(sys.argv[1:])
