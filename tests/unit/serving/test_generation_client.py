"""An ingress's client on real sockets, with a real coordinator over models that count."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import pytest
from counting_models import EFT, LENGTH, CountingBackend
from waiting import until

from eft_serve.errors import InvalidRequestError, UnavailableError
from eft_serve.grammars.definitions import of_regex
from eft_serve.serving import generation_client
from eft_serve.serving.coordinator_server import CoordinatorServer
from eft_serve.serving.generation_client import GenerationClient
from eft_serve.types import FinishReason, GenerationRequest, Grammar, Listener, SamplingParams


@pytest.fixture
async def client(server: CoordinatorServer) -> AsyncIterator[GenerationClient]:
    client = GenerationClient()
    server.connect_ingress(client.public_key, client.reply_to)
    listener = Listener(replica_id="one", address=server.submissions.address, public_key=server.submissions.public_key)
    client.set_coordinators({"one": listener})
    yield client
    client.close()


def request(request_id: str = "r", max_tokens: int = 5) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        combination=EFT,
        prompts={"base": [0, 1], "tuned": [1]},
        sampling=SamplingParams(temperature=0, max_tokens=max_tokens),
    )


async def test_a_request_waits_for_its_coordinator_and_its_last_delta_has_the_usage(client: GenerationClient) -> None:
    deltas = [delta async for delta in client.generate(request())]
    assert [token for delta in deltas for token in delta.token_ids] == [2, 3, 4, 5, 6]
    usage = deltas[-1].usage
    assert usage is not None
    assert {model: used.prompt_tokens for model, used in usage.models.items()} == {"base": 2, "tuned": 1}
    assert {used.completion_tokens for used in usage.models.values()} == {5}
    assert {model: used.computed_tokens for model, used in usage.models.items()} == {"base": 6, "tuned": 5}
    client.check()


async def test_requests_side_by_side_get_their_own_tokens(client: GenerationClient) -> None:
    async def tokens(name: str, count: int) -> list[int]:
        return [token async for delta in client.generate(request(name, count)) for token in delta.token_ids]

    answers = await asyncio.gather(*(tokens(f"r{count}", count) for count in range(1, 6)))
    assert answers == [[2, 3, 4, 5, 6][:count] for count in range(1, 6)]


async def test_a_reader_that_stops_ends_its_request_everywhere(
    client: GenerationClient, server: CoordinatorServer, backend: CountingBackend
) -> None:
    async with aclosing(client.generate(request(max_tokens=LENGTH // 2))) as deltas:
        await anext(deltas)
        assert backend.sequences == {"r/base", "r/tuned"}
    await until(lambda: not backend.sequences and not server.subscribers)
    assert client._collectors == {}


async def test_a_request_without_a_coordinator_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_client, "FIND_TIMEOUT_S", 0.05)
    client = GenerationClient()
    try:
        with pytest.raises(UnavailableError):
            await anext(client.generate(request()))
    finally:
        client.close()


async def test_an_end_is_logged_with_its_timeline(client: GenerationClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "eft_serve.serving.coordinator_server")
    async for _ in client.generate(request()):
        pass
    (line,) = [record.getMessage() for record in caplog.records if "ended" in record.getMessage()]
    assert "request r of tenant anonymous ended (length): queued 0.000, scheduled" in line
    assert "first_token" in line


async def test_an_id_that_is_open_already_is_refused_and_the_open_request_goes_on(
    client: GenerationClient, server: CoordinatorServer
) -> None:
    first = client.generate(request("r", max_tokens=50))
    started = await anext(first)
    with pytest.raises(InvalidRequestError, match="'r' is open already"):
        await anext(client.generate(request("r", max_tokens=1)))
    rest = [delta async for delta in first]
    assert len([token for delta in (started, *rest) for token in delta.token_ids]) == 50


def with_grammar(request_id: str, definition: str) -> GenerationRequest:
    plain = request(request_id)
    sampling = msgspec.structs.replace(plain.sampling, grammar=Grammar(definition, "structured_outputs.regex"))
    return msgspec.structs.replace(plain, sampling=sampling)


async def test_an_answer_follows_its_grammar_and_ends_with_it(client: GenerationClient) -> None:
    deltas = [delta async for delta in client.generate(with_grammar("r", of_regex("[0-7]{3}")))]
    assert "".join(delta.text for delta in deltas) == "234"
    assert deltas[-1].finish_reason is FinishReason.STOP


async def test_a_grammar_that_cannot_be_used_is_an_error_of_its_request(
    client: GenerationClient, server: CoordinatorServer
) -> None:
    with pytest.raises(InvalidRequestError, match=r"structured_outputs\.regex: cannot be used"):
        await anext(client.generate(with_grammar("r", of_regex("["))))
    assert server.subscribers == {}


async def test_a_grammar_that_takes_long_holds_up_no_other_request(
    client: GenerationClient, server: CoordinatorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, compile_it = threading.Event(), server._grammars.matcher
    monkeypatch.setattr(server._grammars, "matcher", lambda each: go_on.wait() and compile_it(each))
    slow = asyncio.ensure_future(anext(client.generate(with_grammar("slow", of_regex("[0-7]{3}")))))
    async with aclosing(client.generate(with_grammar("aborted", of_regex("[0-7]+")))) as aborted:
        starting = asyncio.ensure_future(anext(aborted))
        deltas = [delta async for delta in client.generate(request("other"))]
        assert len([token for delta in deltas for token in delta.token_ids]) == 5
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    await until(lambda: "aborted" not in server.subscribers)
    go_on.set()
    assert (await slow).token_ids[0] == 2
    await until(lambda: not server.decode_loop.num_requests)
