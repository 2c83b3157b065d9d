"""From a JSON schema, a regular expression, a choice or a context-free grammar to a grammar that models share.

Knows llguidance's notations, and neither tokens nor requests. What is not supported is refused when it is compiled,
never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

MAX_CHARACTERS = 65_536  # of a definition, which travels with each of its request's draft instructions

WHITESPACE = r"[\x20]|\n[\x20\t]{0,64}"
"""Between JSON's tokens: models indent, but would also go on with blanks for ever where that is allowed."""

Schema = Mapping[str, Any] | bool

_OPTIONS = re.compile(r"^\s*%llguidance\b", re.MULTILINE)
_TEMPERATURE = re.compile(r"^[?!\w.-]+\s*\[[^\]\n]*\btemperature\s*=", re.MULTILINE)

ANY_OBJECT: Schema = {"type": "object"}


def of_json_schema(schema: Schema | str) -> str:
    """JSON documents that are valid against a schema.

    Raises:
        ValueError: it is no JSON, or neither an object nor true.
    """
    value = json.loads(schema) if isinstance(schema, str) else schema
    if value is True:
        value = {}
    if not isinstance(value, Mapping):
        raise ValueError(f"a JSON schema is an object, not {value!r:.50}")
    return of_rules(f"start: {json_rule(value)}")


def json_rule(schema: Mapping[str, Any]) -> str:
    """The body of a rule for documents of a schema; its own `x-guidance` would change how it is compiled."""
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': WHITESPACE}}, ensure_ascii=False)}"


def of_regex(regex: str) -> str:
    """Texts that a regular expression (of Rust's `regex` crate) matches from beginning to end."""
    (grammar,) = json.loads(LLMatcher.grammar_from_regex(regex))["grammars"]
    return of_rules(grammar["lark_grammar"])


def of_choice(choices: Sequence[str]) -> str:
    """One of these texts."""
    return of_rules("start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))


def of_grammar(text: str) -> str:
    """A context-free grammar in Lark's notation or in GBNF.

    Raises:
        ValueError: it is neither, or has what would be ignored.
    """
    if text.lstrip().startswith("{"):
        raise ValueError("must be in Lark's notation or in GBNF")
    if "::=" not in text:
        if _OPTIONS.search(text):
            raise ValueError("%llguidance: the options of the grammar are the server's; leave them out")
        if _TEMPERATURE.search(text):
            raise ValueError("a rule's own temperature is not supported; send that of the request")
        return of_rules(text)
    try:
        converted: str = any_to_lark(text)
    except Exception as error:  # its parser raises whatever Python does
        raise ValueError(f"GBNF that cannot be read: {error}") from error
    return of_rules(converted)


def of_rules(rules: str) -> str:
    """Rules in Lark's notation, so that every token is allowed after which the text can still be completed.

    Otherwise llguidance allows of a text that must come only the tokens that the tokenizer makes of it.
    """
    return f'%llguidance {{"no_forcing": true}}\n{rules}'
