"""The wire form: what goes in comes out; whatever else comes is refused, and says where."""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import SectionError
from pyvmm.migration.sections import FORMAT, MAGIC, Section, decode_sections, encode_sections, match_sections

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=50) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
SECTIONS = st.lists(
    st.builds(Section, NAMES, st.integers(0, (1 << 32) - 1), st.dictionaries(st.text(max_size=10), PLAIN, max_size=5)),
    max_size=5,
    unique_by=lambda section: section.name,
)
TWO = [Section("first", 1, {"a": 1, "b": b"xyz"}), Section("second", 7, {"c": [1, 2, 3]})]


def framed(*sections: bytes, count: int | None = None) -> bytes:
    """A stream of raw sections with a right end, whatever is in them."""
    stream = MAGIC + FORMAT.to_bytes(4, "little") + b"".join(sections)
    stream += b"\0\0" + (len(sections) if count is None else count).to_bytes(4, "little") + bytes(4)
    return stream + zlib.crc32(stream).to_bytes(4, "little")


def raw_section(name: bytes, payload: bytes, version: int = 1) -> bytes:
    body = len(name).to_bytes(2, "little") + version.to_bytes(4, "little") + len(payload).to_bytes(4, "little")
    body += name + payload
    return body + zlib.crc32(body).to_bytes(4, "little")


@given(SECTIONS)
def test_what_is_encoded_is_decoded(sections: list[Section]) -> None:
    decoded = decode_sections(encode_sections(sections))
    assert list(decoded.values()) == sections


@given(st.lists(SECTIONS, min_size=2, max_size=4), st.data())
def test_what_came_before_changes_nothing(streams: list[list[Section]], data: st.DataObject) -> None:
    """A reader that remembers finds in each stream what one finds that does not; damage is found, too."""
    known: dict[str, tuple[bytes, Section]] = {}
    for sections in [*streams, streams[-1]]:
        stream = bytearray(encode_sections(sections))
        assert list(decode_sections(stream, known).values()) == sections
        assert known.keys() == {section.name for section in sections}
        bit = data.draw(st.integers(0, len(stream) * 8 - 1))
        stream[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SectionError):
            decode_sections(stream, known)


@settings(max_examples=300)
@given(st.data())
def test_any_damage_is_refused(data: st.DataObject) -> None:
    stream = bytearray(encode_sections(TWO))
    kind = data.draw(st.sampled_from(["flip", "cut", "append", "exchange"]))
    if kind == "flip":
        bit = data.draw(st.integers(0, len(stream) * 8 - 1))
        stream[bit // 8] ^= 1 << bit % 8
    elif kind == "cut":
        del stream[data.draw(st.integers(0, len(stream) - 1)) :]
    elif kind == "append":
        stream += data.draw(st.binary(min_size=1, max_size=20))
    else:
        one, two = (encode_sections([section])[12:-14] for section in TWO)
        stream = bytearray(stream[:12] + two + one + stream[-14:])
    with pytest.raises(SectionError):
        decode_sections(bytes(stream))


@settings(max_examples=300)
@given(st.binary(max_size=80), st.sampled_from(["payload", "section", "stream"]))
def test_any_bytes_are_refused_or_decoded(noise: bytes, where: str) -> None:
    """Also behind right CRCs: somebody else can compute them as well."""
    stream = {
        "payload": framed(raw_section(b"x", noise)),
        "section": framed(noise, count=1),
        "stream": MAGIC + FORMAT.to_bytes(4, "little") + noise,
    }[where]
    try:
        found = decode_sections(stream)
    except SectionError:
        return
    assert all(isinstance(section.data, dict) for section in found.values())


@pytest.mark.parametrize(
    "payload",
    [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91" * 10000, b"\xc6\xff\xff\xff\xff", b"\x81\x91\x01\x01",
     b"\x01", b"\x81\x01\x01", b"\xd6\xff\0\0\0\0"],
)  # fmt: skip
def test_payloads_that_are_no_fields(payload: bytes) -> None:
    with pytest.raises(SectionError, match=r"section 'x': \(payload\)"):
        decode_sections(framed(raw_section(b"x", payload)))


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"", "no saved state"),
        (b"QEVM" * 9, "no saved state"),
        (MAGIC + b"\x02\0\0\0", "2 is newer"),
        (MAGIC + bytes(4), "0 never was"),
        (framed(raw_section(b"a", b"\x80"), raw_section(b"a", b"\x80")), "two sections"),
        (framed(raw_section(b"\xff", b"\x80")), "not printable"),
        (framed(raw_section(b"a", b"\x80"), count=2), "says 2, there are 1"),
        (framed() + b"x", "trailing"),
        (framed(raw_section(b"a" * 65, b"\x80")), "name of 65 bytes"),
        (MAGIC + b"\x01\0\0\0" + b"\x01\0" + bytes(4) + b"\xff\xff\xff\xff", "fields of 4294967295"),
        (b"".join([MAGIC, b"\x01\0\0\0", *[raw_section(b"%d" % i, b"\x80") for i in range(1025)]]), "too many"),
    ],
)
def test_streams_that_are_refused(stream: bytes, says: str) -> None:
    with pytest.raises(SectionError, match=says):
        decode_sections(stream)


@pytest.mark.parametrize(
    ("expected", "says"),
    [
        ({"first": 1}, "section 'second': name: unknown"),
        ({"first": 1, "second": 7, "third": 1}, "section 'third': name: the section is missing"),
        ({"first": 1, "second": 6}, "section 'second': version: 7 is newer than this pyvmm's 6"),
        ({"first": 2, "second": 7}, "section 'first': version: 1 is older"),
    ],
)
def test_the_wrong_set_of_sections(expected: dict[str, int], says: str) -> None:
    found = decode_sections(encode_sections(TWO))
    match_sections(found, {"first": 1, "second": 7})
    with pytest.raises(SectionError, match=says):
        match_sections(found, expected)


@pytest.mark.parametrize("bad", [[Section("", 1, {})], [Section("a" * 65, 1, {})], [Section("a", 1, {})] * 2])
def test_what_could_not_be_decoded_is_not_encoded(bad: list[Section]) -> None:
    with pytest.raises(ValueError, match="section"):
        encode_sections(bad)


def test_a_payload_is_msgpack() -> None:
    """Others may read it, too."""
    fields: dict[str, Any] = {"a": 1, "b": b"xyz"}
    assert msgspec.msgpack.encode(fields) in encode_sections(TWO)
