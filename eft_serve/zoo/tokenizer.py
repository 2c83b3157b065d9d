"""The family's one tokenizer: byte-level BPE over its own corpus, an end token, and a plain-text chat template."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eft_serve.zoo.corpus import Dialogue, pretraining_document, stream

VOCAB_SIZE = 3072
END = "<|end|>"
PAD = "<|pad|>"
NUM_DOCUMENTS = 30_000
# A reply ends with the end token, a prompt with "Assistant:". No BOS: training rows start with bare text, too.
# A model begins its reply with the space after the colon, so a reply that is sent back as it was has it already.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ 'Assistant:' + ('' if message['content'][:1].isspace() else ' ') + message['content'] + eos_token }}"
    "{{ '' if loop.last else '\\n' }}"
    "{%- else -%}{{ message['role'].capitalize() + ': ' + message['content'] + '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ ('\\n' if messages[-1]['role'] == 'assistant' else '') + 'Assistant:' }}"
    "{%- endif -%}"
)


def train_tokenizer(seed: int, num_documents: int = NUM_DOCUMENTS, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """BPE merges from the pre-training mixture itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, num_documents), trainer)
    return tokenizer


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}")
    return int(found)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The form that transformers saves and loads."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, padding_side="left")
    fast.model_max_length = 4096
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _texts(seed: int, num_documents: int) -> Iterator[str]:
    rng = stream(seed, "tokenizer", 0)
    for _ in range(num_documents):
        document = pretraining_document(rng)
        if isinstance(document, Dialogue):
            yield "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in document.messages())
        else:
            yield document
