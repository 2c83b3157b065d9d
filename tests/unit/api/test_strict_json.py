"""JSON that is refused says where."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft_serve.api.strict_json import read_object
from eft_serve.errors import InvalidRequestError

ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), ANY))
def test_what_is_json_is_read_as_it_is(data: dict[str, object]) -> None:
    assert read_object(json.dumps(data).encode()) == data


def many_keys(around: bytes) -> bytes:
    """More than an object may have."""
    return around % json.dumps({str(i): 0 for i in range(4097)}).encode()


@pytest.mark.parametrize(
    ("raw", "param", "said"),
    [
        (b'{"eft": {"scale": NaN}}', "eft.scale", "NaN is not JSON"),
        (b'{"a": [1, -Infinity]}', "a.1", "-Infinity is not JSON"),
        (b'{"a": [{"seed": ' + b"9" * 5000 + b"}]}", "a.0.seed", "an integer of 5000 digits"),
        (b'{"top_p": 1e999}', "top_p", "the number is too large"),
        (b'{"a": 1, "a": 1}', "a", "given twice"),
        (b'{"messages": [{"role": "user", "role": "system"}]}', "messages.0.role", "given twice"),
        (b'{"a": "\\ud800"}', "a", "half of a surrogate pair"),
        (b'{"a": 1,\n "b": }', None, "line 2, column 7"),
        (many_keys(b'{"a": [%s]}'), "a.0", "has 4097 keys, more than 4096"),
        (many_keys(b"%s"), None, "the body: an object has 4097 keys"),
        (b'{"a"', None, "line 1, column 5"),
        (b"", None, "line 1, column 1"),
        (b'{"a": 01}', None, "line 1, column 8"),
        (b"\xff{}", None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b'{"a": ' * 100_000, None, "not valid JSON"),
        (b"[1]", None, "must be a JSON object"),
        (b"\xef\xbb\xbf{}", None, "not valid JSON"),
        (b'{"\\ud800": 1}', None, "not valid JSON"),
        (b'{"\\ud800": NaN}', "\\ud800", "NaN is not JSON"),
        (b'{"' + b"k" * 5000 + b'": NaN}', "k" * 100, "NaN is not JSON"),
    ],
)
def test_what_is_not_json_is_refused_at_its_place(raw: bytes, param: str | None, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said) as refusal:
        read_object(raw)
    assert refusal.value.param == param
