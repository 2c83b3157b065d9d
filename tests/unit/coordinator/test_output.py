"""Where an output ends, and the text that is shown of its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from loop_harness import EFT, request

from eft_serve.coordinator.output import OutputStream
from eft_serve.types import FinishReason

END = 0
TEXTS = {END: "<end>", 1: "a", 2: "b", 3: "ST", 4: "OP!"}


@dataclass(frozen=True)
class Words:
    """Token 0 is special and ends a text."""

    num_tokens: int = 5
    eos_token_ids: frozenset[int] = frozenset([END])
    shows_special: bool = False

    @property
    def with_special_tokens(self) -> Words:
        return Words(shows_special=True)

    def decode(self, token_ids: list[int]) -> str:
        return "".join(TEXTS[token_id] for token_id in token_ids if token_id != END or self.shows_special)


def output(token_ids: list[int], **sampling: Any) -> tuple[str, int, FinishReason | None]:
    """Text, number of tokens and reason of an output that is taken one token at a time."""
    stream = OutputStream.of(request("r", {model: [1] for model in EFT}, **sampling), [Words()] * 3)  # type: ignore[list-item]
    text, count = "", 0
    for token_id in token_ids:
        taken, reason = stream.take([token_id])
        text += stream.delta(taken, reason, None, None).text
        count += len(taken)
        if reason is not None:
            return text, count, reason
    return text, count, None


STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.mark.parametrize(
    ("token_ids", "sampling", "expected"),
    [
        ([1, END, 2], {}, ("a", 2, STOP)),
        ([1, END, 2], {"ignore_eos": True}, ("ab", 3, None)),
        ([1, END], {"skip_special_tokens": False}, ("a", 2, STOP)),
        ([1, END], {"skip_special_tokens": False, "include_stop_str_in_output": True}, ("a<end>", 2, STOP)),
        ([1, END], {"include_stop_str_in_output": True}, ("a", 2, STOP)),
        ([1, END, 2], {"ignore_eos": True, "skip_special_tokens": False}, ("a<end>b", 3, None)),
        ([1, 2], {"stop_token_ids": (2,)}, ("a", 2, STOP)),
        ([1, 2], {"stop_token_ids": (2,), "include_stop_str_in_output": True}, ("ab", 2, STOP)),
        ([1, 2], {"stop_token_ids": (2,), "ignore_eos": True}, ("a", 2, STOP)),
        ([1, 3, 4, 1], {"stop": ("STOP",)}, ("a", 3, STOP)),
        ([1, 3, 4, 1], {"stop": ("STOP",), "include_stop_str_in_output": True}, ("aSTOP", 3, STOP)),
        ([1, 3, 2], {"stop": ("STOP",)}, ("aSTb", 3, None)),
        ([3, 4, 1, 3, 4], {"stop": ("STOP",), "min_tokens": 2}, ("STOP!a", 5, STOP)),
        ([1, 2], {"stop": ("b",), "min_tokens": 1}, ("a", 2, STOP)),
        ([3, 4, 1], {"stop": ("STOP",), "min_tokens": 1}, ("STOP!a", 3, None)),
        ([1, 3], {"stop": ("STOP",), "max_tokens": 2}, ("aST", 2, LENGTH)),
        ([1, END], {"stop": ("STOP",), "include_stop_str_in_output": True, "max_tokens": 2}, ("a", 2, STOP)),
        ([3, END], {"stop": ("STOP",)}, ("ST", 2, STOP)),
    ],
)
def test_where_an_output_ends_and_what_is_shown_of_it(
    token_ids: list[int], sampling: dict[str, Any], expected: tuple[str, int, FinishReason | None]
) -> None:
    assert output(token_ids, **sampling) == expected
