"""How long an engine keeps the matchers of its sequences."""

from __future__ import annotations

import weakref

from tokenizer_files import byte_level
from waiting import wait_until

from eft_serve.engine.draft_grammars import DraftGrammars
from eft_serve.engine.kv_cache import KVCache
from eft_serve.grammars.definitions import of_regex
from eft_serve.types import Draft, Grammar, SamplingParams


def test_the_matcher_of_a_sequence_ends_with_it() -> None:
    grammars = DraftGrammars(lambda: byte_level(["a", "b"]))
    sequence = KVCache(4).touch("s", now=0.0)
    draft = Draft(1, 0, 2, SamplingParams(grammar=Grammar(of_regex("[ab]{3}"), "structured_outputs.regex")))
    try:
        wait_until(lambda: grammars.matcher(sequence, draft) is not None, timeout_s=20)
        matcher = grammars.matcher(sequence, draft)
        assert matcher is not None
        kept = weakref.ref(matcher)
        assert grammars.matcher(sequence, draft) is matcher
        del matcher
        assert kept() is not None
        grammars.free("s")
        grammars.free("of none")
        assert kept() is None
    finally:
        grammars.close()
