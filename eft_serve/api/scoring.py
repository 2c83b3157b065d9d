"""Scores of given outputs, several at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from eft_serve.api.answering import Call, ModelResponse
from eft_serve.api.components import ComponentsFormat
from eft_serve.api.context import Context
from eft_serve.api.formats import JsonObject, usage
from eft_serve.api.model_tokenizer import Message
from eft_serve.api.prompts import OwnPrompts, Prompting, Prompts
from eft_serve.api.score_schemas import ScoreBody, ScoreItem, SingleScoreBody
from eft_serve.api.streams import Indexed
from eft_serve.ensemble import Part
from eft_serve.errors import ContextLengthError, InvalidRequestError
from eft_serve.types import Combination, GenerationRequest, SamplingParams, Term


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCall(Call):
    """A request for scores."""

    body: ScoreBody | SingleScoreBody


@dataclass(frozen=True, slots=True)
class Scorer:
    """What scores every item."""

    combination: Combination
    prompting: Prompting
    own: OwnPrompts  # the prompts that are for all items, of the terms that have one
    own_prompts: Prompts  # their tokens


class ScoreResponse(ModelResponse):
    """Scores while it answers; see `ModelResponse`."""

    _call: ScoreCall

    def __init__(self, context: Context, call: ScoreCall) -> None:
        self._items = call.body.placed
        self._split_tokens: dict[int, str | None] = {}  # by item, see `Given`
        super().__init__(context, call, "score-", len(self._items))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._context.limits.admit(self._call.tenant, len(self._items), "items"):
            knobs, ensemble = self._call.body.eft, self._call.ensemble
            prompted = ensemble.prompted(knobs.prompts or {})
            combination = ensemble.resolve(knobs.knobs, prompted=prompted, every=True)
            scorer = await self._scorer(combination, ensemble.parts(prompted))
            await self._run_all(await self._prepare(scorer))
        await self._send_whole(lambda: self._body(combination), scope, receive, send)

    async def _scorer(self, combination: Combination, parts: Mapping[str, Part]) -> Scorer:
        prompting = {name: part.role.prompting for name, part in parts.items()}
        own = self._call.body.eft.own(parts)
        terms = [term for term in combination.terms if term.name in own]
        return Scorer(combination, prompting, own, await self._context.renderer.chat(terms, prompting, [], own))

    async def _prepare(self, scorer: Scorer) -> list[GenerationRequest]:
        requests = []
        for index, (place, item) in enumerate(self._items):
            await asyncio.sleep(0)  # tokenising many texts must not stall every stream
            with within(place):
                requests.append(await self._request(index, item, scorer))
        return requests

    async def _request(self, index: int, item: ScoreItem, scorer: Scorer) -> GenerationRequest:
        combination, prompting, own = scorer.combination, scorer.prompting, scorer.own
        call, renderer, terms = self._call, self._context.renderer, combination.terms
        others = [term for term in terms if term.name not in own]
        before: str | Sequence[int] | Sequence[Message]
        if item.messages is not None:
            before = [message.rendered for message in item.messages]
            prompts = scorer.own_prompts | await renderer.chat(others, prompting, before)
        else:
            assert item.prompt is not None
            before = item.prompt
            prompts = scorer.own_prompts | await renderer.completion(others, prompting, before)
        counted = combination.counted.name
        read = own[counted].prompt if counted in own else before
        found = await renderer.given(combination, prompting, item.completion, read)
        self._split_tokens[index], given = found.split_token, found.token_ids
        self._check_room(terms, prompts, len(given), "prompt" if item.messages is None else "messages")
        self._progress.num_prompt_tokens += len(prompts[combination.counted.name])
        return GenerationRequest(
            request_id=f"{self._id}-{index}",
            combination=combination,
            prompts=prompts,
            sampling=SamplingParams(max_tokens=len(given)),
            forced_token_ids=given,
            components=call.body.components,
            tenant=call.tenant.name,
            timeout_s=max(0.0, self._deadline - self._now()),
        )

    def _check_room(self, terms: Sequence[Term], prompts: Prompts, num_forced: int, prompt_param: str) -> None:
        if not all(prompts.values()):
            raise InvalidRequestError(f"{prompt_param}: must hold at least one token", param=prompt_param)
        name, context = self._context.tightest(terms, prompts)
        if len(prompts[name]) + num_forced > context:
            raise ContextLengthError(
                f"completion: has {num_forced} tokens after the {len(prompts[name])} of the prompt for {name!r}, whose "
                f"context is {context}; shorten one of them",
                param="completion",
            )

    async def _output(self, index: int, request: GenerationRequest) -> AsyncGenerator[Indexed, None]:
        with within(self._items[index][0]):
            async with aclosing(super()._output(index, request)) as output:
                async for item in output:
                    yield item

    def _body(self, combination: Combination) -> JsonObject:
        body, choices = self._call.body, self._progress.choices
        shown = ComponentsFormat.of(combination, self._context.renderer, num_alternatives=body.components)
        data = [
            {
                "index": index,
                "tokens": [shown.token(token) for token in choice.components],
                "total": shown.total(choice.components),
                "split_token": self._split_tokens[index],
            }
            for index, choice in enumerate(choices)
        ]
        used = usage(self._progress.num_prompt_tokens, choices, with_report=False)
        return {"object": "list", "model": body.model, "data": data, "usage": used}


@contextmanager
def within(place: str) -> Iterator[None]:
    """Errors name fields by their place: `items.3.` is put before the field's name."""
    try:
        yield
    except InvalidRequestError as error:
        if not place or error.param is None:
            raise
        message = error.message.removeprefix(f"{error.param}: ")
        raise type(error)(f"{place}{error.param}: {message}", param=place + error.param) from error
