"""From a started group of ranks to a checked model with its cache; knows no sequences."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from eft_serve.config import ModelConfig
from eft_serve.engine.block_pool import BLOCK_SIZE, blocks_for
from eft_serve.engine.worker_group import WorkerGroup
from eft_serve.errors import CheckpointError, EftServeError, EngineError
from eft_serve.types import ModelInfo

if TYPE_CHECKING:
    from eft_serve.engine.model_runner import Probes

logger = logging.getLogger(__name__)

T = TypeVar("T")
CPU_KV_CACHE_TOKENS = 32768
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # relative, of the probe's logits


def start(name: str, config: ModelConfig, group: WorkerGroup) -> tuple[ModelInfo, int]:
    """Load, split, allocate and check; what the model is, and the number of token ids that it embeds.

    Raises:
        CheckpointError: the model directory is not one that can be served.
        EngineError: a rank failed, the cache does not fit, or adapters would have to be split.
    """
    references = group.start()
    num_blocks = _num_blocks(name, config, group.call("max_blocks"))
    group.call("allocate", num_blocks)
    path = _choose_path(config, group, references)
    runner, capacity = group.runner, num_blocks * BLOCK_SIZE
    info = ModelInfo(
        model=name,
        vocab_size=references[None].shape[-1],
        max_model_len=min(runner.max_model_len or capacity, capacity),
        kv_capacity_tokens=capacity,
        kv_block_size=BLOCK_SIZE,
        dtype=str(runner.dtype).removeprefix("torch."),
        tensor_parallel=config.tensor_parallel,
        attention=path,
    )
    logger.info("%s: %s attention, %s on %s, %d KV tokens", name, path, info.dtype, runner.device, capacity)
    return info, min(runner.num_embeddings, info.vocab_size)


def _num_blocks(name: str, config: ModelConfig, most: list[int | None]) -> int:
    """Blocks of the KV cache: as configured, or what the GPU with the least room has."""
    fitting = [blocks for blocks in most if blocks is not None]
    if config.kv_cache_tokens is None:
        num_blocks = min(fitting, default=CPU_KV_CACHE_TOKENS // BLOCK_SIZE)
    else:
        num_blocks = blocks_for(config.kv_cache_tokens)
    if num_blocks < 1 or num_blocks > min(fitting, default=num_blocks):
        raise EngineError(
            f"models.{name}.kv_cache_tokens: {num_blocks * BLOCK_SIZE} tokens do not fit; the GPU has room for "
            f"{max(0, min(fitting)) * BLOCK_SIZE} beside the weights; lower it, or raise kv_cache_fraction"
        )
    return num_blocks


def _choose_path(config: ModelConfig, group: WorkerGroup, references: Probes) -> str:
    """The first backend that gives the logits of the unsplit, uncached model and of its adapters."""
    tried: list[str] = []
    for name in group.runner.backends():
        outcome: Probes | str = group.call("try_backend", name)[0]
        mistake = outcome if isinstance(outcome, str) else _mistake(outcome, references, group.runner.dtype)
        if mistake is None:
            for reason in tried:
                logger.info("%s: %s", config.path, reason)
            return name
        tried.append(f"{name}: {mistake}")
    raise CheckpointError(
        f"path: {config.path} at tensor_parallel {config.tensor_parallel} does not compute what the checkpoint does "
        f"({'; '.join(tried)}); try tensor_parallel: 1 or a supported architecture"
    )


def _mistake(found: Probes, references: Probes, dtype: torch.dtype) -> str | None:
    """What deviates by more than rounding errors; None when nothing does.

    An adapter may change little. So its logits must also be nearer to their reference than to the plain model.
    """
    plain, tolerance = _wanted(references, None, found), _TOLERANCE[dtype]
    noise = _distance(found[None], plain)
    if not noise <= tolerance:  # also true of NaN
        return f"logits deviate by {noise:.2g}"
    for adapter in (name for name in references if name is not None):
        wanted = _wanted(references, adapter, found)
        effect, distance = _distance(plain, wanted), _distance(found[adapter], wanted)
        if not distance <= min(tolerance, effect / 10 + 4 * max(noise, torch.finfo(dtype).eps)):
            return f"logits of adapter {adapter} deviate by {distance:.2g}, and it changes them by {effect:.2g}"
    return None


def _wanted(references: Probes, adapter: str | None, found: Probes) -> Tensor:
    """The reference's rows that the probe gives: its last ones, and the second of the plain sequence beside it."""
    count = len(found[adapter]) - 1
    return torch.cat([references[adapter][-count:], references[None][1:2]])


def _distance(logits: Tensor, wanted: Tensor) -> float:
    """Relative distance; logits that differ by a constant are equal."""
    logits, wanted = (each.float() - each.float().mean(-1, keepdim=True) for each in (logits, wanted))
    return float((logits - wanted).norm() / wanted.norm())


def within(seconds: float, work: Callable[[], T], name: str) -> T:
    """Run `work` in a thread of its own and wait at most `seconds`.

    Raises:
        EngineError: it took longer, or failed with something else than an `EftServeError`.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f"load-{name}", daemon=True).start()
    try:
        return future.result(seconds)
    except FutureTimeoutError as error:
        raise EngineError(f"models.{name}: not ready within startup_timeout_s = {seconds:.0f} s") from error
    except EftServeError:
        raise
    except Exception as error:
        raise EngineError(f"models.{name}: cannot start: {type(error).__name__}: {error}") from error
