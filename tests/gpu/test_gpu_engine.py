"""The engine on a GPU against plain transformers on the same GPU.

Both round, and at different places. What is allowed is therefore measured: the engine may be about as far from the
float32 model as plain transformers is in the engine's dtype.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from gpu_models import VOCAB_SIZE, Stock
from torch import Tensor

from eft_serve.engine.engine import Engine
from eft_serve.errors import EngineError
from eft_serve.types import SequenceStep

Load = Callable[..., Engine]
Step = tuple[int, int, int]  # sequence, computed tokens, added tokens

RMS_FACTOR, LARGEST_FACTOR = 1.5, 3.0  # over what plain transformers gets wrong: on average, and at worst
FLOOR = 1e-4  # of float32, in which plain transformers is the measure itself
LENGTH = 200
SETTINGS = {"kv_cache_tokens": 2048, "max_num_batched_tokens": 48}  # longer prompts are computed in chunks
CALLS: list[list[Step]] = [
    [(0, 0, 5), (1, 0, 60), (2, 0, 130)],  # prefill; the last two in chunks
    [(0, 5, 1), (1, 60, 1), (2, 130, 1), (3, 0, 70)],  # decode beside a prompt that begins like another
    *([(0, 6 + i, 1), (1, 61 + i, 1), (2, 131 + i, 1), (3, 70 + i, 1)] for i in range(20)),  # decode, unequal lengths
    [(0, 26, 4), (2, 151, 5), (1, 81, 1)],  # draft tokens to verify beside a plain decode
    [(0, 28, 2), (2, 152, 1), (1, 82, 1)],  # some were rejected: roll back
    [(4, 0, 130)],  # a prompt that was computed before
    [(4, 130, 1), (3, 90, 1), (0, 0, 40)],  # and one that begins anew
]
SIXTEEN_BITS = [
    (architecture, dtype, backend)
    for architecture in ("llama", "mistral", "qwen2-sliding")
    for dtype in ("bfloat16", "float16")
    for backend in ("compact+varlen", "compact+grouped", "ragged+varlen", "ragged+grouped", "padded")
]
OTHERS = [
    *(("llama", "float32", backend) for backend in ("compact+grouped", "ragged+grouped", "padded")),
    *((architecture, "bfloat16", None) for architecture in ("olmo2", "gemma2", "falcon-new")),
]


def tokens_of(sequence: int) -> list[int]:
    """3 and 4 begin like 2."""
    own = random.Random(sequence).choices(range(VOCAB_SIZE), k=LENGTH)
    shared = {3: 64, 4: LENGTH}.get(sequence, 0)
    return random.Random(2).choices(range(VOCAB_SIZE), k=LENGTH)[:shared] + own[shared:]


def check_offered(device: torch.device, dtype: str, backend: str | None) -> None:
    if device.type == "cpu" and (dtype == "float16" or "varlen" in (backend or "")):
        pytest.skip("of a GPU alone")


def num_logits(step: Step) -> int:
    """All of them, but for prompts whose beginning is cached: what logits are wanted of is computed."""
    sequence, num_computed, count = step
    return count - {3: 64, 4: 112}[sequence] if num_computed == 0 and sequence in (3, 4) else count


def run(engine: Engine, call: list[Step]) -> list[Tensor]:
    """Each step's logits."""
    steps = [
        SequenceStep(
            str(s),
            num_computed,
            tokens_of(s)[num_computed : num_computed + n],
            num_logits((s, num_computed, n)),
            None if num_computed else "salt",
        )
        for s, num_computed, n in call
    ]
    found = []
    for output in engine.forward(steps):
        assert output.logits is not None, output
        found.append(output.logits.float())
    return found


@pytest.mark.parametrize(("architecture", "dtype", "backend"), [*SIXTEEN_BITS, *OTHERS])
def test_prefill_chunks_decode_rollback_and_reuse_give_the_stock_models_logits(
    architecture: str, dtype: str, backend: str | None, load: Load, stock: Callable[[str], Stock], device: torch.device
) -> None:
    check_offered(device, dtype, backend)
    engine, model = load(architecture, dtype, backend, **SETTINGS), stock(architecture)
    exact, rounded = (
        [read(tokens_of(s)) for s in range(5)] for read in (model.exact, lambda t: model.logits(dtype, t))
    )
    ours, theirs = [], []
    for call in CALLS:
        for (s, num_computed, count), logits in zip(call, run(engine, call), strict=True):
            where = slice(num_computed + count - num_logits((s, num_computed, count)), num_computed + count)
            ours.append(logits - exact[s][where])
            theirs.append(rounded[s][where] - exact[s][where])
    mine, noise = torch.cat(ours), torch.cat(theirs)
    print(
        f"rms {mine.square().mean().sqrt():.3g} of {noise.square().mean().sqrt():.3g}, "
        f"largest {mine.abs().max():.3g} of {noise.abs().max():.3g}; logits {exact[0].std():.3g}"
    )
    assert mine.square().mean().sqrt() <= RMS_FACTOR * noise.square().mean().sqrt() + FLOOR
    assert mine.abs().max() <= LARGEST_FACTOR * noise.abs().max() + FLOOR
    hits = engine.registry.get_sample_value("eft_engine_prefix_hit_tokens_total", {"model": architecture})
    assert hits is not None
    assert hits >= 64 + 112, "two prompts found what others had computed"


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [("bfloat16", "compact+varlen"), ("float16", "compact+varlen"), ("bfloat16", "compact+grouped"), ("float32", None)],
)
def test_greedy_tokens_are_the_stock_models_where_rounding_does_not_decide(
    dtype: str, backend: str | None, load: Load, stock: Callable[[str], Stock], device: torch.device
) -> None:
    check_offered(device, dtype, backend)
    engine, model = load("llama", dtype, backend, **SETTINGS), stock("llama")
    prompts = [tokens_of(10 + i)[:length] for i, length in enumerate((3, 17, 50, 90))]
    sequences, num_computed = [list(prompt) for prompt in prompts], [0] * len(prompts)
    for _ in range(40):
        steps = [
            SequenceStep(str(i), num_computed[i], tokens[num_computed[i] :], 1) for i, tokens in enumerate(sequences)
        ]
        for i, output in enumerate(engine.forward(steps)):
            assert output.logits is not None, output
            num_computed[i] = len(sequences[i])
            sequences[i].append(int(output.logits[-1].argmax()))
    num_decided = 0
    for prompt, sequence in zip(prompts, sequences, strict=True):
        exact = model.exact(sequence[:-1])[len(prompt) - 1 :]
        noise = (model.logits(dtype, sequence[:-1])[len(prompt) - 1 :] - exact).abs().max()
        tolerance = 2 * noise + FLOOR  # both tokens may be off, in opposite directions
        best, second = exact.topk(2).values.T
        chosen = exact.gather(1, torch.tensor([sequence[len(prompt) :]]).T)[:, 0]
        assert ((best - chosen) <= tolerance).all()
        num_decided += int((best - second > tolerance).sum())
    assert num_decided > 20, "rounding decides too often for this to prove anything"


@pytest.mark.parametrize(
    ("architecture", "dtype", "expected"),
    [
        ("llama", "auto", "compact+varlen"),
        ("mistral", "float16", "compact+varlen"),
        ("llama", "float32", "compact+grouped"),
        ("olmo2", "bfloat16", "ragged+varlen"),
        ("gemma2", "bfloat16", "ragged+grouped"),  # its scores are capped, which the flash kernel has not
        ("falcon-new", "bfloat16", "padded"),
    ],
)
def test_the_fastest_way_that_fits_is_found_on_a_gpu(
    gpu: torch.device, architecture: str, dtype: str, expected: str, load: Load
) -> None:
    info = load(architecture, dtype, kv_cache_tokens=2048).info
    assert info.attention == expected
    assert info.dtype == ("bfloat16" if dtype == "auto" else dtype)


def test_the_cache_takes_the_part_of_the_gpu_that_is_configured(gpu: torch.device, load: Load) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    engine = load("llama", "bfloat16", kv_cache_fraction=0.1)
    used = total - torch.cuda.mem_get_info()[0]
    bytes_per_token = 4 * 2 * 2 * 64 * 2  # layers, keys and values, heads, dimensions, bytes
    assert engine.info.kv_capacity_tokens * bytes_per_token > 0.05 * total
    assert used < 0.12 * total, "workspaces of the libraries beside it"


def test_a_cache_that_does_not_fit_is_refused_by_name(gpu: torch.device, load: Load) -> None:
    with pytest.raises(EngineError, match="kv_cache_tokens"):
        load("llama", "bfloat16", kv_cache_tokens=10**10)
