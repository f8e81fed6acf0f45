"""The pure parts of bench/colo.py: a wrong figure looks like any other."""

from __future__ import annotations

import pytest
from protection.records import (
    pauses,
    periods_of,
    pyvmm_messages,
    qemu_messages,
    ran_at,
    resident_of,
    rounds_of,
    sizes,
    until_received,
)
from protection.table import table


def test_a_pause_is_from_a_stop_to_the_resume_behind_it() -> None:
    events = [("RESUME", 1.0), ("STOP", 2.0), ("MIGRATION", 3.0), ("RESUME", 5.0), ("STOP", 9.0)]
    assert pauses(events) == [3.0]


@pytest.mark.parametrize(
    ("running", "events", "at"),
    [
        (True, [("COLO_EXIT", 12.0)], 12.0),  # its replica ran all the time: it is the guest when COLO is over
        (False, [("COLO_EXIT", 12.0)], None),
        (False, [("COLO_EXIT", 12.0), ("RESUME", 15.0)], 15.0),  # over, but the guest stood still
        (False, [("RESUME", 11.0), ("COLO_EXIT", 12.0)], 12.0),
        (True, [("STOP", 10.5), ("COLO_EXIT", 12.0), ("RESUME", 13.0)], 13.0),
        (True, [("STOP", 10.5), ("RESUME", 11.0), ("COLO_EXIT", 12.0), ("STOP", 14.0), ("RESUME", 15.0)], 12.0),
        (True, [("COLO_EXIT", 9.0)], None),  # before it was asked for
    ],
)
def test_a_survivor_runs_when_it_runs_and_is_alone(
    running: bool, events: list[tuple[str, float]], at: float | None
) -> None:
    assert ran_at(events, running=running, since=10.0) == at


QEMU = """\
qemu-system-x86_64: warning: host doesn't support requested feature
14516@100.000000:colo_send_message Send 'checkpoint-request' message
14516@100.000700:colo_receive_message Receive 'checkpoint-reply' message
14516@100.250000:colo_receive_message Receive 'vmstate-received' message
14516@100.500000:colo_send_message Send 'checkpoint-request' message
14516@100.504000:colo_receive_message Receive 'vmstate-received' message
"""
PYVMM = """\
# ns\ttid\tgroup\tevent\ttext
100000000000\t7\tcolo\tcolo_send_message\tcheckpoint-request
100090000000\t7\tcolo\tcolo_send_message\tvmstate-send 200
100100000000\t7\tcolo\tcolo_send_message\tvmstate-size 1000
100200000000\t7\tcolo\tcolo_receive_message\tvmstate-received
100500000000\t7\tcolo\tcolo_send_message\tcheckpoint-request
100500100000\t7\tcolo\tcolo_failover_set_state\tnone -> require, changed 1
100500900000\t7\tcolo\tcolo_send_message\tvmstate-send 300
100501000000\t7\tcolo\tcolo_send_message\tvmstate-size 5000
100502500000\t7\tcolo\tcolo_receive_message\tvmstate-received
100900000000\t7\tcolo\tcolo_send_message\tcheckpoint-request
"""


def test_traces_of_both_tell_the_time_until_received_without_the_first_and_the_unfinished() -> None:
    assert until_received(qemu_messages(QEMU.splitlines())) == pytest.approx([4.0])
    assert until_received(pyvmm_messages(PYVMM.splitlines())) == pytest.approx([2.5])
    assert sizes(PYVMM.splitlines()) == [1200, 5300]


SMAPS = """\
7f00-7f80 rw-p 00000000 00:01 1234                       /memfd:pyvmm-ram-low (deleted)
Size:             131072 kB
Rss:              100000 kB
Anonymous:         40000 kB
VmFlags: rd wr mr
5500-5600 rw-p 00000000 00:00 0                          [heap]
Rss:               30000 kB
Anonymous:         30000 kB
5600-5700 r-xp 00000000 fe:00 77                         /usr/bin/python3.11
Rss:                2000 kB
Anonymous:             0 kB
"""


def test_of_a_mapped_file_only_copies_count_since_the_file_is_counted_whole() -> None:
    assert resident_of(SMAPS.splitlines(), "/memfd:pyvmm-ram") == (40000 << 10, 32000 << 10)


def test_a_round_counts_when_its_line_is_whole() -> None:
    console = b"10 pages every 50 ms\nround 8: 10 pages in 1500 us\n"
    console += b"round 9: 10 pages in 2500 us, late by 2\nround 10: 1"
    assert rounds_of(console) == [(8, 1.5), (9, 2.5)]
    assert periods_of(console) == 4


def test_the_table_says_what_was_missed() -> None:
    def both(ours: float, theirs: float) -> dict[str, object]:
        return {"pyvmm": {"median": ours, "most": 2 * ours}, "qemu": {"median": theirs, "most": theirs}}

    figures = {f"{name}_100": both(1.25, 400.0) for name in ("pause", "received", "told", "cpu")}
    figures |= {"resident_100": {"pyvmm": {"median": 30.0, "most": 31.0}, "qemu": "never enters COLO"}}
    figures |= {"memcpy_100": {"median": 0.04}, "killed_hybrid_file": both(60.0, 0.0)}
    figures |= {"work_hybrid": {"delay": 500, "throughput": {"median": 0.97}, "speed": {"median": 0.9}}}
    found = {
        "date": "today", "command": "python bench/colo.py", "pages": [100], "figures": figures,
        "host": {"cpus": 2, "cpu": "a CPU", "kernel": "Linux", "kvm": "svm", "load_1min": 0.5},
        "target": {
            "pause_100": {"target_at_most": 2.1, "met": True}, "received_100": {"met": False},
            "killed_hybrid_file": {"target_at_most": 50.0, "met": False},
            "work_hybrid": {"target_at_least": 0.95, "met": True},
        },
    }  # fmt: skip
    lines = table(found).splitlines()
    (row,) = [line for line in lines if line.startswith("| 100 |")]
    assert row == (
        "| 100 | 1.2 (2.5) ms, 400 (400) ms | 2.1 ms (memcpy 0.04 ms) | 1.2 (2.5) ms, 400 (400) ms **missed** "
        "| 1.2 (2.5) ms, 400 (400) ms | 1.2 (2.5) ms, 400 (400) ms | 30.0 (31.0) MiB, never enters COLO |"
    )
    (death,) = [line for line in lines if "SIGKILL" in line]
    assert death.endswith("arbiter file | 60.0 (120) ms **missed** | 50 ms |")
    (work,) = [line for line in lines if "throughput" in line]
    assert "97.0%; while it works 90.0% | 95% |" in work
