"""No generated request gets an answer that `/openapi.json` does not describe."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_fakes import Stack
from hypothesis import HealthCheck, given, settings
from openapi_checks import full_answer, make_stack

schemathesis = pytest.importorskip("schemathesis", reason="requests are generated where it is installed")
checks = importlib.import_module("schemathesis.specs.openapi.checks")

NUM_EXAMPLES = int(os.environ.get("EFT_GENERATED_REQUESTS", "25"))  # of each endpoint and mode; 120 are 2,040 in all
FILES, BATCHES, CANCEL = "/v1/files", "/v1/batches", "/v1/batches/{batch_id}/cancel"
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/score",
    "/v1/tokenize",
    "/v1/detokenize",
    FILES,
    BATCHES,
)


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    made = make_stack(tmp_path, full_answer)
    made.service.context_length = 2**40
    return made


@pytest.mark.parametrize(
    ("path", "mode"), [(path, mode) for path in PATHS for mode in ("POSITIVE", "NEGATIVE")] + [(CANCEL, "POSITIVE")]
)
def test_a_generated_request_gets_an_answer_that_is_described(stack: Stack, path: str, mode: str) -> None:
    operation = schemathesis.openapi.from_dict(stack.app.openapi())[path]["POST"]
    statuses: set[int] = set()

    @settings(max_examples=NUM_EXAMPLES, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and may_be_a_name(case.body.get("model")):
            case.body["model"] = "up"  # otherwise nearly every answer would be 404
        if isinstance(case.body, dict) and may_be_a_name(case.body.get("input_file_id")):
            case.body["input_file_id"] = file_id
        response = runner.run(post(case.as_transport_kwargs(base_url="http://localhost")))
        # what is described may still be refused: some fields depend on one another
        case.validate_response(response, excluded_checks=[checks.positive_data_acceptance])
        statuses.add(response.status_code)

    async def upload() -> str:
        file = await stack.openai().files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
        return file.id

    async def post(sent: dict[str, Any]) -> httpx.Response:
        content = json.dumps(sent["json"]).encode() if "json" in sent else sent.get("data")
        async with stack.client() as client:
            parts = [(name, part_of(*part)) for name, part in sent.get("files") or ()]
            response = await client.post(sent["url"], headers=sent["headers"], content=content, files=parts)
        await response.request.aread()  # schemathesis reads it
        return response

    with asyncio.Runner() as runner:
        file_id = runner.run(upload())
        run()
    good = 404 if path == CANCEL else 200  # no batch has such an id
    assert (good in statuses) == (mode == "POSITIVE"), statuses
    assert statuses <= {good, 400, 415}


def part_of(filename: str | None, content: Any, *media_type: str) -> tuple[Any, ...]:
    """A part of a form as httpx takes it."""
    return filename, content if isinstance(content, bytes | str) else json.dumps(content), *media_type


def may_be_a_name(name: object) -> bool:
    """Whether it could be a model's name."""
    return isinstance(name, str) and len(name) <= 256
