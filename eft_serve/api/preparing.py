"""From a validated body to the requests to the models: one for each answer that is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from eft_serve.api.answering import Call
from eft_serve.api.context import Context
from eft_serve.api.formats import Format
from eft_serve.api.prompts import OwnPrompts, Prompting, Prompts
from eft_serve.api.schemas import GenerationBody, choice_seed
from eft_serve.api.tool_parsers import MARKERS
from eft_serve.errors import ContextLengthError, InvalidRequestError
from eft_serve.types import Combination, GenerationRequest, Grammar, Term


class Render(Protocol):
    """Makes each term's prompt; `own` are those that the request has for single terms."""

    async def __call__(self, terms: Sequence[Term], prompting: Prompting, *, own: OwnPrompts) -> Prompts: ...


@dataclass(frozen=True, slots=True)
class PromptSource:
    """One prompt of a request, not yet tokenised."""

    render: Render
    param: str  # what it is called in errors
    echo: str | None = None  # its text, where the request has one


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCall(Call):
    """A request for answers."""

    body: GenerationBody
    format: Format
    prompts: Sequence[PromptSource]
    default_max_tokens: int | None  # None: what the context has room for

    @property
    def num_answers(self) -> int:
        """Requests to the models."""
        return len(self.prompts) * self.body.num_candidates


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a call asks of the models."""

    combination: Combination
    prompts: Sequence[Sequence[int]]  # of the first term with a coefficient
    requests: Sequence[GenerationRequest]  # prompt by prompt, `num_candidates` for each


async def prepare(context: Context, call: GenerationCall, answer_id: str, timeout_s: float) -> Prepared:
    """Resolve, render and tokenise.

    Args:
        answer_id: begins the requests' ids.
        timeout_s: until the call's deadline.

    Raises:
        InvalidRequestError: something in the body cannot be served by this recipe.
    """
    body, eft, renderer = call.body, call.body.eft, context.renderer
    prompted = call.ensemble.prompted(eft.prompts or {})
    combination = call.ensemble.resolve(eft.knobs, prompted=prompted, every=body.components is not None)
    if body.is_ranked and not any(reward.weight for reward in combination.rewards):
        message = f"best_of: model {call.ensemble.name!r} has no reward with a weight to rank by; leave it out"
        raise InvalidRequestError(message, param="best_of")
    parts = call.ensemble.parts(prompted)
    own, prompting = eft.own(parts), {name: part.role.prompting for name, part in parts.items()}
    speculative = call.ensemble.speculative(eft.speculative.changes)
    special = renderer.tokenizer(combination.counted.model).special
    bad_words = await renderer.words(combination.terms, body.bad_words or ())
    stop_token_ids = [special[text] for text in body.stop or () if text in special]  # such a text is never shown
    grammar = await _grammar(context, call, combination, special)
    tool_format = None if body.active_tools is None else call.ensemble.tool_parser
    markers = [special[text] for text in MARKERS.get(tool_format, ()) if text in special]
    all_prompts, requests = [], list[GenerationRequest]()
    for source in call.prompts:
        prompts = await source.render(combination.terms, prompting, own=own)
        max_tokens = _max_tokens(context, call, combination.terms, prompts, own, source.param)
        if body.num_prompt_logprobs is not None:
            _check_scorable(body, combination.terms, prompting, prompts)
        all_prompts.append(prompts[combination.counted.name])
        requests += [
            GenerationRequest(
                request_id=f"{answer_id}-{len(requests) + candidate}",
                combination=combination,
                prompts=prompts,
                sampling=body.sampling(
                    max_tokens, choice_seed(body.seed, candidate), bad_words, stop_token_ids, grammar, markers
                ),
                speculative=speculative,
                components=body.components,
                logprobs=body.num_logprobs,
                prompt_logprobs=body.num_prompt_logprobs,
                logprobs_mode=eft.logprobs_mode or "raw_logprobs",
                tenant=call.tenant.name,
                timeout_s=timeout_s,
            )
            for candidate in range(body.num_candidates)
        ]
    return Prepared(combination, all_prompts, requests)


async def _grammar(
    context: Context, call: GenerationCall, combination: Combination, special: Mapping[str, int]
) -> Grammar | None:
    """That the answers have to follow.

    Raises:
        InvalidRequestError: it cannot be used, or something else could end an answer half-way.
    """
    body, tools = call.body, call.body.active_tools
    if tools is not None and call.ensemble.tool_parser is None:
        message = f"tools: model {call.ensemble.name!r} has no tool_parser in the configuration; leave them out"
        raise InvalidRequestError(message, param="tools")
    must_call = tools is not None and bool(tools.required)
    if not body.is_structured and not must_call:
        return None
    if any(text not in special for text in body.stop or ()):
        raise InvalidRequestError("stop: it could end a structured answer half-way; leave it out", param="stop")
    if not set(special.values()).issuperset(body.stop_token_ids or ()):
        message = "stop_token_ids: with structured output they are special tokens; leave the others out"
        raise InvalidRequestError(message, param="stop_token_ids")
    define = body.grammar
    if must_call and tools is not None and call.ensemble.tool_parser is not None:
        define = partial(tools.grammar, call.ensemble.tool_parser, special)
    return await context.renderer.grammar(combination, define, salt=call.tenant.name)


def _max_tokens(
    context: Context, call: GenerationCall, terms: Sequence[Term], prompts: Prompts, own: OwnPrompts, param: str
) -> int:
    """The tokens asked for, or the default if every model's context has room for it, else what fits."""
    body, requested = call.body, call.body.requested_tokens
    empty = next((name for name, prompt in prompts.items() if not prompt), None)
    name, length = (empty, 0) if empty is not None else context.tightest(terms, prompts)
    param = own[name].param if name in own else param
    if empty is not None:
        raise InvalidRequestError(f"{param}: must hold at least one token", param=param)
    room = length - len(prompts[name])
    has = f"{len(prompts[name])} tokens for {name!r}, whose context is {length}"
    if room < (requested != 0):
        raise ContextLengthError(f"{param}: has {has}; shorten it", param=param)
    if requested is not None and room < requested:
        raise ContextLengthError(
            f"{body.limit_param}: {requested} is more than the {room} tokens that are left: the prompt has {has}; ask "
            "for fewer, or shorten the prompt",
            param=body.limit_param,
        )
    max_tokens = min(call.default_max_tokens or room, room) if requested is None else requested
    if body.min_tokens and body.min_tokens > max_tokens:
        message = f"min_tokens: {body.min_tokens} is more than the {max_tokens} tokens that may be generated"
        raise InvalidRequestError(message, param="min_tokens")
    return max_tokens


def _check_scorable(body: GenerationBody, terms: Sequence[Term], prompting: Prompting, prompts: Prompts) -> None:
    """The prompt has log-probabilities where all terms read the same one, and nothing in it is the recipe's own."""
    param = body.prompt_logprobs_param
    for term in terms:
        if prompting[term.name].system_prompt or prompting[term.name].response_prefix:
            message = f"the recipe has a text of its own in the prompt of {term.name!r}; leave {param} out"
            raise InvalidRequestError(f"{param}: {message}", param=param)
    if any(prompt != prompts[terms[0].name] for prompt in prompts.values()):
        message = f"the models of this recipe read different prompts; send token ids, or leave {param} out"
        raise InvalidRequestError(f"{param}: {message}", param=param)
