"""Checks the chat templates that recipes name."""

from __future__ import annotations

from collections.abc import Iterator

from eft_serve.checkpoints.chat_template import read_template
from eft_serve.checkpoints.json_file import BrokenFileError
from eft_serve.config import AppConfig
from eft_serve.config_check.problem import Problem


def template_problems(config: AppConfig) -> Iterator[Problem]:
    """Every chat template that a recipe names."""
    for name, recipe in config.recipes.items():
        for label, role in recipe.roles:
            if role.chat_template is not None:
                try:
                    read_template(role.chat_template)
                except BrokenFileError as error:
                    yield Problem(f"recipes.{name}.{label}.chat_template", f"{error}; correct the file or the path")
