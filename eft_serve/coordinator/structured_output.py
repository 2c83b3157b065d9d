"""Structured output: a request's output follows a grammar, which ends it.

Grammars are compiled when a request is taken, before it enters the decode loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.coordinator.request import Request
from eft_serve.grammars.matcher import GrammarMatcher, load_grammar_tokenizer
from eft_serve.numerics.bitmask import apply_bitmask
from eft_serve.numerics.kernels.masking import set_bits
from eft_serve.types import GenerationRequest


class GrammarMask:
    """The logits processor of a grammar: tokens that it allows and, where the output may end, end tokens.

    Args:
        matcher: follows the request's output.
        end_token_ids: of the request.
    """

    def __init__(self, matcher: GrammarMatcher, end_token_ids: Iterable[int]) -> None:
        self._matcher = matcher
        self._ends = np.array(sorted(end_token_ids), np.int64)

    def __call__(self, output_token_ids: Sequence[int], draft_token_ids: Sequence[int], logits: Tensor) -> None:
        """See `LogitsProcessor`."""
        matcher = self._matcher
        rest = output_token_ids[matcher.num_tokens :]
        if matcher.advance(rest) < len(rest):  # fail closed, instead of masking for another place of the grammar
            raise ValueError(f"the grammar does not take token {output_token_ids[matcher.num_tokens]} of the output")
        num_followed = matcher.num_tokens
        try:
            for index, row in enumerate(logits):
                if index and not matcher.advance(draft_token_ids[index - 1 : index]):
                    logits[index:] = -np.inf  # behind a draft token that will not be accepted
                    return
                bitmask = matcher.allowed()
                set_bits(bitmask, self._ends, matcher.is_complete)
                apply_bitmask(bitmask, row)
        finally:
            matcher.go_back(matcher.num_tokens - num_followed)


class GrammarCompiler:
    """The grammars of requests over the tokens of the deployed models; thread-safe.

    Args:
        vocabularies: by model.
    """

    def __init__(self, vocabularies: Mapping[str, Vocabulary]) -> None:
        self._tokenizers = {
            model: load_grammar_tokenizer(vocabulary.tokenizer_json) for model, vocabulary in vocabularies.items()
        }

    def matched(self, request: Request) -> Request:
        """The request, with a matcher if it has a grammar; raises as `matcher`."""
        if request.generation.sampling.grammar is not None:
            request.matcher = self.matcher(request.generation)
        return request

    def matcher(self, generation: GenerationRequest) -> GrammarMatcher:
        """That of a request with a grammar, at the beginning of the output.

        Raises:
            InvalidRequestError: the grammar is wrong or too complex, or the model's tokens have no known text.
        """
        grammar, model = generation.sampling.grammar, generation.combination.counted.model
        assert grammar is not None
        return self._tokenizers[model].matcher(grammar)
