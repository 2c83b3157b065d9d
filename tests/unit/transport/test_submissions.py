"""Requests on real sockets: taken or refused, never lost without a word, and nobody's once their ingress is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
import zmq
from waiting import until

from eft_serve.errors import EftServeError, EngineError, ModelNotFoundError, UnavailableError
from eft_serve.transport import coordinator_client, submissions
from eft_serve.transport.coordinator_client import CoordinatorClient
from eft_serve.transport.submissions import Notice, SubmissionServer, Submit
from eft_serve.types import Combination, GenerationRequest, Listener, Reward, SamplingParams, Term

ADDRESS = "tcp://127.0.0.1:1"
PROMPT_SECONDS = 1.0  # soon, on a busy machine


@dataclass
class Notebook:
    """A handler that notes what it is told, and refuses what a test wants refused."""

    taken: dict[str, tuple[bytes, Submit]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    lost: list[bytes] = field(default_factory=list)
    refusal: Exception | None = None

    def submit(self, client: bytes, submission: Submit) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.taken[submission.request.request_id] = (client, submission)

    def abort(self, client: bytes, request_id: str) -> None:
        self.aborted.append(request_id)

    def clients(self) -> set[bytes]:
        return {client for client, _ in self.taken.values()} - set(self.lost)

    def lose(self, client: bytes) -> None:
        self.lost.append(client)


@dataclass
class Coordinator:
    """A server and its handler."""

    handler: Notebook
    server: SubmissionServer
    listener: Listener


@dataclass
class Ingress:
    """A coordinator_client, and which of its requests failed."""

    failures: dict[str, EftServeError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coordinator_client = CoordinatorClient(self.failures.__setitem__)

    async def connect_ingress(self, *coordinators: Coordinator) -> None:
        for coordinator in coordinators:
            coordinator.server.allow(self.coordinator_client.public_key)
        self.coordinator_client.set_coordinators({c.listener.replica_id: c.listener for c in coordinators})
        links = self.coordinator_client._links
        await until(lambda: all(links[c.listener.replica_id].connection.ready for c in coordinators))

    def submit(self, request_id: str) -> None:
        self.coordinator_client.submit(request(request_id), ADDRESS)


Serve = Callable[..., Coordinator]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(name: str = "one", *, answering: bool = True) -> Coordinator:
            handler = Notebook()
            server = SubmissionServer(handler)
            stack.callback(server.close)
            if answering:
                server.start()
            listener = Listener(replica_id=name, address=server.address, public_key=server.public_key)
            return Coordinator(handler, server, listener)

        yield start


@pytest.fixture
async def ingress() -> AsyncIterator[Ingress]:
    ingress = Ingress()
    yield ingress
    ingress.coordinator_client.close()


def request(request_id: str) -> GenerationRequest:
    terms = (Term("base", "base", 0.5, ratio=0.5), Term("tuned", "base", 0.5, adapter="tuned", weight=0.5))
    return GenerationRequest(
        request_id=request_id,
        combination=Combination(terms, 0.9, (Reward("tuned", "tuned", "base", 0.5),)),
        prompts={"base": [1, 2], "tuned": [3]},
        sampling=SamplingParams(seed=7),
    )


async def test_a_request_is_taken_as_it_was_sent_and_nothing_is_waited_for_any_more(
    serve: Serve, ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_client, "TAKEN_TIMEOUT_S", 0.5)
    coordinator = serve()
    await ingress.connect_ingress(coordinator)
    ingress.submit("a")
    await until(lambda: "a" in coordinator.handler.taken)
    _, submission = coordinator.handler.taken["a"]
    assert submission == Submit(request("a"), ADDRESS)
    await asyncio.sleep(0.7)
    assert ingress.failures == {}


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [(ModelNotFoundError("no such model", param="model"), ModelNotFoundError), (KeyError("a bug"), EngineError)],
)
async def test_a_refusal_comes_back_typed_and_the_server_goes_on(
    serve: Serve, ingress: Ingress, refusal: Exception, kind: type[EftServeError]
) -> None:
    coordinator = serve()
    coordinator.handler.refusal = refusal
    await ingress.connect_ingress(coordinator)
    ingress.submit("a")
    await until(lambda: "a" in ingress.failures)
    assert type(ingress.failures["a"]) is kind
    assert ingress.failures["a"].param == getattr(refusal, "param", None)
    coordinator.handler.refusal = None
    ingress.submit("b")
    await until(lambda: "b" in coordinator.handler.taken)
    coordinator.server.check()


async def test_a_coordinator_that_does_not_answer_fails_the_request_in_time(
    serve: Serve, ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_client, "TAKEN_TIMEOUT_S", 0.2)
    await ingress.connect_ingress(serve(answering=False))
    ingress.submit("a")
    assert ingress.failures == {}
    await until(lambda: "a" in ingress.failures, PROMPT_SECONDS)
    assert isinstance(ingress.failures["a"], UnavailableError)


async def test_a_last_delta_that_never_comes_is_missed(
    serve: Serve, ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_client, "LATE_DELTAS_S", 0.1)
    coordinator = serve()
    await ingress.connect_ingress(coordinator)
    for name in ("lost", "whole"):
        ingress.submit(name)
    await until(lambda: len(coordinator.handler.taken) == 2)
    ingress.coordinator_client.end("whole", complete=True)
    client, _ = coordinator.handler.taken["lost"]
    coordinator.server.notify((client, Notice(name, finished=True)) for name in ("lost", "whole"))
    await until(lambda: ingress.failures)
    await asyncio.sleep(0.2)
    assert ingress.failures.keys() == {"lost"}
    assert "lost" in ingress.failures["lost"].message


async def test_a_coordinator_that_goes_away_fails_what_it_had_at_once_and_gets_no_more(
    serve: Serve, ingress: Ingress
) -> None:
    one, other = serve("one"), serve("other")
    await ingress.connect_ingress(one, other)
    ingress.submit("a")
    ingress.submit("b")
    await until(lambda: one.handler.taken and other.handler.taken)
    one.server.close()
    await until(lambda: ingress.failures, PROMPT_SECONDS)
    assert ingress.failures.keys() == one.handler.taken.keys()
    assert all("being replaced" in failure.message for failure in ingress.failures.values())
    for name in "cde":
        ingress.submit(name)
    await until(lambda: len(other.handler.taken) == 4)
    other.server.close()
    await until(lambda: not ingress.coordinator_client.ready)
    with pytest.raises(UnavailableError, match="no coordinator"):
        ingress.submit("f")


async def test_an_ingress_that_goes_away_is_noticed_and_one_that_stays_is_not(
    serve: Serve, ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "LOOK_INTERVAL_S", 0.05)
    coordinator, gone = serve(), Ingress()
    await ingress.connect_ingress(coordinator)
    await gone.connect_ingress(coordinator)
    ingress.submit("stays")
    gone.submit("goes")
    await until(lambda: len(coordinator.handler.taken) == 2)
    gone.coordinator_client.close()
    await until(lambda: coordinator.handler.lost, PROMPT_SECONDS)
    await asyncio.sleep(0.5)
    assert coordinator.handler.lost == [coordinator.handler.taken["goes"][0]]
    assert ingress.failures == {}


async def test_an_abort_is_sent_unless_the_answer_is_complete(serve: Serve, ingress: Ingress) -> None:
    coordinator = serve()
    await ingress.connect_ingress(coordinator)
    for name in "abc":
        ingress.submit(name)
    ingress.coordinator_client.end("a", complete=True)
    ingress.coordinator_client.end("b", complete=False)
    ingress.coordinator_client.end("unknown", complete=False)
    ingress.coordinator_client.end("c", complete=False)
    await until(lambda: len(coordinator.handler.aborted) == 2)
    assert coordinator.handler.aborted == ["b", "c"]


async def test_who_has_fewest_open_requests_gets_the_next_and_equals_take_turns(serve: Serve, ingress: Ingress) -> None:
    one, other = serve("one"), serve("other")
    await ingress.connect_ingress(one, other)
    for number in range(8):  # each ends before the next: always equal
        ingress.submit(str(number))
        ingress.coordinator_client.end(str(number), complete=True)
    await until(lambda: len(one.handler.taken) == len(other.handler.taken) == 4)
    ingress.submit("stays")
    await until(lambda: one.handler.taken.keys() | other.handler.taken.keys() >= {"stays"})
    busy, idle = (one, other) if "stays" in one.handler.taken else (other, one)
    for number in range(8, 12):
        ingress.submit(str(number))
        ingress.coordinator_client.end(str(number), complete=True)
    await until(lambda: len(idle.handler.taken) == 8)
    assert len(busy.handler.taken) == 5


async def test_a_coordinator_that_is_no_longer_listed_finishes_what_it_has(serve: Serve, ingress: Ingress) -> None:
    old, new = serve("old"), serve("new")
    await ingress.connect_ingress(old)
    ingress.submit("a")
    await ingress.connect_ingress(new)
    ingress.submit("b")
    ingress.submit("c")
    await until(lambda: new.handler.taken.keys() == {"b", "c"})
    assert old.handler.taken.keys() == {"a"}
    ingress.coordinator_client.end("a", complete=False)
    await ingress.connect_ingress(new)
    await until(lambda: old.handler.aborted == ["a"])
    assert ingress.coordinator_client._links.keys() == {"new"}
    assert ingress.failures == {}


async def test_a_stranger_does_not_get_through(serve: Serve, ingress: Ingress) -> None:
    coordinator = serve()
    ingress.coordinator_client.set_coordinators({"one": coordinator.listener})
    await asyncio.sleep(0.5)
    assert not ingress.coordinator_client.ready
    with pytest.raises(UnavailableError, match="no coordinator"):
        ingress.submit("a")
    await ingress.connect_ingress(coordinator)  # a refused connection is made anew
    ingress.submit("a")
    await until(lambda: "a" in coordinator.handler.taken)


async def test_a_malformed_message_is_dropped_and_the_next_is_read(serve: Serve, ingress: Ingress) -> None:
    coordinator = serve()
    await ingress.connect_ingress(coordinator)
    socket = ingress.coordinator_client._links["one"].connection.socket
    for nonsense in (b"", b"\xc1", b"\x93\xa6Submit\x01\x02"):
        socket.send(nonsense, zmq.NOBLOCK)
    ingress.submit("a")
    await until(lambda: "a" in coordinator.handler.taken)
    client, _ = coordinator.handler.taken["a"]
    coordinator.server._notices.put((client, "nonsense"))  # type: ignore[arg-type]
    ingress.submit("b")
    await until(lambda: "b" in coordinator.handler.taken)
    coordinator.server.check()


async def test_a_closed_server_says_so(serve: Serve) -> None:
    coordinator = serve()
    coordinator.server.close()
    coordinator.server.close()
    with pytest.raises(RuntimeError, match="not running"):
        coordinator.server.check()
