"""The tokenizer of a model directory, and its vocabulary without loading it; knows no text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eft_serve.checkpoints.json_file import BrokenFileError, read_json
from eft_serve.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as `transformers` builds it.

    Raises:
        CheckpointError: there is none, or only one that needs custom code.
    """
    from transformers import AutoTokenizer  # takes seconds, which `config check` does not need to spend

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: no usable tokenizer: {error}", param="models") from error
    return tokenizer


def token_ids(tokenizer: Path) -> dict[str, int]:
    """Token → id of a `tokenizer.json`, added tokens included.

    Raises:
        BrokenFileError: it cannot be read, or its kind is unknown.
    """
    data = read_json(tokenizer)
    try:
        vocab = data["model"]["vocab"]
        # Unigram lists [token, score] pairs by id; the others map tokens to ids.
        ids = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        ids |= {added["content"]: added["id"] for added in data.get("added_tokens", ())}
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenFileError(f"{tokenizer} has no vocabulary: {error!r}") from error
    if not ids or not all(isinstance(token_id, int) for token_id in ids.values()):
        raise BrokenFileError(f"{tokenizer} has no vocabulary of tokens with whole numbers as ids")
    return ids
