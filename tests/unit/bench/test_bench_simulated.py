"""Models that sleep: they agree as often as they are told to, whatever a mask forbids."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from eft_serve.bench.simulated import VOCAB_SIZE, WINDOW, SimulatedGroup
from eft_serve.bench.speculate import measure_schema, simulated_stage
from eft_serve.engine.batch import BatchRow, ForwardBatch

NUM_POSITIONS = 20 * WINDOW
TOKENS = torch.randint(VOCAB_SIZE, (NUM_POSITIONS,), generator=torch.Generator().manual_seed(1)).tolist()


def logits(role: str, acceptance: float, start: int = 0) -> torch.Tensor:
    """[NUM_POSITIONS - start, VOCAB_SIZE], behind each token from `start` on."""
    row = BatchRow(TOKENS[start:], position=start, block_ids=[], num_logits=NUM_POSITIONS - start)
    return SimulatedGroup(role, 0.0, acceptance).forward(ForwardBatch([row], []))


def masked(rows: torch.Tensor, num_allowed: int) -> torch.Tensor:
    """With so many possible tokens in each row, the same for the same number."""
    order = torch.rand(rows.shape, generator=torch.Generator().manual_seed(num_allowed)).argsort(dim=-1)
    return rows.masked_fill(order >= num_allowed, -torch.inf)


@pytest.mark.parametrize("num_allowed", [2, 5, 900, VOCAB_SIZE])
@pytest.mark.parametrize("acceptance", [0.5, 0.9, 1.0])
def test_models_agree_as_often_as_they_are_told_to_whatever_a_mask_forbids(num_allowed: int, acceptance: float) -> None:
    base, tuned, reference = (masked(logits(role, acceptance), num_allowed) for role in ("base", "tuned", "reference"))
    agreed = (base.argmax(dim=-1) == tuned.argmax(dim=-1)).view(-1, WINDOW)
    assert (agreed.sum(dim=-1) == round(WINDOW * acceptance)).all()
    combined = base + tuned - reference.nan_to_num(neginf=0.0)
    assert torch.equal(combined.argmax(dim=-1), base.argmax(dim=-1))


@pytest.mark.parametrize("num_allowed", [900, VOCAB_SIZE])
def test_the_tuned_model_is_less_sure_where_many_tokens_are_possible(num_allowed: int) -> None:
    first = masked(logits("tuned", 0.9), num_allowed).softmax(dim=-1).amax(dim=-1)
    assert first.median() == pytest.approx(0.95, abs=0.005)


def test_a_row_depends_on_its_token_and_position_alone() -> None:
    assert torch.equal(logits("tuned", 0.9, start=7), logits("tuned", 0.9)[7:])
    assert len(set(logits("base", 0.9).argmax(dim=-1).tolist())) > NUM_POSITIONS / 2


def test_draft_tokens_are_accepted_under_a_schema_too_and_no_replica_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = simulated_stage([0.0] * 3, 0.9, num_prompts=1, max_tokens=40, directory=tmp_path)
    with closing(stage.stack):
        measured = measure_schema(stage)
    assert min(measured["acceptance"].values()) > 0.5
    assert not [record.message for record in caplog.records if "failed" in record.message]
