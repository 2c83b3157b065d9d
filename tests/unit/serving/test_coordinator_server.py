"""A coordinator's server on real sockets, with a real decode loop over a model that draws one token after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import zmq
from counting_models import EFT, LENGTH, CountingBackend
from waiting import until

from eft_serve.errors import (
    CoordinatorLostError,
    EftServeError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
    from_failure,
)
from eft_serve.serving.coordinator_server import CoordinatorServer
from eft_serve.serving.output_collector import OutputCollector
from eft_serve.transport import submissions
from eft_serve.transport.coordinator_client import CoordinatorClient
from eft_serve.transport.deltas import DeltaReceiver, Part, ReplyTo
from eft_serve.types import (
    Combination,
    Delta,
    FinishReason,
    GenerationRequest,
    Listener,
    Resumption,
    SamplingParams,
    Term,
)


@dataclass
class Ingress:
    """What an ingress has of the data plane."""

    collectors: dict[str, OutputCollector] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.coordinator_client = CoordinatorClient(self._fail)
        self.receiver = DeltaReceiver(self._receive)

    def _fail(self, request_id: str, error: EftServeError) -> None:
        self.collectors[request_id].fail(error)

    def _receive(self, parts: Sequence[Part]) -> None:
        self.loop.call_soon_threadsafe(self._deliver, parts)

    def _deliver(self, parts: Sequence[Part]) -> None:
        for request_id, num_before, delta in parts:
            self.collectors[request_id].put(num_before, delta)

    async def connect_ingress(self, server: CoordinatorServer, reply_to: ReplyTo | None = None) -> None:
        server.connect_ingress(self.coordinator_client.public_key, reply_to or self.receiver.reply_to)
        listener = Listener(
            replica_id="one", address=server.submissions.address, public_key=server.submissions.public_key
        )
        self.coordinator_client.set_coordinators({"one": listener})
        await until(lambda: self.coordinator_client.ready)

    def submit(self, request_id: str = "r", *, reply_to: ReplyTo | None = None, **changes: Any) -> AsyncIterator[Delta]:
        request = GenerationRequest(
            request_id=request_id,
            combination=EFT,
            prompts={"base": [0, 1], "tuned": [1]},
            sampling=SamplingParams(temperature=0, max_tokens=5),
        )
        self.collectors[request_id] = OutputCollector()
        address = (reply_to or self.receiver.reply_to).address
        self.coordinator_client.submit(msgspec.structs.replace(request, **changes), address)
        return self.collectors[request_id].read()

    def close(self) -> None:
        self.coordinator_client.close()
        self.receiver.close()


@pytest.fixture
async def ingress(server: CoordinatorServer) -> AsyncIterator[Ingress]:
    ingress = Ingress()
    await ingress.connect_ingress(server)
    yield ingress
    ingress.close()


def alone(model: str, adapter: str | None = None) -> Combination:
    return Combination((Term("base", model, 1.0, adapter=adapter),))


def endless() -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=LENGTH // 2)


async def test_a_request_is_answered_and_nothing_is_left(
    server: CoordinatorServer, ingress: Ingress, backend: CountingBackend
) -> None:
    deltas = [delta async for delta in ingress.submit()]
    assert [token for delta in deltas for token in delta.token_ids] == [2, 3, 4, 5, 6]
    assert deltas[-1].finish_reason == FinishReason.LENGTH
    await until(lambda: not server.subscribers)
    await until(lambda: backend.stepped and not backend.sequences)


@pytest.mark.parametrize(
    ("changes", "kind", "param"),
    [
        ({"combination": alone("nobody")}, ModelNotFoundError, "model"),
        ({"combination": alone("law")}, ModelNotFoundError, "model"),
        ({"combination": alone("base", adapter="nobody")}, ModelNotFoundError, "model"),
        ({"combination": alone("tuned", adapter="law")}, ModelNotFoundError, "model"),
        ({"combination": Combination(())}, InvalidRequestError, "terms"),
        ({"prompts": {"base": [1]}}, InvalidRequestError, "prompts"),
    ],
)
async def test_what_cannot_be_served_is_refused_with_its_error(
    server: CoordinatorServer, ingress: Ingress, changes: dict[str, Any], kind: type[EftServeError], param: str
) -> None:
    with pytest.raises(kind) as refusal:
        async with asyncio.timeout(10):  # a loop that died of it would never answer
            await anext(ingress.submit(**changes))
    assert refusal.value.param == param
    assert not server.subscribers
    assert [token async for delta in ingress.submit("next") for token in delta.token_ids] == [2, 3, 4, 5, 6]


async def test_an_adapter_of_a_deployment_is_served(ingress: Ingress) -> None:
    deltas = ingress.submit(combination=alone("base", adapter="law"), prompts={"base": [1]})
    assert [token async for delta in deltas for token in delta.token_ids] == [2, 3, 4, 5, 6]


async def test_an_address_that_was_never_introduced_gets_nothing(server: CoordinatorServer, ingress: Ingress) -> None:
    elsewhere = msgspec.structs.replace(ingress.receiver.reply_to, address="tcp://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="does not know this ingress"):
        await anext(ingress.submit(reply_to=elsewhere))
    assert not server.subscribers


@pytest.mark.parametrize("server", [{"max_num_seqs": 1, "max_waiting": 2}], indirect=True)
async def test_no_more_are_open_than_may_run_and_wait(
    server: CoordinatorServer, ingress: Ingress, backend: CountingBackend
) -> None:
    await until(lambda: not server.decode_loop.missing_models)
    backend.gate.clear()  # the decode loop takes nothing in meanwhile
    for name in "abc":
        ingress.submit(name)
    with pytest.raises(UnavailableError, match="more than 2 requests are waiting"):
        await anext(ingress.submit("d"))
    assert server.subscribers.keys() == set("abc")


@pytest.mark.parametrize("server", [{"max_num_seqs": 1, "max_waiting": 2}], indirect=True)
async def test_what_a_lost_coordinator_had_taken_is_taken_also_where_no_more_may_wait(
    server: CoordinatorServer, ingress: Ingress, backend: CountingBackend
) -> None:
    await until(lambda: not server.decode_loop.missing_models)
    backend.gate.clear()
    for name in "abc":
        ingress.submit(name)
    begun = ingress.submit("d", resumption=Resumption(token_ids=[], num_characters=0, num_prompt_logprobs=0))
    await until(lambda: server.subscribers.keys() == set("abcd"))
    backend.gate.set()
    assert [token for delta in [delta async for delta in begun] for token in delta.token_ids] == [2, 3, 4, 5, 6]


async def test_an_id_that_is_open_already_is_refused_and_the_open_request_goes_on(
    server: CoordinatorServer, ingress: Ingress, backend: CountingBackend
) -> None:
    await until(lambda: not server.decode_loop.missing_models)
    backend.gate.clear()
    first, other = ingress.submit(), Ingress()
    await other.connect_ingress(server)
    with pytest.raises(InvalidRequestError, match="'r' is open already"):
        await anext(other.submit())
    other.coordinator_client.end("r", complete=False)  # as a client whose request is refused does
    other.submit("next")
    await until(lambda: "next" in server.subscribers)  # so the abort has arrived
    other.close()
    backend.gate.set()
    assert [token async for delta in first for token in delta.token_ids] == [2, 3, 4, 5, 6]


async def test_tokens_of_an_aborted_request_do_not_go_to_the_next_one_of_its_id(
    server: CoordinatorServer, ingress: Ingress, backend: CountingBackend
) -> None:
    await until(lambda: not server.decode_loop.missing_models)
    backend.gate.clear()
    ingress.submit()
    await until(lambda: "r" in server.subscribers)
    aborted = server.subscribers["r"]
    ingress.coordinator_client.end("r", complete=False)
    deltas = ingress.submit()
    await until(lambda: server.subscribers.get("r") not in (None, aborted))
    server._emit([(aborted.request, Delta(text="x", token_ids=[9], finish_reason=FinishReason.STOP))])
    backend.gate.set()
    assert [token async for delta in deltas for token in delta.token_ids] == [2, 3, 4, 5, 6]


async def test_an_aborted_request_is_freed_in_every_model(
    server: CoordinatorServer, ingress: Ingress, backend: CountingBackend
) -> None:
    await anext(ingress.submit(sampling=endless()))
    assert backend.sequences == {"r/base", "r/tuned"}
    ingress.coordinator_client.end("r", complete=False)
    await until(lambda: not backend.sequences)
    assert not server.subscribers


@pytest.mark.parametrize("server", [{"max_num_seqs": 1}], indirect=True)
async def test_a_vanished_ingress_ends_its_own_requests_only(
    server: CoordinatorServer, ingress: Ingress, backend: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "LOOK_INTERVAL_S", 0.05)
    gone = Ingress()
    await gone.connect_ingress(server)
    await anext(ingress.submit("stays", sampling=endless()))
    gone.submit("waits for its turn", sampling=endless())
    await until(lambda: server.decode_loop.num_requests == 2)
    gone.close()
    await until(lambda: server.decode_loop.num_requests == 1)
    assert server.subscribers.keys() == {"stays"}
    assert backend.sequences == {"stays/base", "stays/tuned"}


async def test_tokens_that_cannot_be_sent_fail_the_request(
    server: CoordinatorServer, ingress: Ingress, backend: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eft_serve.transport.sockets.QUEUE_MESSAGES", 3)
    public_key, secret_key = zmq.curve_keypair()
    nobody = ReplyTo(address="tcp://127.0.0.1:9", server_key=public_key, public_key=public_key, secret_key=secret_key)
    await ingress.connect_ingress(server, nobody)
    with pytest.raises(UnavailableError, match="could not be sent"):
        async with asyncio.timeout(10):
            await anext(ingress.submit(reply_to=nobody, sampling=endless()))
    await until(lambda: not backend.sequences)
    assert not server.subscribers


async def test_a_stopping_coordinator_is_a_lost_one(server: CoordinatorServer, ingress: Ingress) -> None:
    deltas = ingress.submit(sampling=endless())
    await anext(deltas)
    closing = asyncio.get_running_loop().run_in_executor(None, server.close)

    async def read() -> None:  # a failure comes, or the connection ends before it
        async for delta in deltas:
            if delta.failure is not None:
                raise from_failure(delta.failure)

    with pytest.raises(CoordinatorLostError):
        await read()
    await closing
