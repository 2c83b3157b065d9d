"""One rank's model and its KV tensors: loaded, split by DeepSpeed, checked, and run; knows no sequences and no budget.

The only module that imports DeepSpeed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eft_serve.checkpoints.model import load_model, read_config
from eft_serve.config import ModelConfig
from eft_serve.engine import paged_attention, varlen_attention
from eft_serve.engine.adapters import Adapters
from eft_serve.engine.attention import GroupedAttention
from eft_serve.engine.batch import BatchRow, ForwardBatch
from eft_serve.engine.block_pool import BLOCK_SIZE
from eft_serve.engine.compact_path import CompactPath
from eft_serve.engine.layout import Layout
from eft_serve.engine.limits import check_served, context_limit
from eft_serve.engine.padded_path import PaddedPath
from eft_serve.engine.paged_attention import PagedAttention
from eft_serve.engine.paged_tensors import PagedTensors
from eft_serve.engine.ragged_path import RaggedPath
from eft_serve.engine.varlen_attention import VarlenAttention
from eft_serve.engine.weights import store_input_major
from eft_serve.errors import CheckpointError, EftServeError, EngineError

logger = logging.getLogger(__name__)

PATHS: dict[str, type[CompactPath] | type[RaggedPath] | type[PaddedPath]] = {
    path.name: path for path in (CompactPath, RaggedPath, PaddedPath)
}
ATTENTIONS: dict[str, type[VarlenAttention] | type[PagedAttention] | type[GroupedAttention]] = {
    attention.name: attention for attention in (VarlenAttention, PagedAttention, GroupedAttention)
}
COLLECTIVE_TIMEOUT = timedelta(seconds=120)  # of one all-reduce; a dead peer shows at once, a stopped one after this
PROBE_TOKENS = 2 * BLOCK_SIZE + 8  # more than two blocks, so that a wrong layout of blocks shows
PROBE_BLOCKS = 4  # of the probe, and of the sequence beside it

Probes = dict[str | None, Tensor]  # logits [num_tokens, vocab_size] by adapter; None is the model as it is


class ForwardPath(Protocol):
    """A backend that runs the model on a layout."""

    name: str

    def forward(self, layout: Layout, cache: PagedTensors) -> Tensor: ...


def resolve_device(config: ModelConfig, rank: int) -> torch.device:
    """`auto` is a GPU where there is one; each rank has its own."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    wanted, seen = config.tensor_parallel, torch.cuda.device_count()
    if seen < wanted:
        raise EngineError(
            f"device: {wanted} GPUs are needed, one for each rank, and this process sees {seen}; set "
            f"resources.num_gpus: {wanted}, or device: cpu"
        )
    return torch.device("cuda", rank)


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU and bfloat16 on a GPU."""
    if config.dtype == "float16" and device.type == "cpu":
        raise EngineError("dtype: float16 is not computed on a CPU; set float32 or bfloat16")
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


class ModelRunner:
    """One rank. `load`, `split`, `allocate` and `try_backend` in this order, then `forward` as often as wanted."""

    def __init__(self, config: ModelConfig, rank: int, adapters: Mapping[str, Path] | None = None) -> None:
        self._config = config
        self._rank = rank
        self._directories = adapters or {}
        self.device = resolve_device(config, rank)
        self.dtype = resolve_dtype(config, self.device)
        self._cache = PagedTensors([], [])
        self._path: ForwardPath | None = None
        self._joined = False

    def load(self) -> Probes | None:
        """Read the checkpoint and its adapters; rank 0 returns the unsplit, uncached model's probe logits."""
        path = self._config.checkpoint
        self.hf_config = read_config(path)
        check_served(self.hf_config, self._config)
        self.max_model_len = context_limit(self.hf_config, self._config)
        self.model: PreTrainedModel = load_model(path, self.hf_config, self.dtype)
        self._adapters = Adapters.load(self._directories, self.model)
        self._stock_attention = self.model.config._attn_implementation
        self.num_embeddings = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        if self._rank > 0:
            return None
        return {adapter: self._stock_logits(adapter) for adapter in (None, *self._adapters.names)}

    def probe_ids(self) -> list[int]:
        """A prompt whose token ids exist in any vocabulary."""
        count = min(PROBE_TOKENS, self.max_model_len or PROBE_TOKENS)
        return [(7 * i + 3) % self.num_embeddings for i in range(count)]

    @torch.no_grad()
    def _stock_logits(self, adapter: str | None) -> Tensor:
        with self._adapters.merged(self.model, adapter):
            logits: Tensor = self.model(torch.tensor([self.probe_ids()]), use_cache=False).logits[0]
        if not logits.isfinite().all():
            what = f"path: {self._config.path}" if adapter is None else f"adapter: {self._directories[adapter]}"
            raise CheckpointError(f"{what} computes infinities or NaN in {self.dtype}; try dtype float32")
        return logits

    def split(self, store: Path | None) -> None:
        """Hand the model to DeepSpeed, which moves it to the device and keeps this rank's share of it."""
        world_size = self._config.tensor_parallel
        os.environ["DS_ACCELERATOR"] = self.device.type
        os.environ["LOCAL_RANK"] = str(self._rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        with _quiet():
            if store is not None:
                self._join(store, world_size)
            try:
                self.model = self._init_inference(world_size)
                store_input_major(self.model)
                self._adapters.attach(self.model, self.device)
                self._read_cache_shapes()
            except (EftServeError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # DeepSpeed and the models fail here in any way
                remedy = "; set tensor_parallel: 1" if world_size > 1 else ""
                raise CheckpointError(
                    f"path: {self._config.path} ({self.hf_config.model_type}) cannot be run by DeepSpeed at "
                    f"tensor_parallel {world_size}{remedy} ({type(error).__name__}: {error})"
                ) from error

    def _init_inference(self, world_size: int) -> PreTrainedModel:
        import deepspeed

        engine = deepspeed.init_inference(
            self.model,
            tensor_parallel={"tp_size": world_size},
            replace_with_kernel_inject=False,
            dtype=self.dtype,
        )
        model: PreTrainedModel = engine.module
        return model

    def _join(self, store: Path, world_size: int) -> None:
        import deepspeed

        # Without this, DeepSpeed compiles a shared-memory all-reduce at first use (minutes, and a lock that outlives a
        # killed process), leaves 69 MB per rank in /dev/shm and spins while it waits. Plain gloo does none of these.
        deepspeed.ops.__compatible_ops__ = {}
        torch.distributed.init_process_group(
            backend="nccl" if self.device.type == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=self._rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        self._joined = True

    @torch.no_grad()
    def _read_cache_shapes(self) -> None:
        """What each layer caches, read from the model's own cache: (kv_heads, key and value head_dim)."""
        ids = torch.tensor([self.probe_ids()], device=self.device)
        layers = getattr(getattr(self.model(ids, use_cache=True), "past_key_values", None), "layers", None)
        if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
            raise CheckpointError(f"path: {self._config.path} keeps another state than keys and values; not served")
        self._shapes = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]

    @property
    def bytes_per_token(self) -> int:
        """KV cache of one token on this rank."""
        return int(sum(heads * (key + value) for heads, key, value in self._shapes) * self.dtype.itemsize)

    def max_blocks(self) -> int | None:
        """Blocks that fit this rank's GPU beside the weights; None on a CPU."""
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        budget = int(total * self._config.kv_cache_fraction) - (total - free)
        return budget // (self.bytes_per_token * BLOCK_SIZE)

    def allocate(self, num_blocks: int) -> None:
        """Take the whole KV cache at once; block 0 is extra and stays zero."""
        blocks = max(num_blocks, PROBE_BLOCKS) + 1
        options = {"dtype": self.dtype, "device": self.device}
        self._cache = PagedTensors(
            [torch.zeros(blocks, heads, BLOCK_SIZE, key_dim, **options) for heads, key_dim, _ in self._shapes],  # type: ignore[call-overload]
            [torch.zeros(blocks, heads, BLOCK_SIZE, value_dim, **options) for heads, _, value_dim in self._shapes],  # type: ignore[call-overload]
        )

    def backends(self) -> list[str]:
        """How the model could be run here, the fastest first: a path, and the attention that it is given."""
        suited = {
            VarlenAttention.name: varlen_attention.suits(self.device, self.dtype),
            PagedAttention.name: paged_attention.suits(self.device, self.dtype),
            GroupedAttention.name: True,
        }
        attentions = [name for name, suits in suited.items() if suits]
        return [f"{path}+{attention}" for path in ("compact", "ragged") for attention in attentions] + ["padded"]

    def try_backend(self, backend: str) -> Probes | str:
        """The probe's last logits, see `_probe`, or why there are none."""
        path, _, attention = backend.partition("+")
        try:
            attend = ATTENTIONS[attention or GroupedAttention.name]()
            if self.model.config._attn_implementation != self._stock_attention:
                self.model.set_attn_implementation(self._stock_attention)
            self._path = PATHS[path](self.model, attend, self._adapters)
            return {adapter: self._probe(adapter) for adapter in (None, *self._adapters.names)}
        except Exception as error:  # any model may fail here in any way; the caller decides what that means
            return f"{type(error).__name__}: {error}"

    def _probe(self, adapter: str | None) -> Tensor:
        """Logits of the probe's second half, run in two pieces, then of a plain sequence's second token beside it."""
        ids = self.probe_ids()
        cut, (*own, other) = len(ids) // 2, range(1, PROBE_BLOCKS + 1)
        rest = len(ids) - cut
        first = [BatchRow(ids[:cut], 0, own, 0, adapter), BatchRow(ids[:1], 0, [other], 0)]
        second = [BatchRow(ids[cut:], cut, own, rest, adapter), BatchRow(ids[1:2], 1, [other], 1)]
        self.forward(ForwardBatch(first))
        return self.forward(ForwardBatch(second))

    @torch.inference_mode()  # a seventh faster than no_grad on a small model
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [batch.num_logits, vocab_size] on the CPU, rows in the order of the batch."""
        if self._path is None:
            raise EngineError("forward before try_backend")
        self._cache.copy(batch.copies)
        layout = Layout.of(batch, self.device)
        self._cache.clear(layout.begun)
        return self._path.forward(layout, self._cache).cpu()

    def close(self) -> None:
        """Leave the group and forget the class-level state that DeepSpeed keeps of it."""
        self._cache = PagedTensors([], [])
        self._path = None
        if self._joined:
            import deepspeed

            del self.model
            self._joined = False
            torch.distributed.destroy_process_group()
            deepspeed.comm.comm.cdb = None
            deepspeed.InferenceEngine.inference_mp_group = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its policy to stdout; keep it for debugging only."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if said.getvalue():
        logger.debug("DeepSpeed: %s", said.getvalue().strip())
