"""The tokens of a checkpoint: how many are real, which end a text, how they decode; knows no request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eft_serve.checkpoints.end_tokens import read_end_tokens
from eft_serve.checkpoints.json_file import BrokenFileError, read_json
from eft_serve.checkpoints.tokenizer import load_tokenizer
from eft_serve.errors import CheckpointError, InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One checkpoint's tokens."""

    tokenizer: PreTrainedTokenizerBase
    ids: Mapping[str, int]  # token → id, of the tokens that the model has
    eos_token_ids: frozenset[int]

    @property
    def num_tokens(self) -> int:
        """Ids from here on are padding of the output head, or tokens that only the tokenizer has."""
        return len(self.ids)

    @property
    def tokenizer_json(self) -> str:
        """What `tokenizers` would save."""
        text: str = self.tokenizer.backend_tokenizer.to_str()
        return text

    def decode(self, token_ids: list[int]) -> str:
        """The text without special tokens. Spaces are not cleaned up: that would change text already emitted."""
        return self._decode(token_ids, skip_special_tokens=True)

    @property
    def with_special_tokens(self) -> WithSpecialTokens:
        """Decodes special tokens too."""
        return WithSpecialTokens(self, skipped=frozenset())

    def with_special_tokens_of(self, token_ids: Iterable[int]) -> WithSpecialTokens:
        """Decodes these special tokens too."""
        added = self.tokenizer.backend_tokenizer.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        return WithSpecialTokens(self, frozenset(special.difference(token_ids)))

    def _decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        text = self.tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    @classmethod
    def load(cls, checkpoint: Path) -> Vocabulary:
        """Read tokenizer and generation config of a `transformers` directory; raises `CheckpointError`."""
        tokenizer = load_tokenizer(checkpoint)
        try:
            ids = known_tokens(tokenizer.get_vocab(), head_rows(checkpoint))
            if max(ids.values()) != len(ids) - 1:
                message = f"{checkpoint}: token ids have gaps: {len(ids)} tokens up to id {max(ids.values())}"
                raise CheckpointError(message, param="models")
            ends = read_end_tokens(checkpoint) or frozenset()
        except BrokenFileError as error:
            raise CheckpointError(str(error), param="models") from error
        if tokenizer.eos_token_id is not None:  # vLLM stops at both
            ends |= {tokenizer.eos_token_id}
        if unknown := [token_id for token_id in ends if token_id >= len(ids)]:
            message = f"{checkpoint}: the end token {unknown[0]} is none of its {len(ids)} tokens"
            raise CheckpointError(f"{message}; correct eos_token_id or the tokenizer's eos_token", param="models")
        return cls(tokenizer, ids, ends)


@dataclass(frozen=True, slots=True)
class WithSpecialTokens:
    """A vocabulary's decoder that skips these tokens only."""

    vocabulary: Vocabulary
    skipped: frozenset[int]

    def decode(self, token_ids: list[int]) -> str:
        """The text of the others."""
        kept = [token_id for token_id in token_ids if token_id not in self.skipped]
        return self.vocabulary._decode(kept, skip_special_tokens=False)


def head_rows(checkpoint: Path) -> int | None:
    """Rows of the output head by `config.json`; None where it does not say.

    Raises:
        BrokenFileError: the file cannot be read, or the number is no positive whole number.
    """
    file = checkpoint / "config.json"
    rows: Any = read_json(file).get("vocab_size") if file.is_file() else None
    if rows is not None and (type(rows) is not int or rows < 1):
        raise BrokenFileError(f"{file}: vocab_size is {rows!r}, not a number of tokens")
    return rows


def known_tokens(ids: Mapping[str, int], rows: int | None) -> Mapping[str, int]:
    """The tokens for which a head of so many rows has one: a tokenizer may have got more after the training."""
    return ids if rows is None else {token: token_id for token, token_id in ids.items() if token_id < rows}


def check_range(param: str, token_ids: Sequence[int], num_tokens: int) -> None:
    """Raises `InvalidRequestError` that names the parameter and its first token id outside 0..num_tokens - 1."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < num_tokens:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < num_tokens)
        raise InvalidRequestError(f"{param}: token id {wrong} is not in 0..{num_tokens - 1}", param=param)


def vocabulary_difference(base: str, ours: Mapping[str, int], other: str, theirs: Mapping[str, int]) -> str | None:
    """How two models' tokens differ, naming both and the first difference; None when they are the same."""
    if ours == theirs:
        return None
    token_id = min(token_id for _, token_id in ours.items() ^ theirs.items())
    tokens_at_id = {
        model: sorted(token for token, i in ids.items() if i == token_id)
        for model, ids in ((base, ours), (other, theirs))
    }
    descriptions = (f"{model} has {', '.join(map(repr, tokens)) or 'none'}" for model, tokens in tokens_at_id.items())
    return (
        f"{base} and {other} have different vocabularies, first at id {token_id}: {', '.join(descriptions)}; "
        "the models of a recipe must share one tokenizer"
    )
