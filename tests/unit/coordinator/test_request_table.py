"""A request ends once, and its end says what it took and when."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loop_harness import EFT, LetterVocabulary, request

from eft_serve.coordinator.request import Request
from eft_serve.coordinator.request_table import RequestTable
from eft_serve.coordinator.sampler import SamplerOutput
from eft_serve.errors import ContextLengthError, InvalidRequestError, UnavailableError
from eft_serve.types import Delta, EventKind, FinishReason, RequestEnd


class Table(RequestTable):
    """One that keeps what it told."""

    def __init__(self) -> None:
        super().__init__(lambda request, end: self.ends.append(end))
        self.ends: list[RequestEnd] = []

    def open(self, request_id: str = "r", **sampling: Any) -> Request:
        """A request that asks for two tokens."""
        opened = request(request_id, {model: [1, 2, 3] for model in EFT}, **{"max_tokens": 2, **sampling})
        self.add(opened, [LetterVocabulary()] * 3)  # type: ignore[list-item]
        return opened

    def deltas(self, request_id: str = "r") -> list[Delta]:
        return [delta for each, delta in self.take_deltas() if each.request_id == request_id]


@pytest.fixture
def table() -> Table:
    return Table()


def test_the_last_token_ends_a_request_and_its_delta_has_the_usage(table: Table) -> None:
    req = table.open()
    assert table.take(req, SamplerOutput([5]), time.monotonic()) == 1
    assert (table.ends, len(table)) == ([], 1)
    assert table.take(req, SamplerOutput([6, 7]), time.monotonic()) == 1, "one of the two is beyond its end"
    (end,) = table.ends
    first, last = table.deltas()
    assert (first.token_ids, first.usage) == ([5], None)
    assert (last.token_ids, last.usage, last.finish_reason) == ([6], end.usage, FinishReason.LENGTH)
    assert (end.request_id, end.recipe, end.tenant, end.failure) == ("r", "eft", "anonymous", None)
    assert {usage.completion_tokens for usage in end.usage.models.values()} == {2}
    assert [event.kind for event in end.timeline] == [EventKind.QUEUED, EventKind.FIRST_TOKEN, EventKind.ENDED]
    seconds = [event.seconds for event in end.timeline]
    assert seconds == sorted(seconds)
    assert end.usage.seconds == seconds[-1]
    assert abs(end.queued_at - time.time()) < 60
    assert (len(table), req in table) == (0, False)


def test_an_abort_ends_a_request_without_a_word(table: Table) -> None:
    req = table.open()
    table.take(req, SamplerOutput([5]), time.monotonic())
    table.abort("r")
    table.abort("r")
    table.abort("never heard of")
    assert table.deltas() == []
    assert [end.reason for end in table.ends] == [FinishReason.ABORT]
    assert table.ends[0].usage.models["base"].completion_tokens == 1


def test_a_refused_request_has_an_end_without_usage(table: Table) -> None:
    refused = request("r", {model: [1] for model in EFT})
    table.refuse(refused, ContextLengthError("too long", param="prompt"))
    (end,) = table.ends
    assert (end.reason, end.usage.models["base"].computed_tokens) == (FinishReason.ERROR, 0)
    (delta,) = table.deltas()
    assert delta.failure == end.failure
    assert delta.failure is not None
    assert delta.failure.kind == "ContextLengthError"


def test_requests_end_at_their_deadline_and_no_others(table: Table) -> None:
    late, other = table.open("late"), table.open("other")
    other.timeline.arrival += 100.0
    table.end_overdue(late.deadline + 1.0)
    assert [(end.request_id, end.failure.kind) for end in table.ends if end.failure] == [("late", "DeadlineError")]
    assert other in table


def test_all_end_with_the_same_error_when_the_coordinator_stops(table: Table) -> None:
    for name in ("a", "b"):
        table.open(name)
    table.end_all(UnavailableError("stopping"))
    assert [(end.request_id, end.reason) for end in table.ends] == [
        ("a", FinishReason.ERROR),
        ("b", FinishReason.ERROR),
    ]
    assert [delta.failure is not None for _, delta in table.take_deltas()] == [True, True]
    assert len(table) == 0


class TokenizerPanic(BaseException):
    """As the tokenizers library raises: no Exception."""


@pytest.mark.parametrize("panic", [ValueError, TokenizerPanic])
@pytest.mark.parametrize(
    "sampling", [{"max_tokens": 1}, {"max_tokens": 5}, {"max_tokens": 5, "stop": ("x",)}], ids=["last", "open", "stop"]
)
def test_a_text_that_cannot_be_decoded_is_an_error_and_one_end(
    table: Table, sampling: dict[str, Any], panic: type[BaseException]
) -> None:
    req, other = table.open(**sampling), table.open("other")

    def refuse(token_ids: list[int]) -> str:
        raise panic("no such token")

    table._open["r"][1].detokenizer.decoder = SimpleNamespace(decode=refuse)
    table.take(req, SamplerOutput([5]), time.monotonic())
    table.take(other, SamplerOutput([5]), time.monotonic())
    taken = table.take_deltas()
    assert (req in table) == ("stop" not in sampling and sampling["max_tokens"] > 1), "it may be in a step"
    table.end_undecodable()
    deltas = {each.request_id: delta for each, delta in [*taken, *table.take_deltas()]}
    assert deltas["r"].failure is not None
    assert "no such token" in deltas["r"].failure.message
    assert deltas["other"].token_ids == [5]
    assert [(end.request_id, end.reason, end.failure) for end in table.ends] == [
        ("r", FinishReason.ERROR, deltas["r"].failure)
    ]
    assert req not in table
    assert other in table


def test_a_request_of_the_same_id_is_another_request_and_refused(table: Table) -> None:
    first = table.open()
    assert request("r", {model: [1] for model in EFT}) not in table
    with pytest.raises(InvalidRequestError, match="'r' is open already"):
        table.open()
    assert first in table


def test_a_text_with_half_of_a_surrogate_pair_cannot_be_sent_and_is_an_error(table: Table) -> None:
    req = table.open()
    table._open["r"][1].detokenizer.decoder = SimpleNamespace(decode=lambda token_ids: "\ud800" * len(token_ids))
    table.take(req, SamplerOutput([5]), time.monotonic())
    assert table.deltas() == []
    table.end_undecodable()
    assert [delta.failure is not None for delta in table.deltas()] == [True]


def test_a_request_that_ends_with_an_error_before_its_text_is_decoded_has_that_error(table: Table) -> None:
    req = table.open(max_tokens=5)
    table._open["r"][1].detokenizer.decoder = SimpleNamespace()
    table.take(req, SamplerOutput([5]), time.monotonic())
    table.end_overdue(req.deadline + 1.0)
    deltas = table.deltas()
    table.end_undecodable()
    assert [delta.failure and delta.failure.kind for delta in deltas] == ["DeadlineError"]
    assert [end.failure and end.failure.kind for end in table.ends] == ["DeadlineError"]


def test_accepted_draft_tokens_after_the_end_do_not_count(table: Table) -> None:
    req = table.open(max_tokens=3)
    req.draft_token_ids, req.speculation.confidences = [5, 6, 7, 8], [1.0] * 4
    for sequence in req.sequences:
        sequence.rows = torch.zeros(5, 10)
    table.take(req, SamplerOutput([5, 6, 7, 8, 9]), time.monotonic())
    spec_decode = table.ends[0].usage.spec_decode
    assert (spec_decode.num_accepted, spec_decode.num_passes) == (3, 1)
