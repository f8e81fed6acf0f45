"""The stream of JSON values: whole, in pieces, broken, endless."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.qmp.errors import QmpError
from pyvmm.qmp.json_stream import DEPTH_MAX, VALUE_MAX, JsonStream, StreamTooLong

DOCUMENTS = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


def take_all(stream: JsonStream) -> list[Any]:
    """Values and errors (as text) until the stream has no more, or cannot be followed."""
    found: list[Any] = []
    while True:
        try:
            found.append(stream.take())
        except EOFError:
            return found
        except StreamTooLong as error:
            return [*found, str(error)]
        except QmpError as error:
            found.append(str(error))


@settings(max_examples=150, deadline=None)
@given(st.lists(DOCUMENTS, max_size=5), st.sampled_from([b"", b"\n", b" \r\n\t"]), st.integers(1, 40), st.booleans())
def test_values_come_out_as_they_went_in_however_they_are_cut(
    documents: list[Any], between: bytes, piece: int, ascii_only: bool
) -> None:
    data = between.join(json.dumps(d, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass") for d in documents)
    stream, found = JsonStream(), []
    for at in range(0, len(data), piece):
        stream.feed(data[at : at + piece])
        found += take_all(stream)
    assert found == documents


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=6))
def test_garbage_raises_nothing_else_and_ends(pieces: list[bytes]) -> None:
    stream = JsonStream()
    for piece in pieces:
        stream.feed(piece)
        assert len(take_all(stream)) <= sum(map(len, pieces)) + 1


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.data())
def test_a_mutated_message_does_not_take_the_next_one_with_it(document: Any, data: st.DataObject) -> None:
    """After a message whose brackets still match, whatever else is wrong with it, the next one is found."""
    text = bytearray(json.dumps(document).encode())
    at = data.draw(st.integers(0, len(text) - 1))
    if text[at] in b'{}[]"\\' or (at and text[at - 1] == ord("\\")):
        return
    text[at] = data.draw(st.sampled_from(list(b"x0,:. ")))
    stream = JsonStream()
    stream.feed(bytes(text) + b'\n{"next":1}')
    assert take_all(stream)[-1] == {"next": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"x\n", "JSON parse error, invalid keyword 'x'"),
        (b"{'a': 1}", "JSON parse error, Expecting property name"),
        (b'{"a":1,"a":2}', "JSON parse error, duplicate key"),
        (b'{"a":NaN}', "JSON parse error, invalid keyword 'NaN'"),
        (b'{"a":"\xff"}', "JSON parse error, invalid UTF-8 sequence in string"),
        (b'{"a":' + b"9" * 5000 + b"}", "JSON parse error"),
        (b'{"a":1e999}', "JSON parse error, number out of range '1e999'"),
        (b"]", "JSON parse error"),
        (b'{"a" 1}', "JSON parse error, Expecting ':'"),
        (b"\x00\n", "JSON parse error"),
    ],
)
def test_mistakes_are_told_and_passed(text: bytes, expected: str) -> None:
    stream = JsonStream()
    stream.feed(text + b'{"next":1}')
    first, second = take_all(stream)
    assert first.startswith(expected)
    assert second == {"next": 1}


@pytest.mark.parametrize("text", [b"[" * (DEPTH_MAX + 1), b'{"a":' * (DEPTH_MAX + 1), b'{"a":"' + b"x" * VALUE_MAX])
def test_what_has_no_bound_is_refused(text: bytes) -> None:
    stream = JsonStream()
    stream.feed(text)
    with pytest.raises(StreamTooLong, match="limit exceeded"):
        stream.take()


def test_a_value_that_trickles_in_is_scanned_once() -> None:
    stream = JsonStream()
    text = json.dumps({"a": "x\\\"" * 20000, "b": [1] * 1000}).encode()
    for byte in text[:-1]:
        stream.feed(bytes([byte]))
        with pytest.raises(EOFError):
            stream.take()
    stream.feed(text[-1:])
    assert stream.take()["b"] == [1] * 1000
