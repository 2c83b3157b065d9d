"""Tools as OpenAI's chats have them: their definitions, the choice among them, and calls in messages."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from eft_serve.api.knobs import Strict, Whole
from eft_serve.api.knobs import mistake as _mistake
from eft_serve.config_recipes import ToolFormat
from eft_serve.errors import InvalidRequestError
from eft_serve.grammars import definitions
from eft_serve.grammars.tool_calls import ToolGrammar
from eft_serve.types import Grammar

MAX_TOOLS = 128  # OpenAI's
NAME = r"^[a-zA-Z0-9_.:-]+$"

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=NAME)]


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of its arguments."""
    strict: bool | None = None
    """Accepted; arguments follow the schema where a call is required, whether strict or not."""


class Tool(Strict):
    """One tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition

    @property
    def rendered(self) -> dict[str, Any]:
        """In the form that chat templates take."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}} | function}


class NamedFunction(Strict):
    """The name of a function."""

    name: Name


class NamedTool(Strict):
    """A tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Strict):
    """A function with its arguments."""

    name: Name
    arguments: str
    """JSON."""
    parsed_arguments: Any = None
    """What the `openai` client made of them; accepted and not used."""

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, arguments: str) -> str:
        _arguments(arguments)
        return arguments


class ToolCall(Strict):
    """A call in an assistant's message."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Annotated[Literal["function"], BeforeValidator(lambda kind: "function" if kind is None else kind)] = (
        "function"
    )
    function: CalledFunction
    index: Whole | None = None
    """Its place in a stream that a client gathered; accepted and not used."""

    @property
    def rendered(self) -> dict[str, Any]:
        """In the form that chat templates take: arguments as an object."""
        function = {"name": self.function.name, "arguments": _arguments(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError("must be a JSON object")
    return arguments


@dataclass(frozen=True, slots=True)
class ActiveTools:
    """The tools of a request that the model may call, and whether it has to."""

    tools: Sequence[Tool]
    required: Sequence[Tool]  # one of these has to be called; empty: it is free to
    parallel: bool

    @classmethod
    def of(cls, tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ActiveTools | None:
        """None where no tool may be called.

        Raises:
            PydanticCustomError: the parameters contradict each other.
        """
        tools = tools or ()
        names = [tool.function.name for tool in tools]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise _mistake("tools", f"{twice!r} is defined twice")
        if not tools and not (choice is None or choice in ("none", "auto")):
            raise _mistake("tool_choice", "needs tools")
        if not tools or choice == "none":
            return None
        required = tools if choice == "required" else ()
        if isinstance(choice, NamedTool):
            required = [tool for tool in tools if tool.function.name == choice.function.name]
            if not required:
                raise _mistake("tool_choice.function.name", f"{choice.function.name!r} is not among the tools {names}")
        # as OpenAI has it: `required` is one call or more, a named tool is exactly one
        return cls(tools, required, parallel is not False and not isinstance(choice, NamedTool))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.tools)

    @property
    def rendered(self) -> list[dict[str, Any]]:
        """In the form that chat templates take."""
        return [tool.rendered for tool in self.tools]

    def grammar(self, tool_format: ToolFormat, special: Mapping[str, int]) -> Grammar | None:
        """Of an answer that is a call of one of the required tools, or several; None where none is required.

        Args:
            special: text → id of the tokenizer's special tokens.

        Raises:
            InvalidRequestError: the tools are too long.
        """
        if not self.required:
            return None
        schemas = {tool.function.name: tool.function.parameters or NO_ARGUMENTS for tool in self.required}
        definition = ToolGrammar(tool_format, special).of(schemas, parallel=self.parallel)
        if len(definition) > definitions.MAX_CHARACTERS:
            message = f"tools: a grammar of {len(definition)} characters is too long; send fewer or smaller tools"
            raise InvalidRequestError(message, param="tools")
        return Grammar(definition, "tools", of_schemas=True)


def call_id(tool_format: ToolFormat) -> str:
    """An id as the format's templates take it: Mistral's want nine letters and digits."""
    alphabet = string.ascii_letters + string.digits
    random = "".join(secrets.choice(alphabet) for _ in range(9 if tool_format == "mistral" else 24))
    return random if tool_format == "mistral" else f"call_{random}"
