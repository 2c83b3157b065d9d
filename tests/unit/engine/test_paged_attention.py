"""Our kernel over the blocks: against plain attention, and engines in which it takes turns with torch's."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_models import VOCAB_SIZE, stock_logits
from transformers import PreTrainedModel

from eft_serve.engine import paged_attention
from eft_serve.engine.attention import Attention, GroupedAttention
from eft_serve.engine.batch import BatchRow, ForwardBatch
from eft_serve.engine.engine import Engine
from eft_serve.engine.layout import Layout
from eft_serve.engine.paged_attention import PagedAttention
from eft_serve.engine.paged_kernel import attend
from eft_serve.engine.paged_tensors import PagedTensors
from eft_serve.types import SequenceStep

BLOCK_SIZE = 16
Floats = NDArray[np.float32]


class Rows:
    """Some rows of random queries, keys and values, their blocks scattered."""

    def __init__(self, lengths: list[int], q_length: int, kv_heads: int, repeats: int, dims: tuple[int, int]) -> None:
        rng = np.random.default_rng(sum(lengths))
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        ids = rng.permutation(sum(counts)) + 1
        self.tables = np.zeros((len(lengths), max(counts)), dtype=np.int64)
        for table, count, start in zip(self.tables, counts, np.cumsum([0, *counts]), strict=False):
            table[:count] = ids[start : start + count]
        self.lengths, self.q_length = np.array(lengths), q_length
        heads, num_tokens = kv_heads * repeats, len(lengths) * q_length
        self.query, self.keys, self.values = (
            rng.standard_normal(shape).astype(np.float32) * 2
            for shape in (
                (num_tokens, heads, dims[0]),
                (sum(counts) + 1, kv_heads, BLOCK_SIZE, dims[0]),
                (sum(counts) + 1, kv_heads, BLOCK_SIZE, dims[1]),
            )
        )

    def attend(self, window: int, scaling: float, rows: slice = slice(None), last: int | None = None) -> Floats:
        """The kernel's answer, of some rows or their last tokens only: [rows, q_length, heads, value_dim]."""
        query = self.query.reshape(len(self.lengths), self.q_length, *self.query.shape[1:])[rows, -(last or 0) :]
        flat = np.ascontiguousarray(query.reshape(-1, *query.shape[2:]))
        out = np.full((*flat.shape[:2], self.values.shape[3]), np.nan, dtype=np.float32)
        attend(flat, self.keys, self.values, self.tables[rows], self.lengths[rows], window, scaling, out)
        return out.reshape(*query.shape[:3], -1)

    def plain(self, window: int, scaling: float) -> Floats:
        """In float64, query by query."""
        out = np.empty((*self.query.shape[:2], self.values.shape[3]))
        repeats = self.query.shape[1] // self.keys.shape[1]
        for row, (table, length) in enumerate(zip(self.tables, self.lengths, strict=True)):
            k, v = (
                np.repeat(cache[table].swapaxes(0, 1).reshape(cache.shape[1], -1, cache.shape[3]), repeats, axis=0)
                for cache in (self.keys.astype(np.float64), self.values.astype(np.float64))
            )
            for i in range(self.q_length):
                stop = length - self.q_length + 1 + i
                seen = slice(max(0, stop - window), stop)
                token = row * self.q_length + i
                scores = np.einsum("hd,htd->ht", self.query[token], k[:, seen]) * scaling
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                out[token] = np.einsum("ht,htd->hd", weights / weights.sum(axis=1, keepdims=True), v[:, seen])
        return out.reshape(len(self.lengths), self.q_length, *out.shape[1:])


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(8, 8), (12, 12), (32, 32), (6, 10), (5, 3)]),
    st.sampled_from([1, 5, 16, 40, 1 << 40]),
    st.sampled_from([0.1, 0.35, 1.0]),
)
def test_it_is_attention(
    lengths: list[int],
    q_length: int,
    kv_heads: int,
    repeats: int,
    dims: tuple[int, int],
    window: int,
    scaling: float,
) -> None:
    rows = Rows([max(length, q_length) for length in lengths], q_length, kv_heads, repeats, dims)
    np.testing.assert_allclose(rows.attend(window, scaling), rows.plain(window, scaling), atol=2e-5, rtol=0)


@pytest.mark.parametrize("window", [7, 1 << 40])
def test_a_rows_bits_depend_on_nothing_else(window: int) -> None:
    """Neither on the other rows nor on how many of its tokens are new: speculation must not change a token."""
    rows = Rows([70, 5, 133, 16], 3, 2, 2, (12, 12))
    together = rows.attend(window, 0.3)
    for row in range(4):
        assert np.array_equal(rows.attend(window, 0.3, slice(row, row + 1)), together[row : row + 1])
    assert np.array_equal(rows.attend(window, 0.3, last=1), together[:, -1:])


@pytest.mark.parametrize("non_finite", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_seen_in_its_own_row_only(non_finite: float) -> None:
    rows = Rows([40, 50], 1, 1, 1, (8, 8))
    healthy = rows.attend(1 << 40, 0.3)
    rows.values[rows.tables[0, 1], 0, 3, 2] = non_finite
    out = rows.attend(1 << 40, 0.3)
    assert not np.isfinite(out[0, 0, 0, 2])
    assert np.array_equal(out[1], healthy[1])
    rows = Rows([40, 50], 1, 1, 1, (8, 8))
    rows.query[0] = np.nan
    out = rows.attend(1 << 40, 0.3)
    assert np.isnan(out[0]).all()
    assert np.array_equal(out[1], healthy[1])


def test_scores_that_are_far_apart() -> None:
    """Where all but one vanish, and where none is near the greatest of its neighbours' rows."""
    rows = Rows([33], 1, 1, 1, (8, 8))
    rows.query *= 1000
    np.testing.assert_allclose(rows.attend(1 << 40, 1.0), rows.plain(1 << 40, 1.0), atol=1e-4, rtol=0)


ROWS = [  # decodes, prefill, chunk after cached tokens, verification of a draft
    BatchRow([1], 36, [3, 5, 1], 1),
    BatchRow(list(range(20)), 0, [7, 2], 1),
    BatchRow(list(range(9)), 17, [4, 6], 1),
    BatchRow([1, 2, 3], 30, [8, 9, 10], 3),
    BatchRow([1], 0, [11], 1),
    BatchRow([1], 18, [12, 13], 1),
]


def attended(attention: Attention, window: int | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    num_tokens = sum(len(row.token_ids) for row in ROWS)
    keys, values = (torch.randn(14, 2, BLOCK_SIZE, 8, generator=generator) for _ in range(2))
    query = torch.randn(num_tokens, 6, 8, generator=generator)[:, :4]  # a part of something larger, as in a layer
    key, value = (torch.randn(num_tokens, 2, 8, generator=generator) for _ in range(2))
    layout = Layout.of(ForwardBatch(ROWS), torch.device("cpu"))
    return attention(0, layout, PagedTensors([keys], [values]), query, key, value, scaling=0.3, window=window)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_it_attends_like_the_other(window: int | None) -> None:
    torch.testing.assert_close(
        attended(PagedAttention(), window), attended(GroupedAttention(), window), atol=1e-5, rtol=0
    )


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = attended(PagedAttention(), None)
    seen: list[str] = []
    attention = PagedAttention()
    kernel = attention._kernel

    def noted(*args: Any) -> None:
        seen.append(threading.current_thread().name)
        kernel(*args)

    monkeypatch.setattr(attention, "_kernel", noted)
    monkeypatch.setattr(paged_attention, "_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(attended(attention, None), alone)
    assert any(name.startswith("attention") for name in seen)
    assert [paged_attention._shares(5, most) for most in (0, 1, 2, 9)] == [
        [slice(0, 5)],
        [slice(0, 5)],
        [slice(0, 2), slice(2, 5)],
        [slice(i, i + 1) for i in range(5)],
    ]


def test_where_nothing_can_be_kept_it_is_compiled_each_time() -> None:
    program = """if True:
        import numpy as np
        from numba.core import caching

        caching.CacheImpl._locator_classes = []  # as on a file system that is read-only throughout
        from eft_serve.engine.paged_kernel import attend

        ones, out = np.ones((2, 1, 16, 8), np.float32), np.zeros((1, 1, 8), np.float32)
        attend(ones[0, :, :1], ones, ones, np.array([[1]]), np.array([3]), 9, 0.3, out)
        print(out.sum())
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "8.0\n"), done.stderr


def test_it_is_for_cpus_in_32_bits() -> None:
    assert paged_attention.suits(torch.device("cpu"), torch.float32)
    assert not paged_attention.suits(torch.device("cpu"), torch.bfloat16)
    assert not paged_attention.suits(torch.device("cuda"), torch.float32)


LENGTH = 80
Step = tuple[int, float, int]  # sequence, part of the computed tokens to keep, tokens to append


@pytest.fixture(scope="module", params=["llama", "gemma2", "mistral"])
def mixed(
    request: pytest.FixtureRequest, load: Callable[..., Engine], references: Callable[[str], PreTrainedModel]
) -> Iterator[tuple[Engine, PreTrainedModel]]:
    """An engine whose rows of up to four new tokens go through the kernel and the others through torch's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention, "MAX_NEW_TOKENS", 4)
        engine = load(request.param, lease_s=77.0)
        assert engine.info.attention.endswith("+paged")
        yield engine, references(request.param)


def tokens_of(sequence: int) -> list[int]:
    return random.Random(sequence).choices(range(VOCAB_SIZE), k=LENGTH)


forwards = st.lists(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([1.0, 1.0, 1.0, 0.7, 0.0]), st.sampled_from([1, 1, 1, 3, 9, 40])),
        min_size=1,
        max_size=5,
        unique_by=lambda step: step[0],
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=forwards)
def test_any_mix_of_decodes_rollbacks_and_prefills(
    mixed: tuple[Engine, PreTrainedModel], schedule: list[list[Step]]
) -> None:
    engine, model = mixed
    engine.free(map(str, range(5)))
    expected = {i: stock_logits(model, tokens_of(i)) for i in range(5)}
    num_computed = dict.fromkeys(range(5), 0)
    for call in schedule:
        steps = []
        for sequence, keep, count in call:
            position = min(int(num_computed[sequence] * keep), LENGTH - 1)
            steps.append(SequenceStep(str(sequence), position, tokens_of(sequence)[position : position + count], 1))
            num_computed[sequence] = position + len(steps[-1].token_ids)
        for step, output in zip(steps, engine.forward(steps), strict=True):
            sequence = int(step.sequence_id)
            assert output.logits is not None
            torch.testing.assert_close(
                output.logits[0], expected[sequence][num_computed[sequence] - 1], atol=1e-4, rtol=0
            )


def test_another_future_after_a_rollback(mixed: tuple[Engine, PreTrainedModel]) -> None:
    """A rollback whose new tokens are a prefill, over what was decoded before it."""
    engine, model = mixed
    first, second = tokens_of(7), tokens_of(8)
    other = [*first[:10], *second[:30]]
    engine.forward([SequenceStep("r", 0, first[:20], 0)])
    for position in range(20, 36):
        engine.forward([SequenceStep("r", position, first[position : position + 1], 1)])
    engine.forward([SequenceStep("r", 10, other[10:39], 0)])
    (output,) = engine.forward([SequenceStep("r", 39, other[39:40], 1)])
    assert output.logits is not None
    torch.testing.assert_close(output.logits[0], stock_logits(model, other)[-1], atol=1e-4, rtol=0)
    engine.free(["r"])


def test_a_matched_prefix(mixed: tuple[Engine, PreTrainedModel]) -> None:
    """One sequence, begun again with other tokens that are all found in the cache."""
    engine, model = mixed
    first, second = tokens_of(11), tokens_of(12)
    engine.forward([SequenceStep("other", 0, second[:33], 0, salt="s")])
    engine.forward([SequenceStep("r", 0, first[:33], 0, salt="s")])
    for position in range(33, 36):
        engine.forward([SequenceStep("r", position, first[position : position + 1], 1)])
    (output,) = engine.forward([SequenceStep("r", 0, second[:33], 1, salt="s")])
    assert output.logits is not None
    torch.testing.assert_close(output.logits[0], stock_logits(model, second[:33])[-1], atol=1e-4, rtol=0)
    engine.free(["r", "other"])
