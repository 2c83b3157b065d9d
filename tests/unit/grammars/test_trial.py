"""Grammars that would hang or kill the process that compiles them."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from eft_serve.errors import InvalidRequestError
from eft_serve.grammars.definitions import of_json_schema, of_regex
from eft_serve.grammars.trial import GrammarTrial
from eft_serve.types import Grammar

PATTERNS = [{"pattern": f".*x.{{{i}}}y.*"} for i in range(40)]
HOSTILE = {
    "all of forty patterns, in turn exponential": of_json_schema({"type": "string", "allOf": PATTERNS}),
    "a chain of rules": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(4500)) + '\na4500: "x"',
    "a chain of terminals": "start: A0\n" + "\n".join(f"A{i}: A{i + 1}" for i in range(4500)) + '\nA4500: "x"',
}
GOOD = Grammar(of_regex("[a-z]{3}"), "structured_outputs.regex")


@pytest.fixture
def trial() -> Iterator[GrammarTrial]:
    trial = GrammarTrial()
    yield trial
    trial.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_grammar_that_cannot_be_compiled_in_time_is_refused_and_harms_nobody(trial: GrammarTrial, name: str) -> None:
    trial.check(GOOD)
    started = time.process_time()
    with pytest.raises(InvalidRequestError, match="too complex") as caught:
        trial.check(Grammar(HOSTILE[name], "structured_outputs.json", of_schemas=True))
    assert caught.value.param == "structured_outputs.json"
    assert time.process_time() - started < 0.5, "it was not compiled here"
    trial.check(GOOD)


def test_a_grammar_with_a_mistake_is_left_to_the_compiler_that_explains_it(trial: GrammarTrial) -> None:
    trial.check(Grammar(of_regex("["), "structured_outputs.regex"))


def test_a_process_that_has_ended_is_started_again(trial: GrammarTrial) -> None:
    trial.check(GOOD)
    assert trial._process is not None
    trial._process.kill()
    trial._process.wait()
    trial.check(GOOD)


def test_a_process_that_does_not_answer_is_not_waited_for_long(
    trial: GrammarTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial.check(GOOD)
    assert trial._process is not None
    monkeypatch.setattr("eft_serve.grammars.trial.MAX_WAIT_S", 0.2)
    trial._process.send_signal(signal.SIGSTOP)
    with pytest.raises(InvalidRequestError, match="too complex"):
        trial.check(GOOD)
    monkeypatch.undo()
    trial.check(GOOD)
