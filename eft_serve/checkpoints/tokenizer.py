"""The tokenizer of a model directory, and its vocabulary without loading it; knows no text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def token_ids(checkpoint: Path) -> dict[str, int]:
    """Token → id by the files of a model directory, as `transformers` builds them.

    A special token that `tokenizer_config.json` names and `tokenizer.json` has not gets the next free id.

    Raises:
        BrokenFileError: a file cannot be read, or the kind of tokenizer is unknown.
    """
    tokenizer = checkpoint / "tokenizer.json"
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
    file = checkpoint / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    try:
        ids |= {added["content"]: int(i) for i, added in (settings.get("added_tokens_decoder") or {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BrokenFileError(f"{file}: added_tokens_decoder is not a mapping of ids to tokens: {error!r}") from error
    for token in _named_tokens(settings):
        ids.setdefault(token, max(ids.values()) + 1)
    return ids


def _named_tokens(settings: dict[str, Any]) -> Iterator[str]:
    """The texts of the special tokens in a `tokenizer_config.json`, each a string or an object with `content`."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    extra = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    for token in (*(settings.get(name) for name in SPECIAL_TOKENS), *extra):
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            yield content
