"""An answer that is sent back in the next turn is read as the very tokens that the model generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from eft_serve.zoo import CHECKPOINTS, NAMES, checkpoint_path
from eft_serve.zoo.generate import Family
from eft_serve.zoo.questions import held_out_questions
from eft_serve.zoo.tokenizer import CHAT_TEMPLATE


@pytest.fixture(scope="module")
def family() -> Family:
    return Family(CHECKPOINTS)


def chat(tokenizer: Any, *turns: str) -> list[int]:
    """User and assistant in turns, then the prompt for the next answer."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text)["input_ids"])


@torch.inference_mode()
def generate(family: Family, model: str, prompt: list[int]) -> list[int]:
    """Greedy, the end token included."""
    loaded: Any = family.model(model)
    output: list[int] = loaded.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0].tolist()
    output = output[len(prompt) :]
    assert output[-1] == family.tokenizer.eos_token_id, "the answer must end"
    return output


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoints_have_the_template_that_training_writes(name: str) -> None:
    assert AutoTokenizer.from_pretrained(checkpoint_path(name)).chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("model", ["base-large", "tuned-small"])
def test_a_second_turn_reads_the_tokens_that_the_first_generated(family: Family, model: str) -> None:
    tokenizer = family.tokenizer
    between = tokenizer("\nUser: And the next?\nAssistant:")["input_ids"]
    for question in held_out_questions(8):
        prompt = chat(tokenizer, question.text)
        output = generate(family, model, prompt)
        answer = tokenizer.decode(output, skip_special_tokens=True)
        assert answer.startswith(" ")
        assert chat(tokenizer, question.text, answer, "And the next?") == prompt + output + between
        assert chat(tokenizer, question.text, answer.strip(), "And the next?") == prompt + output + between


@pytest.mark.parametrize(
    ("content", "shown"),
    [("Paris.", " Paris."), (" Paris.", " Paris."), ("  Paris.", "  Paris."), ("\nParis.", "\nParis."), ("", " ")],
)
def test_only_text_that_begins_with_no_space_gets_one(family: Family, content: str, shown: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    rendered = family.tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == f"User: Hi\nAssistant:{shown}<|end|>"
