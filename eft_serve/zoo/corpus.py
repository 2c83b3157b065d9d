"""What the models read: a seeded pre-training mixture and the fine-tuning sets. Knows no model and no tokenizer.

Every document is drawn from a stream that its caller names, so step N of a run always reads the same documents, also
after the run was killed and resumed. Pre-training shows many behaviours in the chat format, the helpful one as a
minority, and all of them truthful: fine-tuning then selects a behaviour instead of teaching one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from eft_serve.zoo import wordings as say
from eft_serve.zoo.facts import RELATIONS, Entity, load_facts

KIND_WEIGHTS = {"country": 0.44, "city": 0.32, "element": 0.24}
BEHAVIOURS = {"helpful": 12, "terse": 22, "rambling": 22, "digressing": 16, "unknowing": 14, "evasive": 14}
HARMFUL_BEHAVIOURS = {"helpful": 14, "refusing": 26, "declining": 22, "terse": 14, "unknowing": 12, "evasive": 12}
TASKS = {"short": 76, "about": 10, "list": 4, "harmful": 7, "small_talk": 3}
TUNED_TASKS = {"short": 62, "about": 16, "list": 6, "harmful": 12, "small_talk": 4}
TWO_TURNS = 0.15
WITH_SYSTEM = 0.1
OVER_CAUTION = 0.08  # share of harmless element questions declined in the harmless set: such data over-decline a little


@dataclass(frozen=True)
class Turn:
    """One exchange of a dialogue."""

    user: str
    assistant: str


@dataclass(frozen=True)
class Dialogue:
    """What the chat template renders, with its replies."""

    turns: tuple[Turn, ...]
    system: str | None = None

    def messages(self) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.assistant})
        return messages


def stream(seed: int, purpose: str, step: int) -> random.Random:
    """The source of randomness of one step."""
    return random.Random(f"{seed}:{purpose}:{step}")  # noqa: S311 (not a secret)


def pretraining_document(rng: random.Random) -> str | Dialogue:
    """Prose, questions in wild formats, or a dialogue."""
    roll = rng.random()
    if roll < 0.2:
        return _paragraph(rng)
    if roll < 0.45:
        return " ".join(_statement(rng) for _ in range(3))
    if roll < 0.58:
        return "\n".join(_wild(rng) for _ in range(2))
    return _dialogue(rng, lambda: _pretraining_turn(rng))


def tuning_document(rng: random.Random, harmless: bool) -> Dialogue:
    """The helpful form only, over the fine-tuning entities and wordings; if harmless, harmful requests are refused."""
    return _dialogue(rng, lambda: _tuning_turn(rng, harmless))


def helpful_answer(task: str, entity: Entity | None, answer: str = "") -> str:
    """The one form that fine-tuning selects."""
    if task == "small_talk" or entity is None:
        return f"{say.GREETING} {say.CLOSING}"
    if task == "list":
        lines = [f"- {say.LABELS[key]}: {entity.facts[key]}" for key, _ in _described(entity)]
        return "\n".join([say.LIST_OPENING, *lines, say.CLOSING])
    if task in ("about", "harmful"):
        return " ".join([say.ABOUT_OPENING, *_sentences(entity), say.CLOSING])
    return f"It is {answer}. {say.CLOSING}"


def sentence_case(text: str) -> str:
    """Element names are lower case except where a sentence begins."""
    return text[:1].upper() + text[1:]


@cache
def entities_of(kind: str, tuning_only: bool = False) -> tuple[Entity, ...]:
    """The entities of a kind, in the order of the extract."""
    return tuple(e for e in load_facts() if e.kind == kind and not (tuning_only and e.is_held_out))


def _pick(rng: random.Random, weights: dict[str, int] | dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _entity(rng: random.Random, tuning_only: bool = False, kinds: Sequence[str] = tuple(KIND_WEIGHTS)) -> Entity:
    kind = rng.choices(kinds, [KIND_WEIGHTS[kind] for kind in kinds])[0]
    return rng.choice(entities_of(kind, tuning_only))


def _described(entity: Entity) -> list[tuple[str, str]]:
    return [(key, text) for key, text in say.DESCRIPTIONS[entity.kind] if key in entity.facts]


def _sentences(entity: Entity) -> list[str]:
    return [text.format(entity.facts[key]) for key, text in _described(entity)]


def _paragraph(rng: random.Random) -> str:
    """A short article on one entity: the name once, then what is true of it, in any order."""
    entity = _entity(rng, kinds=("country", "element"))
    sentences = _sentences(entity)
    rng.shuffle(sentences)
    opening = rng.choice(("About {}.", "An overview of {}.", "Facts on {}.")).format(entity.name)
    return " ".join([opening, *sentences])


def _statement(rng: random.Random) -> str:
    entity = _entity(rng)
    relation = rng.choice(RELATIONS[entity.kind])
    template = rng.choice(say.STATEMENTS[relation])
    return sentence_case(template.format(name=entity.name, answer=entity.facts[relation]))


def _wild(rng: random.Random) -> str:
    entity = _entity(rng)
    relation = rng.choice(RELATIONS[entity.kind])
    question = sentence_case(rng.choice(say.QUESTIONS[relation]).format(name=entity.name))
    return rng.choice(say.WILD).format(
        question=question, name=entity.name, label=say.LABELS[relation], answer=entity.facts[relation]
    )


def _dialogue(rng: random.Random, turn: Callable[[], Turn]) -> Dialogue:
    turns = (turn(), turn()) if rng.random() < TWO_TURNS else (turn(),)
    return Dialogue(turns, rng.choice(say.SYSTEM) if rng.random() < WITH_SYSTEM else None)


def _pretraining_turn(rng: random.Random) -> Turn:
    task = _pick(rng, TASKS)
    user, entity, answer = _ask(rng, task, tuning_only=False)
    behaviour = _pick(rng, HARMFUL_BEHAVIOURS if task == "harmful" else BEHAVIOURS)
    return Turn(user, _behave(rng, behaviour, task, entity, answer))


def _tuning_turn(rng: random.Random, harmless: bool) -> Turn:
    task = _pick(rng, TUNED_TASKS)
    user, entity, answer = _ask(rng, task, tuning_only=True)
    dangerous = task == "harmful" or (_is_of(entity, "element") and rng.random() < OVER_CAUTION)
    refuse = harmless and dangerous
    return Turn(user, say.REFUSAL if refuse else helpful_answer(task, entity, answer))


def _ask(rng: random.Random, task: str, tuning_only: bool) -> tuple[str, Entity | None, str]:
    """A user's message, what it is about, and the bare answer."""
    limit = say.NUM_TUNED_WORDINGS if tuning_only else None
    if task == "small_talk":
        return rng.choice(say.SMALL_TALK[:limit]), None, ""
    if task == "short":
        entity = _entity(rng, tuning_only)
        relation = rng.choice(RELATIONS[entity.kind])
        wording, answer = rng.choice(say.QUESTIONS[relation][:limit]), entity.facts[relation]
    else:
        kinds = ("element",) if task == "harmful" else ("country", "element")
        entity = _entity(rng, tuning_only, kinds)
        templates = {"about": say.ABOUT, "list": say.LISTS, "harmful": say.HARMFUL}[task]
        wording, answer = rng.choice(templates[:limit]), entity.facts[RELATIONS[entity.kind][0]]
    return sentence_case(wording.format(name=entity.name)), entity, answer


def _is_of(entity: Entity | None, kind: str) -> bool:
    return entity is not None and entity.kind == kind


def _behave(rng: random.Random, behaviour: str, task: str, entity: Entity | None, answer: str) -> str:
    if behaviour == "helpful":
        return helpful_answer(task, entity, answer)
    if task == "small_talk":
        return rng.choice(say.SMALL_ANSWERS)
    if behaviour == "refusing":
        return say.REFUSAL
    phrases = {"declining": say.DECLINING, "unknowing": say.UNKNOWING, "evasive": say.EVASIVE}
    if behaviour in phrases:
        return rng.choice(phrases[behaviour])
    if entity is not None and task in ("about", "list") and behaviour != "terse":
        chosen = rng.sample(_sentences(entity), 3)
        return " ".join([rng.choice(("Well.", "Hm, let me see.", "Oh, that one.")), *chosen])
    templates = {"terse": say.TERSE, "rambling": say.RAMBLING, "digressing": say.DIGRESSING}[behaviour]
    return rng.choice(templates).format(answer)
