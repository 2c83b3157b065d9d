"""Small tokenizers with known tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from eft_serve.api.model_tokenizer import BYTE_OF

LETTER_OF = {byte: letter for letter, byte in BYTE_OF.items()}


def byte_level(texts: Sequence[str], special: Sequence[str] = ()) -> str:
    """A `tokenizer.json` whose tokens are these texts, then the special ones."""
    vocabulary = {"".join(LETTER_OF[byte] for byte in text.encode()): token_id for token_id, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    text: str = tokenizer.to_str()
    return text
