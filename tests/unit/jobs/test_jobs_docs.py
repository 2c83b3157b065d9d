"""The examples in the documentation are what the code reads and writes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from eft_serve.batches.lines import Line, answer, parse_line
from eft_serve.jobs.batch import Summary

DOCS = Path(__file__).parent.parent.parent.parent / "docs" / "jobs.md"


def test_the_examples_in_the_docs() -> None:
    request, answered, summary = re.findall(r"```json\n(.+)\n```", DOCS.read_text())
    line = parse_line(1, request.encode())
    assert line.mistake is None
    response = json.loads(answered.replace("[…]", "[]"))
    assert response == answer(Line(1, line.custom_id), 200, "…", {"choices": []})
    assert list(json.loads(summary)) == [field.name for field in dataclasses.fields(Summary)]
