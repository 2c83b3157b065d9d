"""One model's tokenizer as the ingress uses it: text and chats to token ids, and what is refused on the way.

Knows one model, and no recipe.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eft_serve.api.prompt_options import DEFAULT_OPTIONS, PromptOptions
from eft_serve.checkpoints.chat_template import check_template
from eft_serve.checkpoints.json_file import BrokenFileError
from eft_serve.checkpoints.tokenizer import load_tokenizer
from eft_serve.checkpoints.vocabulary import head_rows, known_tokens
from eft_serve.errors import CheckpointError, ContextLengthError, InvalidRequestError
from eft_serve.grammars.matcher import GrammarTokenizer, NoGrammars, load_grammar_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARACTERS = 16_384  # encoded at a time to see whether a long text can fit
PIECE_SLACK = 256  # tokens that a piece may have more than its part of the whole text, because it was cut

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Message = Mapping[str, Any]


def _byte_alphabet() -> dict[str, int]:
    """Letter → byte of byte-level tokenizers: printable bytes stand for themselves, the others come after 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
FILL_IN_THE_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
)
NO_GRAMMARS = NoGrammars("it was not loaded")


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> Iterator[str]:
    for each in (decoder or {}, *(decoder or {}).get("decoders", ())):
        if "type" in each:
            yield each["type"]


def _templates(template: str | dict[str, str] | None) -> dict[str, str]:
    """Every template of a tokenizer, by what is added to its name in an error."""
    if isinstance(template, dict):
        return {f" {name!r}": text for name, text in template.items()}
    return {} if template is None else {"": template}


def plain_chat(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The prompt of a model without a chat template: one `Role: text` line per turn, then `Assistant:`.

    A model begins its answer with the space after the colon, so an answer that is sent back as it was has it already.
    """
    lines = [
        f"{m['role'].capitalize()}:{'' if m['role'] == 'assistant' and m['content'][:1].isspace() else ' '}"
        f"{m['content']}\n"
        for m in messages
    ]
    return "".join(lines) + ("Assistant:" if add_generation_prompt else "")


@dataclass(frozen=True, slots=True, eq=False)
class ModelTokenizer:
    """One model's tokenizer; safe to use from several threads."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: str  # digest of token -> id
    fingerprint: str  # digest of all that turns text into ids
    num_ids: int  # of the tokens that the model has: 0 <= id < num_ids
    has_unknown: bool = False  # the tokenizer has tokens beyond these
    decoders: frozenset[str] = frozenset()  # their kinds
    added_token_ids: frozenset[int] = frozenset()  # tokens that stand for themselves
    special: Mapping[str, int] = field(default_factory=dict)  # of these, text → id of those that decoded text hides
    grammars: GrammarTokenizer | NoGrammars = NO_GRAMMARS
    own_template: str | None = None  # of an adapter, in place of the tokenizer's

    @classmethod
    def load(cls, path: Path) -> ModelTokenizer:
        """Read a model directory; raises `CheckpointError` when it has no fast tokenizer."""
        tokenizer = load_tokenizer(path)
        if not tokenizer.is_fast:
            raise CheckpointError(f"{path}: has no tokenizer.json; save it once with a fast tokenizer")
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # a prompt is refused when it is too long, never cut
        backend.no_padding()
        vocabulary, described = tokenizer.get_vocab(), backend.to_str()
        added = backend.get_added_tokens_decoder()
        try:
            known = known_tokens(vocabulary, head_rows(path))
            for name, text in _templates(tokenizer.chat_template).items():
                check_template(text, f"{path}: the tokenizer's chat_template{name}")
        except BrokenFileError as error:
            raise CheckpointError(str(error), param="models") from error
        return cls(
            tokenizer,
            vocabulary=_digest(json.dumps(known, sort_keys=True)),
            fingerprint=_digest(described),
            num_ids=max(known.values()) + 1,
            has_unknown=len(known) < len(vocabulary),
            decoders=frozenset(_decoder_kinds(json.loads(described).get("decoder"))),
            added_token_ids=frozenset(added),
            special={token.content: token_id for token_id, token in added.items() if token.special},
            grammars=load_grammar_tokenizer(described),
        )

    def encode(self, text: str, add_special_tokens: bool, param: str, max_tokens: int) -> list[int]:
        """Token ids of a text.

        Args:
            param: the request's parameter that the text is of.
            max_tokens: the context's length; a text that is much longer is refused before it is encoded.

        Raises:
            ContextLengthError: see `check_length`; only long texts are checked.
            InvalidRequestError: see `check_known`.
        """
        if len(text) > PIECE_CHARACTERS:
            self.check_length(text, max_tokens, param)
        ids = self._encode(text, add_special_tokens)
        if self.has_unknown:
            self.check_known(ids, param)
        return ids

    def bytes_of(self, token_id: int) -> bytes:
        """A token's part of the text, which may be part of a character; special tokens read as they are named."""
        backend = self.tokenizer.backend_tokenizer
        token = backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self.added_token_ids:
            return str(token).encode()
        if "ByteLevel" in self.decoders:
            return bytes(BYTE_OF[letter] for letter in token) if BYTE_OF.keys() >= set(token) else str(token).encode()
        if "ByteFallback" in self.decoders and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if not self.decoders.isdisjoint(("Metaspace", "Replace")):
            return str(token).replace("\u2581", " ").encode()
        return str(backend.decode([token_id], skip_special_tokens=False)).encode()

    @property
    def fill_in_the_middle(self) -> tuple[str, str, str] | None:
        """The tokens before the text in front, before the text behind, and before the middle; None if it has none."""
        known = self.tokenizer.backend_tokenizer.token_to_id
        return next((each for each in FILL_IN_THE_MIDDLE if all(known(token) is not None for token in each)), None)

    def token(self, token_id: int) -> str | None:
        """A token as the vocabulary has it, or None if it has none of this id."""
        token: str | None = self.tokenizer.backend_tokenizer.id_to_token(token_id)
        return token

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return str(self.tokenizer.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def check_length(self, text: str, max_tokens: int, param: str) -> None:
        """Refuse a text that cannot fit, however long it is, in about the time that a text that fits takes.

        Pieces are encoded one after the other until there are too many tokens. So time and memory depend on
        `max_tokens` and not on what a client sends.

        Raises:
            ContextLengthError: it has more than `max_tokens` tokens, not counting special ones.
        """
        count = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = self._encode(text[start : start + PIECE_CHARACTERS], add_special_tokens=False)
            count += max(0, len(piece) - PIECE_SLACK)
            if count > max_tokens:
                message = f"{param}: its {len(text)} characters are more than {max_tokens} tokens"
                raise ContextLengthError(f"{message}, which is the limit; shorten it", param=param)

    def end_of(self, text: str, num_tokens: int) -> str:
        """The end of a long text that has more than its last `num_tokens` tokens, found in pieces from the end."""
        start, count = len(text), 0
        while start > PIECE_CHARACTERS and count < num_tokens:
            piece = self._encode(text[start - PIECE_CHARACTERS : start], add_special_tokens=False)
            count += max(0, len(piece) - PIECE_SLACK)
            start -= PIECE_CHARACTERS
        return text[max(0, start - PIECE_CHARACTERS) :]

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The Rust tokenizer itself: its wrapper sets truncation on every call, which fails under concurrent use.
        # And a batch: `encode` keeps the interpreter's lock, so that a long text would stall every stream.
        backend = self.tokenizer.backend_tokenizer
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def check_known(self, ids: Sequence[int], param: str) -> None:
        """Raises `InvalidRequestError` that names the first token that the tokenizer has and the model has not."""
        unknown = next((i for i in ids if i >= self.num_ids), None)
        if unknown is not None:
            token = self.tokenizer.backend_tokenizer.id_to_token(unknown)
            message = f"{param}: {token!r} is token {unknown}, and the model has tokens up to {self.num_ids - 1} only"
            raise InvalidRequestError(f"{message}; leave it out", param=param)

    @property
    def template(self) -> str | None:
        """The model's own chat template, to see whether two models render alike."""
        template = self.tokenizer.chat_template if self.own_template is None else self.own_template
        return template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)

    def render(
        self,
        messages: Sequence[Message],
        template: str | None = None,
        options: PromptOptions = DEFAULT_OPTIONS,
        param: str = "messages",
    ) -> str:
        """The chat as text, by this template or, without one, by the model's own.

        Raises:
            InvalidRequestError: the template refuses the messages (with its own message), fails, or changes a last
                message that is to be continued.
        """
        if not options.continue_final_message:
            return self._rendered(messages, template, options.add_generation_prompt, options, param)
        *before, last = messages
        content = last["content"]
        if last["role"] != "assistant" or not content:
            message = "continue_final_message needs an assistant's message with text as the last one"
            raise InvalidRequestError(f"{param}: {message}", param=param)
        end = f"end{secrets.token_hex(16)}"  # shows where the text ends in the template's, whatever follows
        marked = [*before, {**last, "content": content + end}]
        text, *rest = self._rendered(marked, template, False, options, param).split(end)
        if len(rest) != 1 or not text.endswith(content.lstrip()):
            message = "the chat template changes the last message, so that it cannot be continued"
            raise InvalidRequestError(f"{param}: {message}; leave out continue_final_message", param=param)
        return text

    def _rendered(
        self,
        messages: Sequence[Message],
        template: str | None,
        add_generation_prompt: bool,
        options: PromptOptions,
        param: str,
    ) -> str:
        kwargs = options.template_kwargs
        template = self.own_template if template is None else template
        if template is None and self.template is None:
            return plain_chat(messages, add_generation_prompt)
        if special := sorted(kwargs.keys() & self.tokenizer.special_tokens_map.keys()):
            name = f"chat_template_kwargs.{special[0]}"
            raise InvalidRequestError(f"{name}: is a token of the tokenizer's own; leave it out", param=name)
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                tools=options.tools,
                **kwargs,
            )
        except Exception as error:  # a template may raise any exception
            message = f"{param}: the chat template refuses them: {error}"
            raise InvalidRequestError(message, param=param) from error
        return str(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
