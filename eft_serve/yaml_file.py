"""YAML files in which naming something twice is a mistake: plain YAML would silently keep the last of the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


class DuplicateKeyError(yaml.constructor.ConstructorError):
    """A mapping has a key twice; the message repeats the key."""


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise DuplicateKeyError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The file's plain data; what cannot be read is its reader's to word, for a file may hold secrets.

    Raises:
        OSError: it cannot be read.
        ValueError: its bytes are no text, or a date is none.
        yaml.YAMLError: it is not YAML; a `DuplicateKeyError` where a key is given twice.
    """
    return yaml.load(path.read_text(), Loader=_UniqueKeyLoader)  # noqa: S506, a SafeLoader
