"""What a message may hold, and what a wrong part is called in the error."""

from __future__ import annotations

from typing import Any

import pytest

from eft_serve.api.body import validate
from eft_serve.api.schemas import ChatBody
from eft_serve.errors import InvalidRequestError

TEXT = {"type": "text", "text": "a"}


def body(role: str, content: Any) -> ChatBody:
    messages = [{"role": "user", "content": "x"}, {"role": role, "content": content}]
    return validate(ChatBody, {"model": "m", "messages": messages})


@pytest.mark.parametrize(
    ("role", "content", "text"),
    [
        ("user", [TEXT], "a"),
        ("system", [TEXT, {"type": "text", "text": "b", "cache_control": None}], "a\nb"),
        ("assistant", [{"type": "refusal", "refusal": "No."}], "No."),
        ("assistant", [TEXT, {"type": "refusal", "refusal": "No."}], "a\nNo."),
        ("developer", "plain", "plain"),
    ],
)
def test_parts_of_text_are_joined(role: str, content: Any, text: str) -> None:
    assert body(role, content).messages[1].rendered["content"] == text


@pytest.mark.parametrize(
    ("role", "content", "param", "said"),
    [
        ("user", [TEXT, {"type": "image_url", "image_url": {"url": "https://x"}}], ".1", "text-only"),
        ("user", [{"type": "input_audio", "input_audio": {}}], ".0", "text-only"),
        ("user", [{"type": "file", "file": {}}], ".0", "text-only"),
        ("user", [{"type": "refusal", "refusal": "No."}], ".0", "only an assistant"),
        ("user", [{"type": "text"}], ".0.text", "must be a string"),
        ("user", [{"type": "text", "text": 1}], ".0.text", "must be a string"),
        ("user", [TEXT | {"cache_control": {}}], ".0.cache_control", "unknown parameter"),
        ("user", ["a"], ".0", "must be an object"),
        ("user", [{"type": ["text"]}], ".0", "must be an object"),
        ("user", [], "", "at least one part"),
        ("assistant", None, "", "must be a string"),
    ],
)
def test_a_wrong_part_is_named(role: str, content: Any, param: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said) as caught:
        body(role, content)
    assert caught.value.param == f"messages.1.content{param}"
