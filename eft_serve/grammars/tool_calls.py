"""Grammars of answers that are tool calls, in the formats of Hermes and Qwen, Llama 3 and Mistral.

Knows how each format writes calls, as llguidance's Lark notation has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eft_serve.config_recipes import ToolFormat
from eft_serve.grammars.definitions import json_rule, of_rules

MAX_CALLS = 16  # in one answer


@dataclass(frozen=True, slots=True)
class ToolGrammar:
    """Writes grammars of one format.

    Args:
        tool_format: how calls are written.
        special: text → id of the tokenizer's special tokens, of which markers may be.
    """

    tool_format: ToolFormat
    special: Mapping[str, int]

    def of(self, schemas: Mapping[str, Mapping[str, Any]], *, parallel: bool) -> str:
        """Calls of these tools, at least one.

        Args:
            schemas: of the arguments, by tool.
            parallel: whether there may be several calls.
        """
        more = f"{{0,{MAX_CALLS - 1}}}" if parallel else "{0,0}"
        if self.tool_format == "hermes":
            begin, end = self._marker("<tool_call>"), self._marker("</tool_call>")
            call = f'call: {begin} "\\n" object "\\n" {end}'
            lines = [f'start: call ("\\n" call){more}' if parallel else "start: call", call]
        elif self.tool_format == "llama3_json":
            lines = [f'start: object ("; " object){more}' if parallel else "start: object"]
        else:
            items = f'object (", " object){more}' if parallel else "object"
            lines = [f'start: {self._marker("[TOOL_CALLS]")} "[" {items} "]"']
        return of_rules("\n".join([*lines, *self._objects(schemas)]))

    def _objects(self, schemas: Mapping[str, Mapping[str, Any]]) -> list[str]:
        key = "parameters" if self.tool_format == "llama3_json" else "arguments"
        rules = [f"object: {' | '.join(f'object_{i}' for i in range(len(schemas)))}"]
        for i, (name, schema) in enumerate(schemas.items()):
            head = json.dumps(f'{{"name": {json.dumps(name)}, "{key}": ')
            rules.append(f'object_{i}: {head} arguments_{i} "}}"')
            rules.append(f"arguments_{i}: {json_rule(schema)}")
        return rules

    def _marker(self, text: str) -> str:
        token_id = self.special.get(text)
        return json.dumps(text) if token_id is None else f"<[{token_id}]>"
