"""What the coordinator knows of a checkpoint's tokens: how many are real, which end a text, how they are spelt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from eft_serve.coordinator.detokenizer import Decoder
from eft_serve.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One checkpoint's tokens."""

    decoder: Decoder
    num_tokens: int  # ids from here on are padding of the output head
    eos_token_ids: frozenset[int]

    @classmethod
    def load(cls, checkpoint: Path) -> Vocabulary:
        """Read tokenizer and generation config of a `transformers` directory; raises `CheckpointError`."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{checkpoint}: no usable tokenizer: {error}", param="models") from error
        num_tokens = max(tokenizer.get_vocab().values()) + 1
        return cls(_PlainDecoder(tokenizer), num_tokens, _eos_token_ids(checkpoint, tokenizer.eos_token_id))


@dataclass(frozen=True, slots=True)
class _PlainDecoder:
    tokenizer: Decoder

    def decode(self, token_ids: list[int]) -> str:
        # Cleaning up spaces rewrites text that is already out.
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[call-arg]


def _eos_token_ids(checkpoint: Path, fallback: int | None) -> frozenset[int]:
    """The ends of text that `generate` would stop at: generation config, else config, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        path = checkpoint / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset([fallback] if fallback is not None else [])
