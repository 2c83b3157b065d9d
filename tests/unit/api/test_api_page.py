"""docs/api.md says what the server does: its examples are answered, its table of parameters is that of the schemas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import openai.types
import openai.types.chat
import openai.types.responses
import pytest
from openapi_checks import full_answer, make_stack

from eft_serve.api.parameter_names import OPENAI, VLLM
from eft_serve.api.parameters import BEGIN, BODIES, END, HEAD, rewritten, table
from eft_serve.api.schemas import VLLM_NO_OPS

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
CLIENT = {
    "chat": openai.types.chat.completion_create_params,
    "text": openai.types.completion_create_params,
    "responses": openai.types.responses.response_create_params,
}
EXAMPLES = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_pages_table_is_that_of_the_schemas() -> None:
    page = PAGE.read_text()
    assert rewritten(page) == page, "run python -m eft_serve.api.parameters docs/api.md"
    assert table().startswith(HEAD)


def test_every_parameter_of_the_schemas_is_in_the_table_and_says_what_it_does() -> None:
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table().splitlines()[2:]]
    assert {len(row) for row in rows} == {6}
    names = {row[0].strip("`") for row in rows}
    assert names >= {name for body in BODIES.values() for name in body.model_fields.keys() | body.NO_OPS.keys()}
    assert names >= {name for known in (*OPENAI.values(), *VLLM.values()) for name in known}
    assert [row for row in rows if row[4] == "served" and not row[5]] == []
    assert {row[4].split()[0] for row in rows} == {"served", "not", "only", "refused"}


def test_a_page_without_a_place_for_the_table_is_an_error() -> None:
    assert rewritten(f"a\n{BEGIN}old\n{END}b") == f"a\n{BEGIN}\n{table()}\n{END}b"
    with pytest.raises(ValueError, match="no lines"):
        rewritten(f"a\n{BEGIN}old")


@pytest.mark.parametrize("endpoint", BODIES)
def test_the_names_of_openai_are_those_of_its_client(endpoint: str) -> None:
    kinds = [kind for name, kind in vars(CLIENT[endpoint]).items() if re.fullmatch(r"\w+CreateParams\w+", name)]
    assert len(kinds) >= 3
    assert set(OPENAI[endpoint]) == {name for kind in kinds for name in get_type_hints(kind)}


def test_what_is_taken_of_vllm_is_known_to_be_vllms() -> None:
    for endpoint in ("chat", "text"):
        assert VLLM[endpoint] >= VLLM_NO_OPS.keys()


@pytest.mark.parametrize("example", EXAMPLES)
async def test_the_pages_examples_are_answered(tmp_path: Path, example: str) -> None:
    fields = json.loads(example.replace("tuned-small", "small-chat"))
    path = "/v1/completions" if "prompt" in fields else "/v1/chat/completions"
    rest: dict[str, Any] = {"model": "up"} if "prompt" in fields else {"model": "up", "messages": [MESSAGE]}
    async with make_stack(tmp_path, full_answer).client() as client:
        response = await client.post(path, json=rest | fields)
    assert response.status_code == 200, response.text


MESSAGE = {"role": "user", "content": "hi"}


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) >= 6
