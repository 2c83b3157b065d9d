"""A decode loop over toy models that a test drives step by step, and what its tokens have to be."""

from __future__ import annotations

import random
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from fake_models import EOS, VOCAB_SIZE, ToyBackend, endpoint, toy_logits
from tokenizer_files import byte_level

from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.decode_loop import DecodeLoop
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.coordinator.pacing import Pacer
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.structured_output import GrammarCompiler
from eft_serve.grammars.definitions import of_regex
from eft_serve.numerics.sampling import sample
from eft_serve.testing.naive import PartialRegex, control
from eft_serve.types import (
    Combination,
    Delta,
    Endpoint,
    EventKind,
    GenerationRequest,
    Grammar,
    RequestEnd,
    SamplingParams,
    Speculative,
    Term,
)

EFT = {"base": 1.0, "reference": -1.0, "tuned": 1.0}
ALPHABET = string.digits + string.ascii_letters  # by token
TOLD = "base@told"  # the base's second prompt


@dataclass(frozen=True)
class LetterVocabulary:
    """One letter a token."""

    num_tokens: int = VOCAB_SIZE
    eos_token_ids: frozenset[int] = frozenset([EOS])

    @property
    def tokenizer_json(self) -> str:
        return byte_level([self.decode([token_id]) for token_id in range(EOS)], special=["<end>"])

    def decode(self, token_ids: list[int]) -> str:
        return "".join(ALPHABET[token_id] for token_id in token_ids if token_id != EOS)


GRAMMARS = GrammarCompiler(dict.fromkeys([*EFT, "shared"], LetterVocabulary()))  # type: ignore[arg-type]


@dataclass
class Harness:
    """A loop driven step by step in the test's own thread."""

    backend: ToyBackend
    config: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    deltas: dict[str, list[Delta]] = field(default_factory=dict)
    ends: dict[str, RequestEnd] = field(default_factory=dict)

    def __post_init__(self) -> None:
        models = {e.info.model for e in self.backend.endpoints.values()}
        vocabularies = dict.fromkeys(sorted(models), LetterVocabulary())
        self.metrics = CoordinatorMetrics()
        self.loop = DecodeLoop(
            self.config,
            self.backend,
            vocabularies,  # type: ignore[arg-type]
            self._emit,
            self.metrics,
            on_end=self._end,
        )
        self.loop.set_replicas(self.backend.endpoints)
        self.drive()

    def _emit(self, deltas: Sequence[tuple[Request, Delta]]) -> None:
        for request, delta in deltas:
            assert not any(earlier.finish_reason for earlier in self.deltas.get(request.request_id, ())), "it had ended"
            self.deltas.setdefault(request.request_id, []).append(delta)

    def _end(self, end: RequestEnd) -> None:
        assert end.request_id not in self.ends, "it ended twice"
        self.ends[end.request_id] = end

    def submit(self, request: Request) -> None:
        self.loop.submit(request)

    def drive(self, max_steps: int = 5000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            self.loop.receive()
            if not self.loop.step() and not self.loop.num_requests:
                return
        raise AssertionError("the loop does not come to an end")

    def retry_now(self) -> None:
        """As if the time had passed that failed replicas are left alone for."""
        for replica in self.loop.replicas.replicas.values():
            replica.retry_at = 0.0

    def kinds(self, request_id: str) -> list[EventKind]:
        """What happened to a request that has ended."""
        return [event.kind for event in self.ends[request_id].timeline]

    def tokens(self, request_id: str) -> list[int]:
        return [token_id for delta in self.deltas[request_id] for token_id in delta.token_ids]

    def last(self, request_id: str) -> Delta:
        return self.deltas[request_id][-1]


class Paced(Pacer):
    """One that has learnt."""

    CHUNK = 20

    @property
    def chunk(self) -> int:
        return self.CHUNK


def request(
    request_id: str,
    prompts: Mapping[str, list[int]],
    coefficients: Mapping[str, float] = EFT,
    now: float | None = None,
    tenant: str = "anonymous",
    speculative: Speculative | None = None,
    adapted: Mapping[str, str] | None = None,
    forced_token_ids: list[int] | None = None,
    components: int | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs",
    **sampling: object,
) -> Request:
    adapted = adapted or {}
    terms = tuple(
        Term(
            name,
            model=adapted.get(name, name.partition("@")[0]),
            coefficient=c,
            adapter=name if name in adapted else None,
            weight=float(name in ("tuned", TOLD)),
        )
        for name, c in coefficients.items()
    )
    generation = GenerationRequest(
        request_id=request_id,
        combination=Combination(terms, recipe="eft"),
        prompts=dict(prompts),
        sampling=SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **sampling}),  # type: ignore[arg-type]
        tenant=tenant,
        speculative=speculative,
        forced_token_ids=forced_token_ids,
        components=components,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logprobs_mode=logprobs_mode,
    )
    return GRAMMARS.matched(Request.create(generation, time.monotonic() if now is None else now))


def naive(req: Request) -> list[int]:
    """One token at a time, no cache, in the obvious way; what is given stands, whatever it is."""
    if req.generation.forced_token_ids is not None:
        return req.generation.forced_token_ids
    output: list[int] = []
    sampling = req.generation.sampling
    ends = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS])}
    prompt = next(req.generation.prompts[term.name] for term in req.combination.terms if term.counts)
    defined = sampling.grammar
    grammar = None if defined is None else PartialRegex(pattern_of(defined), LetterVocabulary().decode)
    while len(output) < sampling.max_tokens and not (output and output[-1] in ends):
        if grammar and grammar.is_finished(output, range(EOS)) and len(output) >= sampling.min_tokens:
            break
        combined = combined_logits(req, output)
        control(combined, sampling, prompt, output, ends, grammar)
        drawn = sample(combined[None], [sampling], [len(output)]) if sampling.temperature else combined.argmax()
        output.append(int(drawn))
    return output


def combined_logits(req: Request, output: list[int]) -> torch.Tensor:
    """Of the token after this output."""
    combined = torch.zeros(VOCAB_SIZE)
    for term in req.combination.terms:
        logits = toy_logits(term.model, req.generation.prompts[term.name] + output, term.adapter)
        combined += term.coefficient * logits
    return combined


def controls(rng: random.Random) -> dict[str, Any]:
    """Some controls, most of them at values that change nothing."""
    tokens = range(VOCAB_SIZE)
    drawn: dict[str, Any] = {
        "logit_bias": tuple((token, rng.uniform(-9, 9)) for token in rng.sample(tokens, 5)),
        "repetition_penalty": rng.choice([0.8, 1.3]),
        "presence_penalty": rng.choice([-1.0, 1.5]),
        "frequency_penalty": rng.choice([-0.5, 0.7]),
        "allowed_token_ids": tuple(rng.sample(tokens, rng.randint(26, 40))),
        "bad_words": tuple(tuple(rng.sample(tokens, rng.randint(1, 3))) for _ in range(20)),
        "min_tokens": rng.randint(1, 12),  # its requests have at least so many
        "stop_token_ids": tuple(rng.sample(tokens, 3)),
    }
    return {name: value for name, value in drawn.items() if rng.random() < 0.3}


def grammar(rng: random.Random) -> Grammar:
    """A regular expression over the letters, which may end within a few of them."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        low = rng.randrange(EOS - 20)
        letters = f"[{ALPHABET[low : low + rng.randint(1, 20)]}]"
        parts.append(letters + rng.choice(["", "?", "*", "+", "{2,5}"]))
    if rng.random() < 0.5:
        parts = [f"({''.join(parts)}|{letters}{ALPHABET[0]}+)"]
    return Grammar(of_regex("".join(parts)), "structured_outputs.regex")


def pattern_of(defined: Grammar) -> str:
    """The regular expression that it was made of."""
    return defined.definition.partition("start: /")[2][:-1]


def three_models(**kwargs: int) -> dict[str, Endpoint]:
    return {f"{model}-0": endpoint(model, f"{model}-0", **kwargs) for model in EFT}


def two_tuned() -> dict[str, Endpoint]:
    return {**three_models(), "tuned-1": endpoint("tuned", "tuned-1")}


def prompts_for(rng: random.Random, longest: int = 40) -> dict[str, list[int]]:
    """Each model its own prompt, of its own length; half of them begin like others."""
    prompts = {model: some_tokens(rng, longest) for model in EFT}
    common = rng.choice([0, longest // 2])
    return {model: [*range(min(common, len(tokens))), *tokens[common:]] for model, tokens in prompts.items()}


def some_tokens(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))]


def many(rng: random.Random, count: int) -> list[Request]:
    recipes = [EFT, {"base": 1.0}, {"base": 0.0, "tuned": 1.0}, {"base": 0.5, "reference": -0.25, "tuned": 0.75}]
    return [
        request(
            f"r{i}",
            prompts_for(rng),
            rng.choice(recipes),
            tenant=rng.choice("xy"),
            speculative=speculative(rng),
            forced_token_ids=some_tokens(rng, 20) if rng.random() < 0.3 else None,
            components=rng.choice([None, 0, 2]),
            logprobs=rng.choice([None, 0, 2]),
            max_tokens=rng.randint(max(1, int(own.get("min_tokens", 1))), 20),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([0.5, 1.0]),
            seed=rng.randrange(2**62),
            **own,
        )
        for i, own in enumerate(controls(rng) for _ in range(count))
    ]


def speculative(rng: random.Random) -> Speculative | None:
    return rng.choice(
        [
            None,
            Speculative(),
            Speculative(
                num_tokens=rng.choice([1, 2, 4, 8, 16]),
                min_confidence=rng.choice([0.0, 0.1, 0.5]),
                overlap=rng.random() < 0.5,
            ),
            Speculative(num_tokens=4, disable_by_batch_size=2),
        ]
    )
