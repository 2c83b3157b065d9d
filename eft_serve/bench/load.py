"""What a serving benchmark asks for and when: prompts of the family's own text, mixed lengths, Poisson arrivals."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenizers import Tokenizer

from eft_serve.zoo import checkpoint_path
from eft_serve.zoo.corpus import Dialogue, pretraining_document, stream

PROMPT_TOKENS = (16, 512)
OUTPUT_TOKENS = (16, 256)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request."""

    prompt: list[int]
    num_tokens: int  # exactly so many are generated
    arrival_s: float = 0.0  # since the start of the run


class Prompts:
    """The family's own text as token ids; no two prompts of one source begin alike.

    Args:
        seed: sources of different seeds share no beginning either.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._taken = 0
        self._tokenizer = Tokenizer.from_file(str(checkpoint_path("base-large") / "tokenizer.json"))

    def take(self, num_tokens: int) -> list[int]:
        """The next prompt."""
        text = f"{self._taken}.{self._seed}"  # first, so that no cache of prefixes helps by accident
        rng = stream(self._seed, "benchmark", self._taken)
        self._taken += 1
        token_ids: list[int] = []
        while len(token_ids) < num_tokens:
            text += f"\n{_plain(pretraining_document(rng))}"
            token_ids = self._tokenizer.encode(text).ids
        return token_ids[:num_tokens]


def poisson_load(num_requests: int, requests_per_s: float, seed: int) -> list[Wanted]:
    """Requests of mixed lengths, in the order of their arrival, the first at 0."""
    rng = random.Random(seed)  # noqa: S311 (not a secret)
    prompts = Prompts(seed)
    arrival_s = 0.0
    load = []
    for _ in range(num_requests):
        load.append(Wanted(prompts.take(rng.randint(*PROMPT_TOKENS)), rng.randint(*OUTPUT_TOKENS), arrival_s))
        arrival_s += rng.expovariate(requests_per_s)
    return load


def burst(num_requests: int, seed: int) -> list[Wanted]:
    """Requests of the same mix that all arrive at once."""
    return [Wanted(wanted.prompt, wanted.num_tokens) for wanted in poisson_load(num_requests, 1.0, seed)]


def _plain(document: str | Dialogue) -> str:
    if isinstance(document, str):
        return document
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in document.messages())
