"""The recording that the proxy's benchmark has: what it is of, and what the proxy makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvmm.native import lib
from pyvmm.net.compare import Compare, Mode, Reason
from pyvmm.net.filter import Direction, Frame
from pyvmm.net.rewriter import Rewriter

HEADER = bytes(lib.PV_NET_HEADER)


@pytest.fixture(scope="module")
def records() -> list[tuple[int, bytes]]:
    import colo_compare

    found: list[tuple[int, bytes]] = colo_compare.recorded(colo_compare.RECORDING, colo_compare.RECORDED_GUEST)
    return found


def proxied(records: list[tuple[int, bytes]], compare: Compare) -> Iterator[bytes]:
    """What clients get, in order."""
    import colo_compare

    rewriter = Rewriter()
    compare.set_mode(Mode.HYBRID, 1, 0)
    for kind, data in records:
        frame = Frame(HEADER, data)
        if kind == colo_compare.CLIENT:
            rewriter.rewrite(Direction.RX, frame, 0)
        elif kind == colo_compare.PRIMARY:
            assert compare.primary(frame, 0)
        else:
            compare.secondary(rewriter.rewrite(Direction.TX, frame, 0), 1, 0)
        yield from (each.data for each in compare.release())


def test_the_recording_has_requests_and_answers(records: list[tuple[int, bytes]]) -> None:
    import colo_compare

    clients = b"".join(data for kind, data in records if kind == colo_compare.CLIENT)
    answers = b"".join(data for kind, data in records if kind == colo_compare.PRIMARY)
    assert clients.count(b"POST /append") > 50 and answers.count(b"HTTP/1.1 200 OK") > 100


def test_clients_get_what_the_recording_has_though_the_secondarys_numbers_differ(
    records: list[tuple[int, bytes]],
) -> None:
    import colo_compare

    primary = [data for kind, data in records if kind == colo_compare.PRIMARY]
    secondary = [data for kind, data in records if kind == colo_compare.SECONDARY]
    assert primary != secondary
    compare = Compare()
    assert list(proxied(records, compare)) == primary
    assert compare.checkpoint_due is None


def test_one_other_byte_of_one_answer_is_noticed_and_not_released(records: list[tuple[int, bytes]]) -> None:
    import colo_compare

    place = max(
        at for at, (kind, data) in enumerate(records) if kind == colo_compare.SECONDARY and b"HTTP/1.1 200" in data
    )
    data = records[place][1]
    changed = [*records[:place], (colo_compare.SECONDARY, data[:-1] + bytes([data[-1] ^ 1])), *records[place + 1 :]]
    compare = Compare()
    released = list(proxied(changed, compare))
    due = compare.checkpoint_due
    assert due is not None and due.reason is Reason.PAYLOAD
    assert records[place - 1][0] == colo_compare.PRIMARY and records[place - 1][1] not in released
