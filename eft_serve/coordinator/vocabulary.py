"""What the coordinator knows of a checkpoint's tokens: how many are real, which end a text, what text they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eft_serve.config import AppConfig
from eft_serve.config_check.recipes import vocabulary_difference
from eft_serve.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One checkpoint's tokens."""

    tokenizer: PreTrainedTokenizerBase
    ids: Mapping[str, int]  # token → id
    eos_token_ids: frozenset[int]

    @property
    def num_tokens(self) -> int:
        """Ids from here on are padding of the output head."""
        return len(self.ids)

    def decode(self, token_ids: list[int]) -> str:
        """The text, without special tokens and as the tokens spell it: tidying up spaces would rewrite what is out."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @classmethod
    def load(cls, checkpoint: Path) -> Vocabulary:
        """Read tokenizer and generation config of a `transformers` directory; raises `CheckpointError`."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{checkpoint}: no usable tokenizer: {error}", param="models") from error
        ids = tokenizer.get_vocab()
        if max(ids.values()) != len(ids) - 1:
            raise CheckpointError(f"{checkpoint}: token ids have gaps: {len(ids)} tokens up to id {max(ids.values())}")
        return cls(tokenizer, ids, _eos_token_ids(checkpoint, tokenizer.eos_token_id))


def load_vocabularies(config: AppConfig) -> dict[str, Vocabulary]:
    """The vocabulary of every deployment; its adapters have no other.

    Raises:
        CheckpointError: a tokenizer cannot be loaded.
        ConfigError: two models of one recipe differ in a token; the message names both and the first difference.
    """
    vocabularies = {name: Vocabulary.load(model.checkpoint) for name, model in config.deployments.items()}
    for name, recipe in config.recipes.items():
        base, *others = dict.fromkeys(map(config.deployment_of, recipe.models))
        for other in others:
            ours, theirs = vocabularies[base].ids, vocabularies[other].ids
            if message := vocabulary_difference(base, ours, other, theirs):
                raise ConfigError(f"recipes.{name}: {message}", param=f"recipes.{name}")
    return vocabularies


def _eos_token_ids(checkpoint: Path, fallback: int | None) -> frozenset[int]:
    """The ends of text that `generate` would stop at: generation config, else config, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        path = checkpoint / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset([fallback] if fallback is not None else [])
