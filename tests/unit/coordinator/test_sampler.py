"""The pipeline over requests: tiles, threads, processors and faults change nobody else's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eft_serve.coordinator.request import Request
from eft_serve.coordinator.sampler import PHASES, Sampler, SamplerOutput, process
from eft_serve.errors import EngineError
from eft_serve.numerics.backends import CpuBackend, SamplingBackend, TorchBackend
from eft_serve.numerics.rows import LogitsProcessor, RowBatch
from eft_serve.types import Combination, GenerationRequest, SamplingParams, Term

VOCAB = 50
TERMS = (Term("base", "base", 1.0), Term("tuned", "tuned", 1.0, weight=1.0), Term("reference", "reference", -1.0))


def ready(seed: int, num_rows: int = 1, temperature: float = 1.0, components: int | None = None) -> Request:
    """A request whose models have all answered."""
    generation = GenerationRequest(
        request_id=f"r{seed}",
        combination=Combination(TERMS),
        prompts={term.name: [1] for term in TERMS},
        sampling=SamplingParams(temperature=temperature, seed=seed, max_tokens=100),
        components=components,
    )
    request = Request.create(generation, now=0.0)
    request.num_ids = VOCAB
    generator = torch.Generator().manual_seed(seed)
    for sequence in request.sequences:
        sequence.rows = torch.randn(num_rows, VOCAB, generator=generator) * 2
    return request


def tokens(outputs: Sequence[object]) -> list[list[int]]:
    found = []
    for output in outputs:
        assert isinstance(output, SamplerOutput)
        found.append(output.token_ids)
    return found


class SmallTiles(CpuBackend):
    tile_elements = 3 * VOCAB


@pytest.mark.parametrize(
    ("backend", "num_threads"),
    [(CpuBackend(), 2), (SmallTiles(), 1), (SmallTiles(), 3), (TorchBackend(torch.device("cpu")), 1)],
)
def test_tokens_depend_neither_on_tiles_nor_on_threads_nor_on_the_backend(
    backend: SamplingBackend, num_threads: int
) -> None:
    def sampled(sampler: Sampler) -> list[list[int]]:
        return tokens(sampler.sample([ready(seed, 1 + seed % 3, seed % 2) for seed in range(20)]))

    assert sampled(Sampler(backend, num_threads, lambda *_: None)) == sampled(Sampler(CpuBackend(), 1, lambda *_: None))


def test_a_request_without_a_distribution_ends_alone() -> None:
    requests = [ready(seed) for seed in range(4)]
    bad = requests[2].sequences[1].rows
    assert bad is not None
    bad[0, 7] = torch.nan
    outputs = Sampler(CpuBackend(), 1, lambda *_: None).sample(requests)
    assert isinstance(outputs[2], EngineError)
    assert "r2" in outputs[2].message
    healthy = Sampler(CpuBackend(), 1, lambda *_: None).sample([ready(0), ready(1), ready(3)])
    assert tokens([outputs[i] for i in (0, 1, 3)]) == tokens(healthy)


def test_each_phase_is_observed_once_a_step() -> None:
    observed: list[str] = []
    Sampler(SmallTiles(), 2, lambda phase, _: observed.append(phase)).sample([ready(seed) for seed in range(9)])
    assert observed == list(PHASES)


class Ban:
    """Forbids every token that the output has."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, output_token_ids: Sequence[int], draft_token_ids: Sequence[int], logits: Tensor) -> None:
        for index, row in enumerate(logits):
            before = [*output_token_ids, *draft_token_ids[:index]]
            self.seen.append(before)
            row[before] = -torch.inf


def test_a_processor_sees_the_tokens_before_each_row_drafts_included_and_leaves_logits_alone_that_are_kept() -> None:
    ban, other = Ban(), ready(5)
    request = ready(4, num_rows=3)
    request.output_token_ids = [10, 11]
    request.draft_token_ids = [12, 13, 14]
    rows = replace(request.rows(), processors=[ban])
    batch = RowBatch([other.rows(), rows])
    combined, _ = CpuBackend().combine(batch)
    before = combined.clone()
    processed, _ = process(batch, combined, keep_combined=True)
    assert ban.seen == [[10, 11], [10, 11, 12], [10, 11, 12, 13]]
    assert torch.equal(combined, before)
    assert torch.equal(processed[0], combined[0])
    for row, banned in enumerate(ban.seen, start=1):
        assert (processed[row] == -torch.inf).nonzero().flatten().tolist() == banned
        assert not set(CpuBackend().sample(batch, processed)[row : row + 1]) & set(banned)


@pytest.mark.parametrize(("processors", "keep_combined"), [([], True), ([Ban()], False)])
def test_nothing_is_copied_without_processors_or_where_combined_logits_are_not_kept(
    processors: list[Ban], keep_combined: bool
) -> None:
    batch = RowBatch([replace(ready(1).rows(), processors=processors)])
    combined, _ = CpuBackend().combine(batch)
    assert process(batch, combined, keep_combined=keep_combined)[0] is combined


def forbid_everything(output: Sequence[int], drafts: Sequence[int], logits: Tensor) -> None:
    logits.fill_(-torch.inf)


def leave_nan(output: Sequence[int], drafts: Sequence[int], logits: Tensor) -> None:
    logits[:, 3] = torch.nan


def fail(output: Sequence[int], drafts: Sequence[int], logits: Tensor) -> None:
    raise RuntimeError("a grammar broke")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("processor", [forbid_everything, leave_nan, fail])
def test_a_processor_that_leaves_nothing_to_draw_ends_its_own_request(
    processor: LogitsProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ready(seed) for seed in range(3)]
    rows = replace(requests[1].rows(), processors=[processor])
    own = Request.rows
    monkeypatch.setattr(Request, "rows", lambda request: rows if request is requests[1] else own(request))
    outputs = Sampler(CpuBackend(), 1, lambda *_: None).sample(requests)
    assert isinstance(outputs[1], EngineError)
    assert tokens([outputs[0], outputs[2]]) == tokens(
        Sampler(CpuBackend(), 1, lambda *_: None).sample([ready(0), ready(2)])
    )
