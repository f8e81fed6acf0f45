"""The six kernel compressions, as streams with a bound."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.boot.payload import SIZE_TRAILER, TRAILER_INSIDE, Source, compression_of, unpack
from pyvmm.errors import ImageError

from . import images


def chunked(data: bytes, size: int = 1000) -> Source:
    """The packed data through one reused buffer, as ImageFile.chunks gives it."""

    def chunks() -> Iterator[memoryview]:
        staging = bytearray(size)
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            staging[: len(piece)] = piece
            yield memoryview(staging)[: len(piece)]

    return Source(chunks())


def packed(data: bytes, compression: str) -> bytes:
    """What unpack() gets: without the appended trailer."""
    whole = images.compress(data, compression)
    return whole if compression in TRAILER_INSIDE else whole[:-SIZE_TRAILER]


def mixed(size: int) -> bytes:
    """Neither random nor constant."""
    rng = random.Random(size)
    return b"".join(rng.randbytes(16) * rng.randrange(1, 9) for _ in range(size // 64))


@pytest.mark.parametrize("compression", images.COMPRESSIONS)
@pytest.mark.parametrize("size", [64, 5 << 20])
def test_unpacks_what_was_packed(compression: str, size: int) -> None:
    data = mixed(size)
    blob = packed(data, compression)
    assert compression_of(blob) == compression
    assert b"".join(unpack("image", compression, chunked(blob), len(data))) == data


def test_the_trailer_is_the_size() -> None:
    for compression in images.COMPRESSIONS:
        whole = images.compress(b"x" * 12345, compression)
        assert int.from_bytes(whole[-SIZE_TRAILER:], "little") == 12345


def test_lz4_with_several_blocks_and_frames() -> None:
    data = mixed(1 << 20)
    blob = images.lz4_legacy(data, 100_000) + images.lz4_legacy(data[:5000])
    assert b"".join(unpack("image", "lz4", chunked(blob), len(data) + 5000)) == data + data[:5000]


@pytest.mark.parametrize("compression", images.COMPRESSIONS)
def test_truncated_damaged_short_and_long(compression: str) -> None:
    data = mixed(200_000)
    blob = packed(data, compression)

    def run(blob: bytes, size: int) -> bytes:
        return b"".join(unpack("image", compression, chunked(blob), size))

    for cut in (5, len(blob) // 2, len(blob) - 20):
        with pytest.raises(ImageError, match=r"payload: .* data (ends after|is damaged)"):
            run(blob[:cut], len(data))
    with pytest.raises(ImageError, match=f"ends after {len(data)} of the {len(data) + 1000} bytes"):
        run(blob, len(data) + 1000)
    with pytest.raises(ImageError, match="unpacks to more than"):
        run(blob, len(data) - 1)
    with pytest.raises(ImageError, match="damaged"):
        run(blob[:16] + b"\xff" * 64 + blob[80:], len(data))


@pytest.mark.parametrize("compression", images.COMPRESSIONS)
def test_a_bomb_is_stopped_at_its_announced_size(compression: str) -> None:
    blob = packed(bytes(64 << 20), compression)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="unpacks to more than the 100000 bytes"):
            for _ in unpack("image", compression, chunked(blob, 1 << 16), 100_000):
                pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20, f"{compression}: {peak >> 20} MiB"


def test_memory_does_not_grow_with_the_payload() -> None:
    blob = packed(bytes(64 << 20), "gzip")
    tracemalloc.start()
    try:
        total = sum(len(piece) for piece in unpack("image", "gzip", chunked(blob, 1 << 16), 64 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 64 << 20
    assert peak < 6 << 20


def test_dictionaries_and_windows_are_bounded() -> None:
    lzma_head = b"\x5d" + (0xFFFFFFFF).to_bytes(4, "little") + b"\xff" * 8 + bytes(64)
    with pytest.raises(ImageError, match="lzma data is damaged: Memory usage limit"):
        list(unpack("image", "lzma", chunked(lzma_head), 1000))
    zstd_head = b"\x28\xb5\x2f\xfd" + bytes((0x00, 0xF8)) + bytes(64)  # window of 2 TiB
    with pytest.raises(ImageError, match="zstd data is damaged"):
        list(unpack("image", "zstd", chunked(zstd_head), 1000))


@settings(max_examples=120, deadline=2000)
@given(
    compression=st.sampled_from(images.COMPRESSIONS),
    at=st.integers(0, 1 << 20),
    noise=st.binary(min_size=1, max_size=12),
)
def test_damage_never_escapes_as_another_error(compression: str, at: int, noise: bytes) -> None:
    data = mixed(20_000)
    blob = bytearray(packed(data, compression))
    at = 4 + at % (len(blob) - 4)
    blob[at : at + len(noise)] = noise
    try:
        out = b"".join(unpack("image", compression, chunked(bytes(blob)), len(data)))
    except ImageError as error:
        assert error.field == "payload"
    else:
        assert len(out) == len(data)
