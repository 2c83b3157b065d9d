"""Adapters against merged checkpoints: the plain model and several adapters in one forward, token for token."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_checks import assert_consistent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, greedy, stock_logits
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from eft_serve.config import ModelConfig
from eft_serve.engine import adapters as engine_adapters
from eft_serve.engine.engine import Engine
from eft_serve.errors import CheckpointError, EngineError
from eft_serve.testing import naive
from eft_serve.testing.lora import merge, write_random_lora
from eft_serve.types import Draft, SamplingParams, SequenceStep

Checkpoints = Callable[[str], Path]

LENGTH = 44
TOLERANCE = 1e-4
SMALL: dict[str, Any] = {"kv_cache_tokens": 96, "max_num_batched_tokens": 16}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PATHS = {"llama": "compact+paged", "qwen3": "compact+paged", "olmo2": "ragged+paged"} | {
    "gpt_neox": "ragged+paged",
    "gpt2": "ragged+paged",
    "falcon-new": "padded",
}
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # of adapters a and b
    "llama": (ATTENTION + MLP, ("v_proj", "down_proj", "up_proj")),
    "qwen3": (("q_proj", "gate_proj"), ("k_proj", "o_proj")),
    "olmo2": (ATTENTION + MLP, ("q_proj", "v_proj")),
    "gpt_neox": (("query_key_value", "dense"), ("query_key_value", "dense_h_to_4h", "dense_4h_to_h")),
    "gpt2": (("c_attn", "c_proj"), ("c_fc",)),
    "falcon-new": (("query_key_value", "dense"), ("query_key_value", "dense_h_to_4h", "dense_4h_to_h")),
}
ADAPTER_OF = [None, "a", "b", "a", "b", None]  # of each sequence


@dataclass
class Adapted:
    """A model with two adapters: served, and as three checkpoints of its own."""

    checkpoint: Path
    directories: dict[str, Path]
    models: dict[str | None, PreTrainedModel]
    engine: Engine
    logits: dict[int, torch.Tensor] = field(default_factory=dict)  # by sequence


def save_gpt2(path: Path) -> Path:
    """Its matrices are stored the other way round."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.4
    )
    config.bos_token_id = config.eos_token_id = None
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapted(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Adapted]]:
    made: dict[str, Adapted] = {}

    def get(architecture: str) -> Adapted:
        if architecture not in made:
            root = tmp_path_factory.mktemp(architecture)
            checkpoint = save_gpt2(root / "model") if architecture == "gpt2" else checkpoints(architecture)
            first, second = TARGETS[architecture]
            directories = {
                "a": write_random_lora(root / "a", checkpoint, first, rank=3, seed=1),
                "b": write_random_lora(root / "b", checkpoint, second, rank=5, seed=2, use_rslora=True),
            }
            models: dict[str | None, PreTrainedModel] = {None: naive.load(checkpoint)}
            models |= {name: merge(checkpoint, path) for name, path in directories.items()}
            engine = Engine.load(architecture, ModelConfig(path=str(checkpoint), **SMALL), directories)
            assert engine.info.attention == PATHS[architecture], "the other path would hide this one's mistakes"
            made[architecture] = Adapted(checkpoint, directories, models, engine)
        return made[architecture]

    yield get
    for each in made.values():
        each.engine.close()


def tokens_of(sequence: int) -> list[int]:
    """Two blocks in common, so that only the adapter tells the beginnings apart."""
    common = random.Random(0).choices(range(VOCAB_SIZE), k=34)
    return common + random.Random(sequence + 1).choices(range(VOCAB_SIZE), k=LENGTH - len(common))


def generated(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The stock model's greedy continuation."""
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    continuation: list[int] = out[0, len(prompt) :].tolist()
    return continuation


@dataclass(frozen=True)
class Draw:
    """One step before it is known what the engine holds."""

    sequence: int
    position: float  # part of the tokens believed to be cached
    count: int
    is_shared: bool


draws = st.builds(
    Draw,
    st.integers(0, len(ADAPTER_OF) - 1),
    st.just(0.0) | st.just(1.0) | st.floats(0, 1),
    st.integers(1, 4) | st.just(LENGTH),
    st.booleans(),
)
schedules = st.lists(st.lists(draws, min_size=1, max_size=6), min_size=3, max_size=10)


@pytest.mark.parametrize("architecture", TARGETS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=schedules)
def test_any_schedule_gives_the_merged_models_logits(
    architecture: str, schedule: list[list[Draw]], adapted: Callable[[str], Adapted]
) -> None:
    made = adapted(architecture)
    made.engine.free(map(str, range(len(ADAPTER_OF))))
    if not made.logits:
        made.logits = {i: stock_logits(made.models[name], tokens_of(i)) for i, name in enumerate(ADAPTER_OF)}
    believed = dict.fromkeys(range(len(ADAPTER_OF)), 0)
    for call in schedule:
        steps = []
        for draw in call:
            position = min(round(draw.position * believed[draw.sequence]), LENGTH - 1)
            tokens = tokens_of(draw.sequence)[position : position + draw.count]
            adapter, salt = (None, None) if position else (ADAPTER_OF[draw.sequence], "salt" * draw.is_shared or None)
            steps.append(SequenceStep(str(draw.sequence), position, tokens, 1, salt, adapter=adapter))
            believed[draw.sequence] = position + len(tokens)
        for step, output in zip(steps, made.engine.forward(steps), strict=True):
            sequence, end = int(step.sequence_id), step.position + len(step.token_ids)
            assert output.error is None
            believed[sequence] = end if output.num_computed_tokens is None else output.num_computed_tokens
            if output.num_computed_tokens is None:
                assert output.logits is not None
                wanted = made.logits[sequence][end - 1]
                torch.testing.assert_close(output.logits[0], wanted, atol=TOLERANCE, rtol=1e-5)
                assert int(output.logits[0].argmax()) == int(wanted.argmax())
        assert_consistent(made.engine._cache)


@pytest.mark.parametrize("architecture", TARGETS)
def test_greedy_beside_the_others_equals_generate(architecture: str, adapted: Callable[[str], Adapted]) -> None:
    made = adapted(architecture)
    prompt = tokens_of(0)[:7]
    tokens: dict[str | None, list[int]] = {name: list(prompt) for name in made.models}
    for step in range(16):
        steps = [
            SequenceStep(f"greedy-{name}", len(each) - 1 if step else 0, each[-1:] if step else each, 1)
            if step
            else SequenceStep(f"greedy-{name}", 0, each, 1, "salt", adapter=name)
            for name, each in tokens.items()
        ]
        for each, output in zip(tokens.values(), made.engine.forward(steps), strict=True):
            assert output.logits is not None, output
            each.append(int(output.logits[0].argmax()))
    for name, model in made.models.items():
        assert tokens[name] == prompt + generated(model, prompt, 16), name
    assert len({tuple(each) for each in tokens.values()}) == 3, "adapters that change nothing prove nothing"
    made.engine.free([f"greedy-{name}" for name in tokens])


@pytest.mark.parametrize("architecture", ["llama", "falcon-new"])
def test_an_adapters_draft_tokens_are_its_own(architecture: str, adapted: Callable[[str], Adapted]) -> None:
    made, prompt = adapted(architecture), tokens_of(0)[:7]
    draft = Draft(num_tokens=6, position=0, num_ids=VOCAB_SIZE, sampling=SamplingParams(temperature=0.0))
    steps = [SequenceStep(f"drafter-{name}", 0, prompt, 1, draft=draft, adapter=name) for name in made.models]
    for (name, model), output in zip(made.models.items(), made.engine.forward(steps), strict=True):
        assert list(output.drafted) == generated(model, prompt, 6), name
    made.engine.free([f"drafter-{name}" for name in made.models])


def test_a_beginning_is_found_again_by_the_same_adapter_only(adapted: Callable[[str], Adapted]) -> None:
    engine = adapted("llama").engine

    def hits(sequence_id: str, adapter: str | None) -> float:
        name, labels = "eft_engine_prefix_hit_tokens_total", {"model": "llama"}
        before = engine.registry.get_sample_value(name, labels)
        engine.forward([SequenceStep(sequence_id, 0, tokens_of(0)[:20], 1, "only", adapter=adapter)])
        engine.free([sequence_id])
        after = engine.registry.get_sample_value(name, labels)
        assert before is not None
        assert after is not None
        return after - before

    assert [hits("h", adapter) for adapter in ("a", None, "b", "a", "b", None)] == [0, 0, 0, 16, 16, 16]


def test_a_sequence_keeps_its_adapter_until_it_begins_again(adapted: Callable[[str], Adapted]) -> None:
    made, tokens = adapted("olmo2"), tokens_of(0)
    engine = made.engine
    for adapter in ("a", None, "b"):
        engine.forward([SequenceStep("kept", 0, tokens[:20], 0, adapter=adapter)])
        engine.forward([SequenceStep("kept", 20, tokens[20:21], 0)])
        (output,) = engine.forward([SequenceStep("kept", 21, tokens[21:23], 1)])
        assert output.logits is not None
        wanted = stock_logits(made.models[adapter], tokens[:23])[-1]
        torch.testing.assert_close(output.logits[0], wanted, atol=TOLERANCE, rtol=1e-5)
    engine.free(["kept"])


def test_steps_with_a_wrong_adapter_are_answered_and_good_ones_beside_them_served(
    adapted: Callable[[str], Adapted],
) -> None:
    steps = [
        SequenceStep("good", 0, [1, 2], 1, adapter="a"),
        SequenceStep("unknown", 0, [1, 2], 1, adapter="c"),
        SequenceStep("good", 2, [3], 1, adapter="a"),
    ]
    good, unknown, late = adapted("llama").engine.forward(steps)
    assert good.logits is not None
    assert unknown.error == "adapter: 'c' is not among this model's ['a', 'b']"
    assert late.error is not None
    assert "adapter: given at position 2" in late.error
    adapted("llama").engine.free(["good"])


def test_an_adapter_in_bfloat16_is_close(adapted: Callable[[str], Adapted]) -> None:
    made = adapted("llama")
    config = ModelConfig(path=str(made.checkpoint), dtype="bfloat16")
    engine = Engine.load("half", config, made.directories)
    (output,) = engine.forward([SequenceStep("half", 0, tokens_of(3), LENGTH, adapter="b")])
    engine.close()
    assert output.logits is not None
    wanted = stock_logits(made.models["b"], tokens_of(3))
    assert (output.logits.float() - wanted).norm() < 0.05 * wanted.norm()


def test_an_adapter_that_changes_nothing_is_the_model(adapted: Callable[[str], Adapted], tmp_path: Path) -> None:
    made = adapted("llama")
    fresh = write_random_lora(tmp_path / "fresh", made.checkpoint, ATTENTION, strength=0.0)
    engine = Engine.load("fresh", ModelConfig(path=str(made.checkpoint)), {"fresh": fresh})
    steps = [SequenceStep("x", 0, tokens_of(0), 3, adapter="fresh"), SequenceStep("y", 0, tokens_of(0), 3)]
    adapted_rows, plain_rows = (output.logits for output in engine.forward(steps))
    engine.close()
    assert adapted_rows is not None
    assert plain_rows is not None
    torch.testing.assert_close(adapted_rows, plain_rows, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strength", [0.5, 1e-4])
@pytest.mark.parametrize("mistake", ["ignored", "no numbers", "on other tokens", "joined in another order"])
def test_a_way_that_computes_an_adapter_wrongly_is_not_taken(
    adapted: Callable[[str], Adapted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str, strength: float
) -> None:
    """Also when the adapter changes less than the model's own check would tolerate."""
    made = adapted("llama")
    directory = write_random_lora(tmp_path / "a", made.checkpoint, ATTENTION, strength=strength)
    compact_only = lambda self: ["compact+paged"]  # noqa: E731
    monkeypatch.setattr("eft_serve.engine.model_runner.ModelRunner.backends", compact_only)
    if mistake == "ignored":
        monkeypatch.setattr(engine_adapters.Adapters, "add", lambda self, updates, states, out: out)
    elif mistake == "no numbers":
        monkeypatch.setattr(engine_adapters.Update, "add", lambda self, states, out, tokens: out.fill_(torch.nan))
    elif mistake == "on other tokens":
        as_tokens = engine_adapters._as_tokens
        monkeypatch.setattr(engine_adapters, "_as_tokens", lambda indices, device: as_tokens([0], device))
    else:
        joined = engine_adapters.Update.join
        monkeypatch.setattr(engine_adapters.Update, "join", lambda each, sizes: joined(each[::-1], sizes[::-1]))
    with pytest.raises(CheckpointError, match="logits of adapter a deviate"):
        Engine.load("wrong", ModelConfig(path=str(made.checkpoint)), {"a": directory})


def test_a_matrix_that_sees_other_tokens_is_an_error(adapted: Callable[[str], Adapted]) -> None:
    """As an expert would, to which only some tokens are sent."""
    engine = adapted("gpt_neox").engine
    dense = engine._group.runner.model.get_submodule("gpt_neox.layers.0.attention.dense")
    engine.forward([SequenceStep("x", 0, [1, 2, 3], 1, adapter="a")])
    with pytest.raises(EngineError, match="got 2 of 3 tokens"):
        dense(torch.zeros(1, 2, 32))
    engine.free(["x"])


def test_ranks_do_not_split_adapters(adapted: Callable[[str], Adapted]) -> None:
    config = ModelConfig(path=str(adapted("llama").checkpoint), tensor_parallel=2)
    with pytest.raises(EngineError, match="tensor_parallel: adapters \\(a, b\\) are not split"):
        Engine.load("split", config, adapted("llama").directories)


def edit_config(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | fields))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "dora": (lambda d: edit_config(d, use_dora=True), "use_dora is True, which is not computed"),
    "truncated": (
        lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:-1]),
        "truncated",
    ),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "another rank": (lambda d: edit_config(d, r=4), r"lora_A\.weight is \[3, 32\] where \[4, 32\] fits"),
    "the head": (lambda d: edit_tensors(d, add_head), "lm_head is no matrix in a layer"),
    "infinities": (lambda d: edit_tensors(d, lambda t: [x.fill_(torch.inf) for x in t.values()]), "infinities or NaN"),
}


def add_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(3, 32)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.zeros(VOCAB_SIZE, 3)


@pytest.mark.parametrize(("spoil", "said"), MISTAKES.values(), ids=MISTAKES)
def test_an_adapter_that_cannot_be_served(
    adapted: Callable[[str], Adapted], tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    checkpoint = adapted("llama").checkpoint
    directory = write_random_lora(tmp_path / "spoilt", checkpoint, ["q_proj", "down_proj"], rank=3)
    spoil(directory)
    with pytest.raises(CheckpointError, match=said) as caught:
        Engine.load("m", ModelConfig(path=str(checkpoint)), {"spoilt": directory})
    assert str(directory) in caught.value.message


def test_an_adapter_of_another_model_names_both(checkpoints: Checkpoints, adapted: Callable[[str], Adapted]) -> None:
    other = checkpoints("qwen3")
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        Engine.load("m", ModelConfig(path=str(other)), {"a": adapted("llama").directories["a"]})
    assert str(adapted("llama").directories["a"]) in caught.value.message
    assert str(other) in caught.value.message


def test_greedy_alone_is_what_it_is_beside_others(adapted: Callable[[str], Adapted]) -> None:
    """The plain model of an engine with adapters, by whom none is asked for."""
    made = adapted("falcon-new")
    prompt = tokens_of(1)[:9]
    assert greedy(made.engine, "alone", prompt, 8) == generated(made.models[None], prompt, 8)
