"""Trains one model of the family: seeded, resumable after a kill, bit for bit. Knows nothing of what the data mean."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from eft_serve.zoo.batches import Batches
from eft_serve.zoo.family import Architecture, TrainingRecipe
from eft_serve.zoo.tokenizer import END, PAD, id_of, train_tokenizer, wrap

Model = LlamaForCausalLM | FalconForCausalLM

SAVE_EVERY = 200
CLIP = 1.0
WEIGHT_DECAY = 0.01
_MULTIPLIES_BFLOAT16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))  # emulating it takes ten times as long


@dataclass(frozen=True)
class TrainingOutcome:
    """What a finished run measured."""

    name: str
    parameters: int
    steps: int
    tokens: int
    final_loss: float
    wall_seconds: float


class InterruptedRunError(Exception):
    """The run stopped where its caller asked; its state is on disk."""


def train(
    recipe: TrainingRecipe,
    out: Path,
    *,
    seed: int,
    resume: bool = True,
    save_every: int = SAVE_EVERY,
    stop_at: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> TrainingOutcome:
    """Trains one model into ``out/NAME``. A fine-tune starts from its parent's written checkpoint in ``out``."""
    tokenizer = tokenizer or train_tokenizer(seed)
    torch.manual_seed(seed)
    model = _initial_model(recipe, out, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)
    state = out / ".state" / f"{recipe.name}.pt"
    step, loss, seconds = _restore(state, model, optimizer) if resume else (0, math.nan, 0.0)
    batches = Batches(recipe, tokenizer, seed)
    schedule = recipe.schedule
    with _progress(recipe.name, schedule.steps, step) as report:
        while step < schedule.steps:
            if step == stop_at:
                raise InterruptedRunError(f"{recipe.name} stopped at step {step}")
            started = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            latest = _update(model, optimizer, *batches(step))
            loss = latest if math.isnan(loss) else 0.98 * loss + 0.02 * latest
            seconds += time.monotonic() - started
            step += 1
            report(step, loss)
            if step % save_every == 0:
                _save(state, model, optimizer, step, loss, seconds)
    write_checkpoint(model, tokenizer, out / recipe.name)
    tokens = schedule.steps * batches(0)[0].numel()
    return TrainingOutcome(recipe.name, _count(model), schedule.steps, tokens, round(loss, 4), round(seconds, 1))


def learning_rate(recipe: TrainingRecipe, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    schedule = recipe.schedule
    if step < schedule.warmup:
        return schedule.learning_rate * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def new_model(architecture: Architecture, tokenizer: Tokenizer) -> Model:
    """An untrained model of the shape."""
    shared: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": architecture.hidden,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": id_of(tokenizer, END),
        "pad_token_id": id_of(tokenizer, PAD),
    }
    if architecture.falcon_groups is None:
        return LlamaForCausalLM(
            LlamaConfig(num_key_value_heads=architecture.heads, intermediate_size=architecture.intermediate, **shared)
        )
    return FalconForCausalLM(
        FalconConfig(
            new_decoder_architecture=True,
            num_kv_heads=architecture.falcon_groups,
            ffn_hidden_size=architecture.intermediate,
            **shared,
        )
    )


def write_checkpoint(model: Model, tokenizer: Tokenizer, path: Path) -> None:
    """An ordinary transformers directory, in 16 bits; the directory appears whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    copy = deepcopy(model)
    torch.nn.Module.half(copy)  # three more bits of mantissa than bfloat16; no weight comes near the ends of its range
    end = id_of(tokenizer, END)
    copy.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=id_of(tokenizer, PAD), do_sample=False)
    copy.save_pretrained(scratch)
    wrap(tokenizer).save_pretrained(scratch, save_jinja_files=False)
    if path.exists():
        shutil.rmtree(path)
    scratch.rename(path)


def _initial_model(recipe: TrainingRecipe, out: Path, tokenizer: Tokenizer) -> Model:
    if recipe.architecture is not None:
        return new_model(recipe.architecture, tokenizer)
    if recipe.parent is None:
        raise ValueError(f"{recipe.name} has neither an architecture nor a parent")
    parent = out / recipe.parent
    if not (parent / "config.json").exists():
        raise FileNotFoundError(f"{recipe.name} is fine-tuned from {recipe.parent}: train that first into {out}")
    model = cast(Model, AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32))
    model.train()
    return model


def _update(model: Model, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=_MULTIPLIES_BFLOAT16):
        logits = model(input_ids=inputs, use_cache=False).logits
    loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.item()


def _save(
    path: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    step: int,
    loss: float,
    seconds: float,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    numbers = {"step": step, "loss": loss, "seconds": seconds}
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **numbers}, scratch)
    scratch.replace(path)


def _restore(path: Path, model: Model, optimizer: torch.optim.Optimizer) -> tuple[int, float, float]:
    if not path.exists():
        return 0, math.nan, 0.0
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["loss"], saved["seconds"]


def _count(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def _progress(name: str, total: int, start: int) -> Iterator[Any]:
    """A bar on a terminal, a line now and then in a log."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total, completed=start, loss="")

        def report(step: int, loss: float) -> None:
            bar.update(task, completed=step, loss=f"loss {loss:.3f}")
            if not console.is_terminal and step % 100 == 0:
                console.print(f"{name} step {step}/{total} loss {loss:.3f}")

        yield report


def summary(outcome: TrainingOutcome) -> dict[str, object]:
    """For the results file."""
    return asdict(outcome)
