"""An engine's drafts are what stepping it token by token would draw, and cost the others nothing."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import msgspec
import pytest
import regex
import torch
from tiny_models import CONTEXT, VOCAB_SIZE
from waiting import wait_until

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.config import ZOO_CHECKPOINTS, ModelConfig
from eft_serve.engine.engine import Engine
from eft_serve.grammars.definitions import of_regex
from eft_serve.numerics.sampling import sample
from eft_serve.types import Draft, Grammar, SamplingParams, SequenceStep, StepOutput

Load = Callable[..., Engine]
PROMPTS = {"a": list(range(20)), "b": [7, 7, 3], "c": list(range(40, 57))}


def draft(num_tokens: int, **changes: object) -> Draft:
    """Changes are of the draft's own fields and of how it is sampled."""
    own = {name: value for name, value in changes.items() if name in Draft.__struct_fields__}
    fields = {"position": 0, "num_ids": VOCAB_SIZE, **own}
    sampling = {"temperature": 0.0, "seed": 3, **{k: v for k, v in changes.items() if k not in own}}
    return Draft(num_tokens=num_tokens, sampling=SamplingParams(**sampling), **fields)  # type: ignore[arg-type]


def own_draw(row: torch.Tensor, d: Draft, position: int) -> int:
    return int(sample(row[None, : d.num_ids].clone(), [d.sampling], [position]))


def stepwise(engine: Engine, name: str, prompt: list[int], d: Draft) -> tuple[list[int], list[torch.Tensor]]:
    """The same by one step a token."""
    tokens, rows, position, new = list[int](), list[torch.Tensor](), 0, prompt
    while len(tokens) < d.num_tokens:
        (output,) = engine.forward([SequenceStep(name, position, new, 1)])
        assert output.logits is not None
        rows.append(output.logits[0])
        tokens.append(own_draw(rows[-1], d, d.position + len(tokens)))
        position, new = position + len(new), tokens[-1:]
    engine.free([name])
    return tokens, rows


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "falcon-new"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_and_their_rows_are_those_of_single_steps(load: Load, architecture: str, temperature: float) -> None:
    engine = load(architecture)
    drafts = {"a": draft(5, temperature=temperature), "b": draft(1, seed=9), "c": draft(9, position=4, top_p=0.8)}
    outputs = engine.forward([SequenceStep(n, 0, PROMPTS[n], 1, draft=d) for n, d in drafts.items()])
    for output, (name, d) in zip(outputs, drafts.items(), strict=True):
        tokens, rows = stepwise(engine, f"{name} again", PROMPTS[name], d)
        assert list(output.drafted) == tokens
        assert output.logits is not None
        torch.testing.assert_close(output.logits, torch.stack(rows), rtol=1e-4, atol=1e-4)
    engine.free(drafts)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafting_ends_once_the_draft_tokens_are_unlikely_to_stand_all(load: Load, temperature: float) -> None:
    engine = load("llama")
    whole = draft(8, temperature=temperature)
    tokens, rows = stepwise(engine, "again", PROMPTS["a"], whole)
    own = [float(row.softmax(dim=-1)[token]) for row, token in zip(rows, tokens, strict=True)]
    (output,) = engine.forward([SequenceStep("s", 0, PROMPTS["a"], 1, draft=whole)])
    assert list(output.confidences) == pytest.approx(own, rel=1e-4)
    for num_tokens in (1, 3, 8):
        before, after = prod(own[: num_tokens - 1]), prod(own[:num_tokens])
        least = (before + after) / 2 if num_tokens < 8 else after / 2
        for confidence in (1.0, 0.5):
            asked = msgspec.structs.replace(whole, confidence=confidence, min_confidence=confidence * least)
            (output,) = engine.forward([SequenceStep("s", 0, PROMPTS["a"], 1, draft=asked)])
            assert list(output.drafted) == tokens[:num_tokens]
            assert output.logits is not None
            assert len(output.logits) == num_tokens
    engine.free(["s"])


def test_all_draft_tokens_but_the_last_are_computed_and_the_next_step_goes_on_from_there(load: Load) -> None:
    engine = load("llama")
    (output,) = engine.forward([SequenceStep("s", 0, PROMPTS["a"], 1, draft=draft(4))])
    num_computed = len(PROMPTS["a"]) + 3
    (beyond,) = engine.forward([SequenceStep("s", num_computed + 1, [1], 1)])
    assert beyond.num_computed_tokens == num_computed
    (after,) = engine.forward([SequenceStep("s", num_computed, list(output.drafted[-1:]), 1)])
    (anew,) = engine.forward([SequenceStep("t", 0, PROMPTS["a"] + list(output.drafted), 1)])
    assert after.logits is not None
    assert anew.logits is not None
    torch.testing.assert_close(after.logits, anew.logits, rtol=1e-4, atol=1e-4)
    engine.free(["s", "t"])


def test_draft_tokens_stop_at_the_context_and_evict_no_sequence(load: Load) -> None:
    engine = load("llama", kv_cache_tokens=96)
    (full,) = engine.forward([SequenceStep("long", 0, [1] * (CONTEXT - 3), 1, draft=draft(8))])
    assert len(full.drafted) == 4  # of which three are computed
    engine.free(["long"])
    engine.forward([SequenceStep("other", 0, [2] * 48, 1)])
    (cramped,) = engine.forward([SequenceStep("s", 0, [1] * 46, 1, draft=draft(8))])
    assert len(cramped.drafted) == 3
    (other,) = engine.forward([SequenceStep("other", 47, [2], 1)])
    assert other.logits is not None  # still there
    engine.free(["s", "other"])


def test_draft_tokens_stay_within_the_ids_that_all_models_have(load: Load) -> None:
    engine = load("llama")
    (output,) = engine.forward([SequenceStep("s", 0, PROMPTS["a"], 1, draft=draft(8, num_ids=5))])
    assert max(output.drafted) < 5
    engine.free(["s"])


@pytest.mark.parametrize(
    ("step", "field"),
    [
        (SequenceStep("s", 0, [1], 0, draft=draft(2)), "num_logits"),
        (SequenceStep("s", 0, [1], 1, draft=draft(2, num_ids=VOCAB_SIZE + 1)), "num_ids"),
        (SequenceStep("s", 0, [1], 1, draft=draft(0)), "num_tokens"),
    ],
)
def test_a_draft_that_cannot_be_is_refused(load: Load, step: SequenceStep, field: str) -> None:
    (output,) = load("llama").forward([step])
    assert isinstance(output, StepOutput)
    assert output.error is not None
    assert field in output.error


def test_draft_tokens_follow_the_grammar_and_end_with_it() -> None:
    pattern = r'\{"[A-Z][a-z]{0,3}":[0-9]{3}\}'
    vocabulary = Vocabulary.load(ZOO_CHECKPOINTS / "tuned-small")
    engine = Engine.load("tuned", ModelConfig(path=str(ZOO_CHECKPOINTS / "tuned-small")))
    prompt = vocabulary.tokenizer.encode("Question: What is the capital of France?\nAnswer:")
    whole = draft(16, num_ids=vocabulary.num_tokens, temperature=1.0)
    bound = msgspec.structs.replace(
        whole, sampling=msgspec.structs.replace(whole.sampling, grammar=Grammar(of_regex(pattern), "p"))
    )

    def drafted(name: str, output: list[int], d: Draft) -> list[int]:
        asked = msgspec.structs.replace(d, position=len(output))
        (answer,) = engine.forward([SequenceStep(name, 0, prompt + output, 1, draft=asked)])
        assert answer.logits is not None
        assert len(answer.logits) == max(1, len(answer.drafted))
        return list(answer.drafted)

    def matches(tokens: list[int]) -> bool:
        return regex.fullmatch(pattern, vocabulary.decode(tokens)) is not None

    try:
        assert not vocabulary.decode(drafted("free", [], whole)).startswith("{")
        wait_until(lambda: drafted("s", [], bound), timeout_s=20)  # compiled beside the steps
        first = drafted("s", [], bound)
        assert matches(first)
        assert len(first) < 16
        assert drafted("s", first, bound) == [], "nothing may follow"
        other = vocabulary.tokenizer.encode('{"Q')  # the output took another way than the draft tokens
        assert matches(other + drafted("s", other, bound))
        assert drafted("s", [5, 6, 7], bound) == [], "it does not follow the grammar"
        assert matches(drafted("s", [], bound))
        assert engine._grammars._matchers.keys() == {"s"}
        engine.free(["s"])
        assert not engine._grammars._matchers
    finally:
        engine.close()
