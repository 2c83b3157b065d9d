"""Documents under random JSON schemas: whatever the tokens, a finished one is valid."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest

from eft_serve.api.model_tokenizer import ModelTokenizer
from eft_serve.config import ZOO_CHECKPOINTS
from eft_serve.errors import InvalidRequestError
from eft_serve.grammars.definitions import of_json_schema, of_regex
from eft_serve.grammars.matcher import GrammarTokenizer
from eft_serve.types import Grammar

NAMES = ["name", "id", "größe", "a b", 'q"q', "items", "$ref", "type", "x-1"]
VALUES: list[Any] = ["red", "", "né", 'say "hi"\n', 0, -1.5, 10**12, True, None, {"k": [1]}, ["a"]]


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    return ModelTokenizer.load(ZOO_CHECKPOINTS / "tuned-small")


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    kinds: list[Callable[[random.Random, int], dict[str, Any]]] = [_string, _number, _value]
    if depth:
        kinds += [_object, _object, _array, _union, _reference]
    return rng.choice(kinds)(rng, depth - 1)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 5)
    return {
        "type": "string",
        **rng.choice(
            [
                {},
                {"minLength": low, "maxLength": low + rng.randint(0, 20)},
                {"pattern": rng.choice(["^[a-f0-9]{4}$", "^(yes|no)$", "^[A-Z][a-z]*( [A-Z]\\.)?$"])},
                {"format": rng.choice(["date", "uuid", "ipv4"])},
            ]
        ),
    }


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    bounds = rng.choice(
        [{}, {"minimum": low, "maximum": low + rng.randint(0, 90)}, {"exclusiveMinimum": low}, {"multipleOf": 3}]
    )
    return {"type": rng.choice(["integer", "number"]) if "multipleOf" not in bounds else "integer", **bounds}


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(
        [
            {"enum": rng.sample(VALUES, rng.randint(1, 5))},
            {"const": rng.choice(VALUES)},
            {"type": rng.choice(["boolean", "null"])},
            {"type": ["string", "null"]},
        ]
    )


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 4))
    extra = rng.choice([False, False, False, True, {"type": "integer"}])
    return {
        "type": "object",
        "title": "Anything",
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": extra,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    bounds = rng.choice([{}, {"minItems": low, "maxItems": low + rng.randint(0, 2)}])
    if rng.random() < 0.2:
        return {"type": "array", "prefixItems": [random_schema(rng, depth) for _ in range(2)], "items": False}
    return {"type": "array", "items": random_schema(rng, depth), **bounds}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth) for _ in range(rng.randint(1, 3))]}


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{rng.choice('ab')}"}


def whole_schema(seed: int) -> dict[str, Any]:
    """A schema with definitions, one of which refers to itself."""
    rng = random.Random(seed)
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]}}}
    definitions = {"a": random_schema(rng, 0), "b": node | {"required": ["next"], "additionalProperties": False}}
    return {"$defs": definitions, **random_schema(rng)}


def any_document(tokenizer: ModelTokenizer, schema: dict[str, Any], rng: random.Random) -> str | None:
    """One of tokens drawn at random, rather short ones; None where it has no end."""
    grammars = tokenizer.grammars
    assert isinstance(grammars, GrammarTokenizer)
    matcher = grammars.matcher(Grammar(of_json_schema(schema), "p"))
    token_ids: list[int] = []
    while len(token_ids) < 300 and not matcher.is_finished:
        bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
        possible = [int(i) for i in np.flatnonzero(bits) if i < tokenizer.num_ids]
        if matcher.is_complete and (not possible or rng.random() < 0.5):
            break
        closing = [i for i in possible if tokenizer.bytes_of(i).strip()[:1] in (b'"', b"}", b"]")]
        token_ids.append(rng.choice(closing if closing and rng.random() < 0.4 else possible))
        assert matcher.advance(token_ids[-1:]) == 1
    return b"".join(map(tokenizer.bytes_of, token_ids)).decode() if matcher.is_complete else None


@pytest.mark.parametrize("block", range(10))
def test_a_finished_document_is_valid_under_its_schema(tokenizer: ModelTokenizer, block: int) -> None:
    """A thousand schemas in all."""
    num_finished = num_refused = 0
    for seed in range(100 * block, 100 * block + 100):
        schema = whole_schema(seed)
        try:
            document = any_document(tokenizer, schema, random.Random(seed))
        except InvalidRequestError:
            num_refused += 1
            continue
        if document is not None:
            num_finished += 1
            jsonschema.validate(json.loads(document), schema, format_checker=jsonschema.FormatChecker())
    assert num_finished >= 80
    assert num_refused <= 5


@pytest.mark.parametrize("schema", [{"not": {}}, {"uniqueItems": True, "type": "array"}, {"if": {}}])
def test_what_cannot_be_enforced_is_refused(tokenizer: ModelTokenizer, schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(schema))):
        any_document(tokenizer, schema, random.Random(0))


def test_a_schema_cannot_change_how_it_is_compiled(tokenizer: ModelTokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="not"):
        any_document(tokenizer, {"x-guidance": {"lenient": True}, "not": {}}, random.Random(0))


def test_blanks_between_json_tokens_come_to_an_end(tokenizer: ModelTokenizer) -> None:
    grammars = tokenizer.grammars
    assert isinstance(grammars, GrammarTokenizer)
    matcher = grammars.matcher(Grammar(of_json_schema({"type": "object"}), "p"))
    newline, space, brace = (tokenizer.encode(text, False, "p", 99)[-1] for text in ("\n", " ", "{"))
    assert matcher.advance([brace, newline, *[space] * 64]) == 66
    assert matcher.advance([space]) == matcher.advance([newline]) == 0


def test_every_token_is_allowed_after_which_the_text_can_be_completed(tokenizer: ModelTokenizer) -> None:
    grammars = tokenizer.grammars
    assert isinstance(grammars, GrammarTokenizer)
    matcher = grammars.matcher(Grammar(of_regex("answer!"), "p"))
    text = b""
    while not matcher.is_finished:
        bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
        allowed = {int(i) for i in np.flatnonzero(bits) if i < tokenizer.num_ids}
        rest = b"answer!"[len(text) :]
        tokens = {
            i for i in range(tokenizer.num_ids) if tokenizer.bytes_of(i) and rest.startswith(tokenizer.bytes_of(i))
        }
        assert allowed == tokens
        shortest = min(tokens, key=lambda i: len(tokenizer.bytes_of(i)))
        matcher.advance([shortest])
        text += tokenizer.bytes_of(shortest)
    assert text == b"answer!"
