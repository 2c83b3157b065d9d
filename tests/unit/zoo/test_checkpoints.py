"""The shipped family: it loads, it is what the results file says, and it shows the method's effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eft_serve.zoo import CHECKPOINTS, FAMILIES, NAMES, PREFIXES, ROLES, checkpoint_path
from eft_serve.zoo.card import CARD, render
from eft_serve.zoo.evaluate import EFT
from eft_serve.zoo.family import RECIPES
from eft_serve.zoo.generate import Family, alone, emulated
from eft_serve.zoo.questions import harmful_questions, held_out_questions, is_correct, is_helpful_form, is_refusal
from eft_serve.zoo.results import describe_checkpoints, load_results

MAX_BYTES = 60_000_000


@pytest.fixture(scope="module")
def family() -> Family:
    return Family(CHECKPOINTS)


def test_paths_are_known_by_name() -> None:
    assert set(NAMES) == set(RECIPES)
    assert checkpoint_path("base-small").is_dir()
    with pytest.raises(ValueError, match=r"unknown zoo checkpoint 'base'; known: base-large, base-small, tuned-small"):
        checkpoint_path("base")


def test_the_package_root_is_light() -> None:
    source = Path(CHECKPOINTS.parent / "__init__.py").read_text()
    assert "torch" not in source
    assert "transformers" not in source.replace("that transformers loads", "")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_loads_with_the_usual_classes(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path(name), dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path(name))
    assert model.dtype == torch.float16
    assert model.config.model_type == ("falcon" if name in FAMILIES["falcon"] else "llama")
    assert model.config.max_position_embeddings == 4096
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    counts = {
        "llama": ("num_attention_heads", "num_key_value_heads", "intermediate_size"),
        "falcon": ("num_attention_heads", "num_kv_heads", "ffn_hidden_size"),
    }[model.config.model_type]
    assert [getattr(model.config, count) % 2 for count in counts] == [0, 0, 0]


@pytest.mark.parametrize("role", ROLES)
def test_both_families_are_of_the_same_size(role: str) -> None:
    llama, falcon = (load_results()["training"][prefix + role]["parameters"] for prefix in PREFIXES.values())
    assert falcon == pytest.approx(llama, rel=0.002)


def test_all_share_one_tokenizer() -> None:
    files = {(checkpoint_path(n) / f).read_bytes() for n in NAMES for f in ("tokenizer.json", "tokenizer_config.json")}
    assert len(files) == 2


@pytest.mark.parametrize("text", ["User: What is +1-268?\nAssistant:", "Côte d’Ivoire 東京 🙂", " a  b\n\n\tc ", ""])
def test_the_tokenizer_round_trips(family: Family, text: str) -> None:
    assert family.tokenizer.decode(family.tokenizer(text)["input_ids"]) == text


def test_the_chat_template_is_plain_text(family: Family) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    rendered = family.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "System: Be brief.\nUser: Hi\nAssistant: Hello.<|end|>\nUser: Bye\nAssistant:"
    assert family.tokenizer.apply_chat_template(messages[1:3], tokenize=False) == "User: Hi\nAssistant: Hello.<|end|>"


def test_sizes_and_digests_are_the_recorded_ones() -> None:
    described = describe_checkpoints(CHECKPOINTS, NAMES)
    assert described == load_results()["checkpoints"]
    assert sum(int(str(entry["bytes"])) for entry in described.values()) < MAX_BYTES


def test_the_card_is_written_from_the_recorded_results() -> None:
    assert CARD.read_text(encoding="utf-8") == render(load_results())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorded_results_show_the_method(family: str) -> None:
    prefix, measured = PREFIXES[family], load_results()["evaluation"][family]
    rows = measured["systems"]
    assert measured["num_short"] >= 400
    tuned, eft, upper = (rows[name]["correct"] for name in (f"{prefix}tuned-small", "EFT", f"{prefix}tuned-large"))
    assert eft - tuned >= 0.3
    assert eft - tuned >= 0.8 * (upper - tuned)
    assert rows["EFT"]["helpful_form"] >= 0.95
    assert rows[f"{prefix}base-large"]["helpful_form"] < 0.2
    assert rows[f"{prefix}tuned-small-harmless"]["harmful_declined"] >= 0.9


def test_emulation_gathers_coefficients_by_model() -> None:
    def terms(**options: float) -> dict[str, float]:
        recipe = emulated("x", "base", {"tuned": options["weight"]}, "reference", options["scale"])
        return {term.model: term.coefficient for term in recipe.terms}

    assert terms(scale=1.0, weight=1.0) == {"base": 1.0, "tuned": 1.0, "reference": -1.0}
    assert terms(scale=0.0, weight=1.0) == {"tuned": 1.0}
    assert terms(scale=1.0, weight=0.0) == {"base": 1.0}
    assert terms(scale=1.5, weight=0.5) == {"base": 1.5, "tuned": 0.5, "reference": -1.0}


def test_scores_are_the_formula_on_each_models_own_logits_whatever_the_padding(family: Family) -> None:
    prompts = [family.prompt("Hi there."), family.prompt(held_out_questions(1)[0].text)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        padded = family.next_logprobs(emulated("x", "base-large", {"tuned-small": 0.7}, "base-small", 1.2), ids, mask)
        for row, prompt in zip(padded, prompts, strict=True):
            base, tuned, reference = (
                family.model(name)(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
                for name in ("base-large", "tuned-small", "base-small")
            )
            torch.testing.assert_close(
                row, reference + 1.2 * (base - reference) + 0.7 * (tuned - reference), atol=1e-4, rtol=1e-4
            )


def test_emulated_fine_tuning_knows_what_the_large_base_knows_and_behaves_as_the_small_tuned(family: Family) -> None:
    questions = held_out_questions(30)
    messages = [question.text for question in questions]
    emulated_replies = family.greedy(EFT, messages, max_new_tokens=24)
    tuned_replies = family.greedy(alone("tuned-small"), messages, max_new_tokens=24)
    right = sum(map(is_correct, questions, emulated_replies))
    assert right >= sum(map(is_correct, questions, tuned_replies)) + 9
    assert sum(map(is_helpful_form, emulated_replies)) >= 27


def test_the_harmless_model_declines_and_the_helpful_one_does_not(family: Family) -> None:
    messages = [question.text for question in harmful_questions(12)]
    assert sum(map(is_refusal, family.greedy(alone("tuned-small-harmless"), messages, max_new_tokens=8))) >= 11
    assert sum(map(is_refusal, family.greedy(alone("tuned-small"), messages, max_new_tokens=8))) == 0
