"""lm-evaluation-harness over HTTP, as its command is run: its log-likelihoods are those of `/v1/score`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from clients import INSTALLED, package
from harness import Served
from transformers import AutoTokenizer

from eft_serve.config import ZOO_CHECKPOINTS
from eft_serve.zoo.questions import held_out_questions

package("lm_eval")

CLOSE = 1e-4
TIMEOUT_S = 240
CHECKPOINT = ZOO_CHECKPOINTS / "base-large"
TOKENIZER = AutoTokenizer.from_pretrained(CHECKPOINT)
QUESTIONS = [question.text for question in held_out_questions(5, seed=3)]
CHOICES = ["It is", "Lima", "I do not know, and I had soup for lunch."]
DOCUMENTS = [{"question": f"User: {question}\nAssistant:", "choices": CHOICES} for question in QUESTIONS]
MAX_TOKENS = 16

TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": MAX_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@dataclass(frozen=True)
class Harness:
    """How the harness asks."""

    model: str
    tasks: tuple[str, ...] = ("choose", "answer", "perplexity")
    kind: str = "local-completions"
    batch_size: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    def run(self, served: Served, directory: Path) -> dict[str, list[dict[str, Any]]]:
        """Samples by task, in the order of the documents."""
        path = "chat/completions" if self.kind == "local-chat-completions" else "completions"
        arguments = {"model": self.model, "base_url": f"{served.url}/v1/{path}", "max_retries": 1, **dict(self.options)}
        if self.kind == "local-completions":
            arguments |= {"tokenizer_backend": "huggingface", "tokenizer": str(CHECKPOINT)}
        command = [
            *(sys.executable, "-m", "lm_eval", "run", "--model", self.kind),
            *("--model_args", json.dumps(arguments), "--batch_size", str(self.batch_size)),
            *("--tasks", ",".join(self.tasks), "--log_samples", "--output_path", str(directory / "out")),
            *("--include_path", str(write_tasks(directory))),
            *(["--apply_chat_template"] if self.kind == "local-chat-completions" else []),
        ]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(INSTALLED)))),
            "OPENAI_API_KEY": served.keys["tests"],
            "HF_HOME": str(directory / "hf"),
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            command, env=environment, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        samples = {}
        for task in self.tasks:
            (file,) = directory.glob(f"out/**/samples_{task}_*.jsonl")
            samples[task] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
            assert len(samples[task]) == len(DOCUMENTS)
        return samples


def write_tasks(directory: Path) -> Path:
    """Tasks without a network: their documents are a file."""
    tasks = directory / "tasks"
    tasks.mkdir()
    documents = tasks / "documents.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1},
    }
    for name, task in TASKS.items():
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | task))
    return tasks


def scored(served: Served, model: str, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    body = {"model": model, "items": items, "components": 1}
    response = httpx.post(f"{served.url}/v1/score", json=body, headers=served.headers(), timeout=120)
    assert response.status_code == 200, response.text
    data: list[dict[str, Any]] = response.json()["data"]
    return data


def log_likelihoods(scores: list[dict[str, Any]]) -> Any:
    return pytest.approx([score["total"]["logprob"] for score in scores], abs=CLOSE)


HARNESSES = {
    "token ids, one prompt a request": Harness("eft"),
    "token ids, several prompts a request": Harness("eft", batch_size=4),
    "several requests at once": Harness("eft", batch_size=2, options=(("num_concurrent", 4),)),
    "texts, several a request": Harness("tuned-small", batch_size=4, options=(("tokenized_requests", False),)),
}


@pytest.mark.parametrize("harness", HARNESSES.values(), ids=HARNESSES)
def test_log_likelihoods_are_scores_and_generations_are_completions(
    served: Served, tmp_path: Path, harness: Harness
) -> None:
    samples = harness.run(served, tmp_path)
    chosen = [response[0] for sample in samples["choose"] for response in sample["resps"]]
    items = [
        {"prompt": document["question"], "completion": f" {choice}"} for document in DOCUMENTS for choice in CHOICES
    ]
    scores = scored(served, harness.model, items)
    assert [float(logprob) for logprob, _ in chosen] == log_likelihoods(scores)
    greedy = [all(token["top"][0]["token_id"] == token["token_id"] for token in score["tokens"]) for score in scores]
    assert [is_greedy == "True" for _, is_greedy in chosen] == greedy
    assert set(greedy) == {False, True}
    rolled = [float(sample["resps"][0][0]) for sample in samples["perplexity"]]
    start = [TOKENIZER.eos_token_id]  # what the harness puts before a text, as there is no token for a beginning
    texts = [{"prompt": start, "completion": TOKENIZER(text["question"])["input_ids"]} for text in DOCUMENTS]
    assert rolled == log_likelihoods(scored(served, harness.model, texts))
    completions = served.client().completions.create(
        model=harness.model,
        prompt=[str(document["question"]) for document in DOCUMENTS],
        max_tokens=MAX_TOKENS,
        stop=["\n"],
        temperature=0,
    )
    assert [sample["resps"][0][0] for sample in samples["answer"]] == [choice.text for choice in completions.choices]


def test_chats_of_the_harness_are_chats(served: Served, tmp_path: Path) -> None:
    samples = Harness("eft", ("answer",), "local-chat-completions").run(served, tmp_path)
    for sample, document in zip(samples["answer"], DOCUMENTS, strict=True):
        answer = served.client().chat.completions.create(
            model="eft",
            messages=[{"role": "user", "content": str(document["question"])}],
            max_tokens=MAX_TOKENS,
            stop=["\n"],
            temperature=0,
        )
        assert sample["resps"][0][0] == answer.choices[0].message.content
