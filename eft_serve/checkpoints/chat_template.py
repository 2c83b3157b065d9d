"""Chat template files: read, and parsed as `transformers` does before rendering."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eft_serve.checkpoints.json_file import BrokenFileError, read_json


class _Generation(Extension):
    """The `generation` block, by which templates mark the assistant's text."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja defines it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def read_template(path: Path) -> str:
    """The text of a chat template.

    Raises:
        BrokenFileError: it cannot be read or parsed.
    """
    try:
        text = path.expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenFileError(f"{path} cannot be read: {error}") from error
    check_template(text, str(path))
    return text


def directory_template(directory: Path) -> str | None:
    """The chat template among a directory's own files; None where there is none.

    Raises:
        BrokenFileError: it cannot be read or parsed.
    """
    file, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if file.is_file():
        return read_template(file)
    template = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # of several, by name
        template = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}.get(
            "default"
        )
    if template is None:
        return None
    if not isinstance(template, str):
        raise BrokenFileError(f"{settings}: chat_template is not a text")
    check_template(template, str(settings))
    return template


def check_template(text: str, name: str) -> None:
    """Raises `BrokenFileError` with this name when a chat template cannot be parsed."""
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        environment.from_string(text)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise BrokenFileError(f"{name} is no chat template: {error}" + (f" (line {line})" if line else "")) from error
