"""No parameter is ignored: what is not served is refused unless it changes nothing."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from eft_serve.api.body import validate
from eft_serve.api.schemas import SEED_RANGE, ChatBody, CompletionBody, GenerationBody, choice_seed
from eft_serve.errors import InvalidRequestError

BASE: dict[type[GenerationBody], dict[str, Any]] = {
    ChatBody: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    CompletionBody: {"model": "m", "prompt": "x"},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [
        (ChatBody, chat_create_params, "CompletionCreateParamsBase"),
        (CompletionBody, completion_create_params, "CompletionCreateParamsBase"),
    ],
)
def test_every_parameter_of_the_openai_client_is_either_served_or_refused_by_name(
    kind: type[GenerationBody], module: Any, name: str
) -> None:
    theirs = set(re.findall(r"^    (\w+): ", inspect.getsource(getattr(module, name)), re.MULTILINE))
    assert len(theirs) > 10
    assert theirs - kind.NO_OPS.keys() - kind.model_fields.keys() == set()
    assert not kind.NO_OPS.keys() & kind.model_fields.keys()


@given(kind=st.sampled_from([ChatBody, CompletionBody]), data=st.data(), value=JSON)
def test_an_unserved_parameter_passes_exactly_at_its_no_op_values(
    kind: type[GenerationBody], data: st.DataObject, value: Any
) -> None:
    name = data.draw(st.sampled_from(sorted(kind.NO_OPS)))
    harmless = value is None or any(type(v) is type(value) and v == value for v in kind.NO_OPS[name])
    if harmless:
        assert validate(kind, BASE[kind] | {name: value}) == validate(kind, BASE[kind])
        return
    with pytest.raises(InvalidRequestError, match="not supported yet") as caught:
        validate(kind, BASE[kind] | {name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"), [("logprobs", 0), ("store", 0), ("top_logprobs", False), ("presence_penalty", False)]
)
def test_a_no_op_value_of_another_type_is_not_one(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        validate(ChatBody, BASE[ChatBody] | {name: value})


@given(kind=st.sampled_from([ChatBody, CompletionBody]), name=st.text(min_size=1), value=JSON)
def test_any_other_field_is_refused(kind: type[GenerationBody], name: str, value: Any) -> None:
    if name in kind.model_fields or name in kind.NO_OPS:
        return
    with pytest.raises(InvalidRequestError) as caught:
        validate(kind, BASE[kind] | {name: value})
    assert "unknown parameter" in caught.value.message


@given(data=st.dictionaries(st.sampled_from(sorted(ChatBody.model_fields)), JSON))
def test_nonsense_is_a_typed_error_or_a_request(data: dict[str, Any]) -> None:
    try:
        body = validate(ChatBody, BASE[ChatBody] | data)
    except InvalidRequestError:
        return
    assert body.sampling(max_tokens=1, seed=0).temperature >= 0


@given(seed=st.integers(-SEED_RANGE, SEED_RANGE - 1))
def test_choices_have_different_seeds_and_the_first_has_the_requests_own(seed: int) -> None:
    seeds = [choice_seed(seed, i) for i in range(16)]
    assert seeds[0] == seed % SEED_RANGE
    assert len(set(seeds)) == 16
    assert all(0 <= s < SEED_RANGE for s in seeds)
    assert not set(seeds[1:]) & {choice_seed(seed + step, 0) for step in range(-16, 17)}


def test_the_two_names_of_the_limit_are_one() -> None:
    both = BASE[ChatBody] | {"max_tokens": 3, "max_completion_tokens": 3}
    assert validate(ChatBody, both).requested_tokens == 3
    assert validate(ChatBody, BASE[ChatBody] | {"max_tokens": 4}).requested_tokens == 4
    assert validate(CompletionBody, BASE[CompletionBody]).requested_tokens is None
