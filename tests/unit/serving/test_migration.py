"""Requests whose coordinator goes away, on real sockets: another coordinator goes on with the very tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import pytest
from counting_models import CONFIG, EFT, LENGTH, CountingBackend, DigitVocabulary, endpoint
from waiting import until

from eft_serve.config import AppConfig
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.errors import CoordinatorLostError, UnavailableError
from eft_serve.serving import generation_client
from eft_serve.serving.coordinator_server import CoordinatorServer
from eft_serve.serving.generation_client import GenerationClient
from eft_serve.serving.migration import Migration
from eft_serve.types import Delta, FinishReason, GenerationRequest, Listener, SamplingParams

NUM_TOKENS = 4000  # so many that none is computed to its end before it is disturbed


class Coordinators:
    """Coordinators over one backend each, and an ingress's client of them."""

    def __init__(self) -> None:
        self.client = GenerationClient()
        self.servers: dict[str, CoordinatorServer] = {}

    def start(self, name: str) -> CoordinatorServer:
        config = AppConfig.parse(CONFIG)
        vocabularies: dict[str, Any] = dict.fromkeys(config.deployments, DigitVocabulary())
        server = self.servers[name] = CoordinatorServer(config, CountingBackend(), vocabularies, CoordinatorMetrics())
        server.start()
        server.decode_loop.set_replicas({model: endpoint(model) for model in config.deployments})
        server.connect_ingress(self.client.public_key, self.client.reply_to)
        self.list_all()
        return server

    def list_all(self) -> None:
        self.client.set_coordinators(
            {
                name: Listener(
                    replica_id=name, address=server.submissions.address, public_key=server.submissions.public_key
                )
                for name, server in self.servers.items()
            }
        )

    def kill(self, name: str) -> None:
        """Without a word: its connections break, and what it still computes reaches nobody."""
        server = self.servers.pop(name)
        server.decode_loop.emit = lambda deltas: None
        server.submissions.close()
        server.close()

    @property
    def home(self) -> str | None:
        """The coordinator that has the request."""
        return next((name for name, server in self.servers.items() if server.subscribers), None)

    def close(self) -> None:
        for name in list(self.servers):
            self.kill(name)
        self.client.close()


@pytest.fixture
async def coordinators() -> AsyncIterator[Coordinators]:
    coordinators = Coordinators()
    yield coordinators
    coordinators.close()


def request(max_tokens: int = NUM_TOKENS, request_id: str = "r", **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        combination=EFT,
        prompts={"base": [0, 1], "tuned": [1]},
        sampling=SamplingParams(temperature=0, max_tokens=max_tokens),
        **fields,
    )


def expected(count: int = NUM_TOKENS) -> list[int]:
    return [(2 + i) % 8 for i in range(count)]


async def test_a_lost_coordinator_changes_no_token(coordinators: Coordinators) -> None:
    coordinators.start("one")
    coordinators.start("two")
    await until(lambda: coordinators.client.ready)
    token_ids, text, num_kills = list[int](), "", 0
    async for delta in coordinators.client.generate(request()):
        token_ids += delta.token_ids
        text += delta.text
        if num_kills < 2 and len(token_ids) > 20 * (num_kills + 1) and (lost := coordinators.home) is not None:
            coordinators.start(f"successor {num_kills}")
            coordinators.kill(lost)
            num_kills += 1
    assert num_kills == 2
    assert (token_ids, text) == (expected(), "".join(map(str, expected())))
    assert delta.finish_reason is FinishReason.LENGTH
    assert coordinators.client._collectors == {}


async def test_a_coordinator_that_stops_hands_its_requests_over(coordinators: Coordinators) -> None:
    coordinators.start("one")
    token_ids: list[int] = []
    async for delta in coordinators.client.generate(request(LENGTH // 100)):
        if not token_ids:
            stopping = coordinators.servers.pop("one")
            coordinators.start("two")
            await asyncio.to_thread(stopping.decode_loop.close)
        token_ids += delta.token_ids
    assert token_ids == expected(LENGTH // 100)
    await asyncio.to_thread(stopping.close)


async def test_the_only_coordinator_is_waited_for_and_its_successor_goes_on(coordinators: Coordinators) -> None:
    coordinators.start("one")
    token_ids: list[int] = []

    async def read() -> None:
        async for delta in coordinators.client.generate(request()):
            token_ids.extend(delta.token_ids)

    reading = asyncio.create_task(read())
    await until(lambda: token_ids)
    coordinators.kill("one")
    coordinators.list_all()
    await asyncio.sleep(0.2)
    assert not reading.done()
    coordinators.start("two")
    await reading
    assert token_ids == expected()


async def test_a_coordinator_whose_loop_died_is_given_no_request_though_it_is_still_listed(
    coordinators: Coordinators,
) -> None:
    for name in ("one", "two"):
        coordinators.start(name)
    await until(lambda: all(link.connection.ready for link in coordinators.client._coordinators._links.values()))

    def die() -> None:
        raise OverflowError("nobody thought of this")

    async def tokens(number: int) -> list[int]:
        token_ids = list[int]()
        async for delta in coordinators.client.generate(request(1000, request_id=f"r{number}")):
            if not token_ids and number == 0:
                coordinators.servers["one"].decode_loop._inbox.put(die)
            token_ids += delta.token_ids
        return token_ids

    async with asyncio.timeout(20):
        assert await asyncio.gather(*map(tokens, range(6))) == 6 * [expected(1000)]
        assert await tokens(6) == expected(1000)


async def test_without_a_successor_the_request_ends_with_an_error(
    coordinators: Coordinators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_client, "RECOVERY_TIMEOUT_S", 0.1)
    coordinators.start("one")

    async def read() -> None:
        async for _ in coordinators.client.generate(request()):
            with suppress(KeyError):
                coordinators.kill("one")
                coordinators.list_all()

    with pytest.raises(UnavailableError, match="no coordinator"):
        await read()


async def test_a_reader_that_stops_after_a_migration_ends_the_request_everywhere(coordinators: Coordinators) -> None:
    coordinators.start("one")
    async with aclosing(coordinators.client.generate(request(LENGTH // 2))) as deltas:
        await anext(deltas)
        coordinators.start("two")
        coordinators.kill("one")
        await anext(deltas)
        async for _ in deltas:
            if coordinators.servers["two"].subscribers:
                break
    await until(lambda: not coordinators.servers["two"].subscribers)


def lost() -> CoordinatorLostError:
    return CoordinatorLostError("gone")


def test_a_request_that_costs_coordinators_without_a_token_is_given_up() -> None:
    migration = Migration(request())
    migration.lose(lost())
    migration.take(Delta(text="2", token_ids=[2]))
    for _ in range(2):
        migration.lose(lost())
    with pytest.raises(CoordinatorLostError):
        migration.lose(lost())


def test_no_coordinator_is_asked_beyond_the_deadline() -> None:
    migration = Migration(request(timeout_s=0.0))
    with pytest.raises(CoordinatorLostError):
        migration.lose(lost())


def test_each_coordinator_is_asked_under_another_id_for_what_is_left() -> None:
    migration = Migration(request(timeout_s=60.0))
    assert migration.current() is migration.request
    migration.take(Delta(text="23", token_ids=[2, 3]))
    migration.lose(lost())
    asked = migration.current()
    assert asked.request_id == "r.1"
    assert asked.resumption is not None
    assert (asked.resumption.token_ids, asked.resumption.num_characters) == ([2, 3], 2)
    assert 59.0 < asked.timeout_s < 60.0
