"""Batches against a real local server: a line for a line, whatever happens on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stub_server import Stub, serve_stub

from eft_serve.batches.client import retry_after_s
from eft_serve.batches.lines import parse_line

KEY = "eft-a-secret-key"


def request(custom_id: str, prompt: str | None = None, **changes: Any) -> str:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt or custom_id}}
    return json.dumps(line | changes)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(source: Path, output: Path, url: str, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "eft_serve.jobs.batch"),
        *("--input", str(source), "--output", str(output), "--base-url", url, *options),
    ]


def run(source: Path, output: Path, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EFT_SERVE_API_KEY": KEY}
    return subprocess.run(
        command(source, output, url, *options), capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serve_stub(Stub()) as stub:
        yield stub


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_each_line_in_gets_one_line_out(tmp_path: Path, output: Path, stub: Stub) -> None:
    source = write(
        tmp_path / "in.jsonl",
        request("a"),
        "",
        "not json",
        request("streams", body={"prompt": "x", "stream": True}),
        request("elsewhere", url="/v1/embeddings"),
        request("b", "bad"),
        request("c"),
    )
    done = run(source, output, stub.url)
    assert done.returncode == 0, done.stderr
    lines = {line["custom_id"]: line for line in read(output)}
    assert len(lines) == len(read(output)) == 6
    assert lines["a"] == {
        "id": "line-1",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "req-a",
            "body": {"choices": [{"text": "answer to a"}]},
        },
        "error": None,
    }
    assert lines["b"]["response"]["status_code"] == 400
    assert {key: lines[key]["error"]["code"] for key in (None, "streams", "elsewhere")} == dict.fromkeys(
        (None, "streams", "elsewhere"), "invalid_line"
    )
    summary = json.loads(done.stdout.splitlines()[-1])
    seconds = summary.pop("seconds")
    assert seconds > 0
    assert summary == {"lines": 6, "kept": 0, "succeeded": 2, "failed": 1, "invalid": 3, "unreached": 0}
    assert stub.keys == {f"Bearer {KEY}"}
    assert KEY not in done.stdout + done.stderr + output.read_text()


def test_an_invalid_line_is_no_namesake_of_a_custom_id_and_both_are_kept(
    tmp_path: Path, output: Path, stub: Stub
) -> None:
    source = write(tmp_path / "in.jsonl", request("line 3"), request("line-3"), "not json")
    for _ in range(2):
        assert run(source, output, stub.url).returncode == 0
    assert [line["custom_id"] for line in read(output)] in (
        ["line 3", "line-3", None],
        ["line-3", "line 3", None],
        [None, "line 3", "line-3"],
        [None, "line-3", "line 3"],
        ["line 3", None, "line-3"],
        ["line-3", None, "line 3"],
    )
    assert len(stub.asked) == 2


def test_a_killed_batch_goes_on_where_it_was(tmp_path: Path, output: Path, stub: Stub) -> None:
    names = [f"r{i}" for i in range(40)]
    source = write(tmp_path / "in.jsonl", *map(request, names))
    stub.delay_s = 0.1
    with subprocess.Popen(command(source, output, stub.url, "--concurrency", "2")) as process:
        deadline = time.monotonic() + 30
        while not (output.exists() and output.read_bytes().count(b"\n") >= 5):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    kept = [line["custom_id"] for line in read(output)]
    assert 5 <= len(kept) < len(names)
    with output.open("ab") as file:
        file.write(b'{"id": "line-40", "custom_id": "r3')  # as if killed within a write
    stub.delay_s = 0.0
    done = run(source, output, stub.url)
    assert done.returncode == 0, done.stderr
    assert sorted(line["custom_id"] for line in read(output)) == sorted(names)
    assert [line["custom_id"] for line in read(output)][: len(kept)] == kept
    assert json.loads(done.stdout)["kept"] == len(kept)
    assert all(stub.asked[name] == 1 for name in kept)


def test_429_and_503_are_asked_again_when_the_server_says(tmp_path: Path, output: Path, stub: Stub) -> None:
    stub.refusals = {"a": [(429, {"retry-after": "1"})], "b": [(503, {}), (503, {})]}
    source = write(tmp_path / "in.jsonl", request("a"), request("b"))
    started = time.monotonic()
    done = run(source, output, stub.url)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started >= 1
    assert stub.asked == {"a": 2, "b": 3}
    assert [line["response"]["status_code"] for line in read(output)] == [200, 200]


def test_what_could_not_be_reached_is_said_and_tried_again_by_the_next_run(
    tmp_path: Path, output: Path, stub: Stub
) -> None:
    stub.refusals = {"a": [(429, {"retry-after": "3600"})]}
    source = write(tmp_path / "in.jsonl", request("a"), request("b"), "nonsense")
    done = run(source, output, stub.url, "--timeout-s", "5")
    assert done.returncode == 1
    last = read(output)[-1]
    assert (last["custom_id"], last["response"], last["error"]["code"]) == ("a", None, "unreached")
    assert stub.asked["a"] == 1  # an hour is beyond the deadline: no use to wait
    done = run(source, output, stub.url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kept"] == 2
    assert sorted(str(line["custom_id"]) for line in read(output)) == ["None", "a", "b"]
    assert all(line["error"] is None for line in read(output) if line["custom_id"])
    assert stub.asked["b"] == 1


def test_a_server_that_stays_busy_is_asked_until_the_deadline(tmp_path: Path, output: Path, stub: Stub) -> None:
    stub.refusals = {"a": [(503, {})] * 1000}
    source = write(tmp_path / "in.jsonl", request("a"))
    started = time.monotonic()
    done = run(source, output, stub.url, "--timeout-s", "2")
    assert done.returncode == 1, done.stderr
    assert 2 <= stub.asked["a"] < 20
    assert time.monotonic() - started < 20
    assert "status 503" in read(output)[0]["error"]["message"]
    assert json.loads(done.stdout)["unreached"] == 1


def test_no_server_at_all_ends_within_the_deadline(tmp_path: Path, output: Path) -> None:
    with serve_stub(Stub()) as gone:
        pass
    source = write(tmp_path / "in.jsonl", request("a"))
    done = run(source, output, gone.url, "--timeout-s", "0.5")
    assert done.returncode == 1, done.stderr
    assert "ConnectError" in read(output)[0]["error"]["message"]


def test_concurrency_is_bounded(tmp_path: Path, output: Path, stub: Stub) -> None:
    stub.delay_s = 0.05
    source = write(tmp_path / "in.jsonl", *(request(f"r{i}") for i in range(20)))
    assert run(source, output, stub.url, "--concurrency", "3").returncode == 0
    assert stub.most_running == 3


@pytest.mark.parametrize(
    ("lines", "url", "said"),
    [
        ([request("a"), request("b"), request("a", "other")], None, "lines 1 and 3 both have custom_id 'a'"),
        ([request("a")], "http://127.0.0.1:1/v1", "without /v1"),
        ([request("a")], "127.0.0.1:1", "http(s)://"),
        ([request("a")], "http://", "http(s)://"),
        ([request("a")], "http://127.0.0.1:many", "--base-url"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_sent(
    tmp_path: Path, output: Path, stub: Stub, lines: list[str], url: str | None, said: str
) -> None:
    done = run(write(tmp_path / "in.jsonl", *lines), output, url or stub.url)
    assert done.returncode == 2
    assert said in done.stderr
    assert not stub.asked
    assert not output.exists()


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY} ", f"{KEY}é"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(
    tmp_path: Path, output: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OTHER_KEY", key)
    done = run(write(tmp_path / "in.jsonl", request("a")), output, stub.url, "--api-key-env", "OTHER_KEY")
    assert done.returncode == 2
    assert "OTHER_KEY" in done.stderr
    assert KEY not in done.stdout + done.stderr
    assert not stub.asked


def test_another_inputs_output_is_refused_and_not_touched(tmp_path: Path, output: Path, stub: Stub) -> None:
    assert run(write(tmp_path / "one.jsonl", request("a")), output, stub.url).returncode == 0
    before = output.read_bytes()
    done = run(write(tmp_path / "two.jsonl", request("b")), output, stub.url)
    assert done.returncode == 2
    assert "'a'" in done.stderr
    assert output.read_bytes() == before
    done = run(write(tmp_path / "missing.jsonl"), write(output, "no answer"), stub.url)
    assert done.returncode == 2
    assert output.read_text() == "no answer\n"


def test_two_batches_cannot_write_one_output(tmp_path: Path, output: Path, stub: Stub) -> None:
    stub.delay_s = 5
    source = write(tmp_path / "in.jsonl", request("a"))
    with subprocess.Popen(command(source, output, stub.url)) as first:
        deadline = time.monotonic() + 30
        while not stub.asked:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        done = run(source, output, stub.url)
        first.kill()
    assert done.returncode == 2
    assert "another batch" in done.stderr


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)))
def test_a_body_is_passed_on_as_it_was(body: dict[str, Any]) -> None:
    body.pop("stream", None)
    line = parse_line(1, request("a", body=body).encode())
    assert line.mistake is None
    assert json.loads(line.body) == body


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_line_is_a_request_or_has_a_mistake(raw: bytes) -> None:
    assert parse_line(1, raw).mistake


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "[" * 100_000])
def test_what_only_python_takes_for_json_is_refused(number: str) -> None:
    raw = request("a").replace('"a"}', f'"a", "temperature": {number}}}')
    assert number in raw
    line = parse_line(7, raw.encode())
    assert line.mistake is not None
    assert line.mistake.startswith("line 7 is not JSON")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 0), ("7", 7), ("-7", 0), ("soon", 0), ("nan", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_retry_after(header: str | None, seconds: float) -> None:
    assert retry_after_s(header) == seconds


def test_retry_after_a_date_to_come() -> None:
    assert retry_after_s("Fri, 01 Jan 2100 00:00:00 GMT") > 1e8
