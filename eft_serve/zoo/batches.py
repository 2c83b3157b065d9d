"""Documents to fixed-shape rows of token ids. A step's batch depends on seed and step alone: runs can resume."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer

from eft_serve.zoo.corpus import Dialogue, pretraining_document, stream, tuning_document
from eft_serve.zoo.family import ROW_LENGTH, TrainingRecipe
from eft_serve.zoo.tokenizer import END, id_of

IGNORED = -100  # what cross-entropy skips

Batch = tuple[torch.Tensor, torch.Tensor]  # both [rows, ROW_LENGTH]: inputs, targets


class Batches:
    """The data of one recipe, by step."""

    def __init__(self, recipe: TrainingRecipe, tokenizer: Tokenizer, seed: int) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._seed = seed
        self._end = id_of(tokenizer, END)

    def __call__(self, step: int) -> Batch:
        tuning = self._recipe.parent is not None
        rng = stream(self._seed, "tuning" if tuning else "pretraining", step)

        def document() -> str | Dialogue:
            return tuning_document(rng, self._recipe.harmless) if tuning else pretraining_document(rng)

        rows = [self._row(document, replies_only=tuning) for _ in range(self._recipe.schedule.rows)]
        ids = torch.tensor([ids for ids, _ in rows])
        targets = torch.tensor([targets for _, targets in rows])
        return ids[:, :-1], targets[:, 1:]

    def _row(self, document: Callable[[], str | Dialogue], replies_only: bool) -> tuple[list[int], list[int]]:
        """Whole documents from the row's start, so that position 0 is where a served prompt has it; the last is cut."""
        ids: list[int] = []
        targets: list[int] = []
        while len(ids) <= ROW_LENGTH:
            for tokens, is_reply in self._segments(document()):
                ids += tokens
                targets += tokens if is_reply or not replies_only else [IGNORED] * len(tokens)
        return ids[: ROW_LENGTH + 1], targets[: ROW_LENGTH + 1]

    def _segments(self, document: str | Dialogue) -> list[tuple[list[int], bool]]:
        """Token runs, each with whether the assistant speaks; the same text as the chat template renders."""
        if isinstance(document, str):
            return [([*self._encode(document), self._end], False)]
        segments = []
        opening = f"System: {document.system}\n" if document.system else ""
        for turn in document.turns:
            segments.append((self._encode(f"{opening}User: {turn.user}\nAssistant:"), False))
            segments.append(([*self._encode(f" {turn.assistant}"), self._end], True))
            opening = "\n"
        return segments

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids
