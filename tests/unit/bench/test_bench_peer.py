"""The naive peer says what emulated fine-tuning says."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from eft_serve.bench.load import Prompts, Wanted
from eft_serve.bench.naive_peer import CHECKPOINTS, NaivePeer
from eft_serve.testing import naive
from eft_serve.zoo import checkpoint_path


@pytest.fixture(scope="module")
def peer() -> Iterator[NaivePeer]:
    threads = torch.get_num_threads()
    yield NaivePeer()
    torch.set_num_threads(threads)


def test_a_padded_batch_gives_everyone_the_tokens_of_the_formula(peer: NaivePeer) -> None:
    prompts = Prompts(0)
    batch = [Wanted(prompts.take(60), 3), Wanted(prompts.take(9), 16)]
    answers = [[token for _, ids in tokens for token in ids] for tokens in peer.generate(batch)]
    models = {
        role: naive.load(checkpoint_path(name))
        for role, name in zip(("base", "reference", "tuned"), CHECKPOINTS, strict=True)
    }
    for wanted, answer in zip(batch, answers, strict=True):
        assert answer == naive.generate_emulated(
            models, wanted.prompt, max_tokens=wanted.num_tokens, num_tokens=3072, eos_token_ids=frozenset()
        )


@pytest.mark.parametrize("best", [1, 2])
def test_as_many_threads_as_are_quickest(peer: NaivePeer, monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    monkeypatch.setattr(peer, "generate", lambda load: time.sleep(0.0 if torch.get_num_threads() == best else 0.05))
    assert peer.choose_threads([1, 2], []) == best
    assert torch.get_num_threads() == best


def test_a_batch_takes_what_has_arrived_and_the_rest_waits_for_all_of_it(peer: NaivePeer) -> None:
    load = [Wanted([5, 6], 40), Wanted([7], 2), Wanted([8], 2), Wanted([9], 2, arrival_s=0.001)]
    first, second, third, late = peer.replay(load, max_batch=2)
    assert [len(t.token_ids) for t in (first, second, third, late)] == [40, 2, 2, 2]
    assert second.tokens[-1][0] == first.tokens[1][0]  # together, step by step
    assert third.tokens[0][0] > first.tokens[-1][0]  # no place was given before the whole batch was done
    assert late.arrival_s == 0.001
    assert late.tokens[0][0] == third.tokens[0][0]
