"""`/tokenize` and `/detokenize`: vLLM's shapes, and the tokens that a generation would count."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_fakes import Stack, make_config

from eft_serve.api.model_tokenizer import ModelTokenizer
from eft_serve.api.prompts import INLINE_CHARACTERS
from eft_serve.tenancy.keys import hash_key

USER = {"role": "user", "content": "hi"}


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path))


async def post(stack: Stack, path: str, model: str = "small", **body: Any) -> Any:
    async with stack.client() as client:
        return await client.post(path, json={"model": model} | body)


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_a_text_has_vllms_answer(stack: Stack, prefix: str) -> None:
    response = await post(stack, f"{prefix}/tokenize", prompt="hé", return_token_strs=True)
    assert response.json() == {
        "count": 4,
        "max_model_len": 512,
        "tokens": [0, 72, 128, 103],
        "token_strs": ["<s>", "h", "Ã", "©"],
    }
    back = await post(stack, f"{prefix}/detokenize", tokens=response.json()["tokens"])
    assert back.json() == {"prompt": "<s>hé"}
    assert stack.service.requests == []


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "hi"}, "<s>hi"),
        ({"prompt": "hi", "add_special_tokens": False}, "hi"),
        ({"prompt": "", "add_special_tokens": False}, ""),
        ({"messages": [USER]}, "<|user|>hi\n<|assistant|>"),
        ({"messages": [USER], "add_generation_prompt": False}, "<|user|>hi\n"),
        ({"messages": [USER], "add_special_tokens": True}, "<s><|user|>hi\n<|assistant|>"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a "}], "continue_final_message": True},
            "<|user|>hi\n<|assistant|>a ",
        ),
        ({"messages": [USER], "model": "large"}, "<s>User: hi\nAssistant:"),
        ({"messages": [USER], "model": "up"}, "<s>User: hi\nAssistant:"),
        ({"messages": [USER], "model": "down"}, "<|user|>hi\n<|assistant|>"),
    ],
)
async def test_what_is_read_is_what_a_generation_reads(stack: Stack, body: dict[str, Any], text: str) -> None:
    answer = (await post(stack, "/tokenize", **body)).json()
    assert answer["token_strs"] is None
    assert answer["count"] == len(answer["tokens"]) == len(text) - 2 * text.count("<s>")
    tokens = answer["tokens"]
    assert (await post(stack, "/detokenize", tokens=tokens)).json()["prompt"] == text
    if "messages" in body:
        usage = (await post(stack, "/v1/chat/completions", **body)).json()["usage"]
        assert usage["prompt_tokens"] == answer["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [USER | {"content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        ("/tokenize", {"messages": [USER], "tools": [{}]}, "tools"),
        ("/tokenize", {"messages": [USER], "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": [USER], "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs.tools"),
        ("/tokenize", {"messages": [USER], "chat_template_kwargs": {"nope": 1}}, "chat_template_kwargs.nope"),
        ("/tokenize", {"messages": [USER], "continue_final_message": True}, "messages"),
        (
            "/tokenize",
            {"messages": [USER], "continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ("/tokenize", {"prompt": "a", "foo": 1}, "foo"),
        ("/tokenize", {"prompt": "x" * 200_000}, "prompt"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**63]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/detokenize", {"tokens": [1] * 131_073}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
async def test_a_wrong_field_is_named(stack: Stack, path: str, body: dict[str, Any], param: str) -> None:
    response = await post(stack, path, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_a_text_longer_than_the_context_is_counted(stack: Stack) -> None:
    assert (await post(stack, "/tokenize", prompt="x" * 100_000)).json()["count"] == 100_001


async def test_a_model_must_be_named_and_known(stack: Stack) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        async with stack.client() as client:
            assert (await client.post(path, json=body)).json()["error"]["param"] == "model"
        assert (await post(stack, path, model="nobody", **body)).status_code == 404


async def test_long_texts_leave_the_event_loop_free(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    encode, decode = ModelTokenizer.encode, ModelTokenizer.decode

    def noted(work: Any) -> Any:
        def run(*args: Any) -> Any:
            threads.add(threading.get_ident())
            return work(*args)

        return run

    monkeypatch.setattr(ModelTokenizer, "encode", noted(encode))
    monkeypatch.setattr(ModelTokenizer, "decode", noted(decode))
    await post(stack, "/tokenize", prompt="x" * (INLINE_CHARACTERS + 1))
    await post(stack, "/detokenize", tokens=[1] * (INLINE_CHARACTERS + 1))
    assert threads
    assert threading.get_ident() not in threads


async def test_a_tenant_needs_a_key_the_models_permission_and_room_in_its_rate(tmp_path: Path) -> None:
    tenants = {"a": {"keys": [hash_key("key")], "recipes": ["small"], "requests_per_minute": 2}}
    (tmp_path / "tenants.yaml").write_text(yaml.safe_dump({"tenants": tenants}))
    stack = Stack(make_config(tmp_path, tenants_file=str(tmp_path / "tenants.yaml")))
    for path, body in (("/tokenize", {"prompt": "a"}), ("/v1/detokenize", {"tokens": [1]})):
        assert (await post(stack, path, **body)).status_code == 401
        async with stack.client(headers={"Authorization": "Bearer key"}) as client:
            assert (await client.post(path, json={"model": "up"} | body)).status_code == 404
            assert (await client.post(path, json={"model": "small"} | body)).status_code == 200
    async with stack.client(headers={"Authorization": "Bearer key"}) as client:
        assert (await client.post("/tokenize", json={"model": "small", "prompt": "a"})).status_code == 429
