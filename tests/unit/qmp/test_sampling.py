"""Samples of a machine: what is made of its answers, whoever gives them, and what happened between two."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pyvmm.errors import DeadlineError, HostError
from pyvmm.qmp.client import QmpClient
from pyvmm.qmp.sampling import CpuSample, QueueSample, Sample, rates, sample


def heat(written: int, since: float = 1.0, harvests: int = 1, log: str = "own") -> dict[str, Any]:
    return {"since": since, "harvests": harvests, "log": log, "regions": [{"written": [written]}]}


def looked(at: float, *cpus: CpuSample, heat: dict[str, Any] | None = None) -> Sample:
    written = None if heat is None else heat["regions"][0]["written"][0]
    return Sample(at, "vm", "running", 1 << 20, list(cpus), [], written, heat, None, None, None)


def test_a_second_s_worth() -> None:
    before = looked(10, CpuSample(0, 1.0, 100, {"io": 10}), CpuSample(1, 0.0, 0, {"io": 0}))
    after = looked(12, CpuSample(0, 2.0, 300, {"io": 30}), CpuSample(1, 1.0, 10, {"io": 10, "mmio": 4}))
    found = rates(before, after)
    assert found is not None and found.seconds == 2 and found.dirty is None
    assert [(each.busy, each.exits) for each in found.cpus] == [(0.5, 100), (0.5, 5)]
    assert [each.kinds for each in found.cpus] == [{"io": 10}, {"io": 5, "mmio": 2}]
    assert (found.busy, found.exits) == (1.0, 105)


def test_what_are_no_two_moments_of_one_life() -> None:
    one, two = CpuSample(0, 50.0, 1000, {"io": 10}), CpuSample(1, 0.0, 0, {})
    assert rates(looked(10, one, two), looked(11, one)) is None
    assert rates(looked(10, one), looked(10, one)) is None and rates(looked(10), looked(9)) is None
    # Another process took the name: less than nothing is nothing.
    found = rates(looked(10, one), looked(11, CpuSample(0, 0.5, 3, {"io": 1})))
    assert found is not None and (found.busy, found.exits, found.cpus[0].kinds) == (0, 0, {"io": 0})


@pytest.mark.parametrize(
    ("before", "after", "dirty"),
    [
        (heat(100), heat(300), 100.0),
        (heat(100), heat(100), 0.0),
        (heat(100), None, None),
        (None, heat(100), None),
        (heat(100), heat(300, since=2.0), None),  # nobody had asked for a while: it began anew
        (heat(100, log="others"), heat(100, log="others"), None),  # no checkpoint in between: nobody knows
        (heat(100, log="others"), heat(150, harvests=2, log="others"), 25.0),
    ],
)
def test_written_pages(before: dict[str, Any] | None, after: dict[str, Any] | None, dirty: float | None) -> None:
    found = rates(looked(0, heat=before), looked(2, heat=after))
    assert found is not None and found.dirty == dirty


@contextlib.contextmanager
def answering(answers: dict[str, Any]) -> Iterator[QmpClient]:
    """A client of something that answers by ``answers``, refuses everything else and is silent at ``...``."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, theirs.makefile("rwb") as stream, contextlib.suppress(OSError):
            stream.write(b'{"QMP": {}}\n')
            stream.flush()
            for line in stream:
                message = json.loads(line)
                name = message.get("exec-oob") or message["execute"]
                refusal = {"error": {"class": "CommandNotFound", "desc": "no such command"}}
                answer = {"return": answers[name]} if answers.get(name, ...) is not ... else refusal
                if name in answers and answers[name] is ...:
                    continue
                stream.write(json.dumps(answer | {"id": message["id"]}).encode() + b"\n")
                stream.flush()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with QmpClient(ours, "vm", 0.5) as client:
            yield client
    finally:
        ours.close()
        thread.join(5)
        assert not thread.is_alive()


OWN = [{"name": "cpu-time-ns", "value": 2_500_000_000}, {"name": "exits", "value": 7}]
LEAST: dict[str, Any] = {
    "qmp_capabilities": {}, "query-name": {}, "query-status": {"status": "running"}, "query-migrate": {},
    "query-memory-size-summary": {"base-memory": 4096}, "x-query-virtio-depths": [],
    "query-stats": [{"provider": "pyvmm", "qom-path": "/machine/cpu[0]", "stats": OWN}],
}  # fmt: skip


def test_a_machine_that_tells_little() -> None:
    with answering(LEAST) as client:
        found = sample(client)
    assert (found.name, found.status, found.memory, found.queues) == ("", "running", 4096, [])
    assert found.cpus == [CpuSample(0, 2.5, 7, {})], "where KVM counts nothing, pyvmm's own count"
    assert (found.written, found.heat, found.migration, found.colo, found.colo_stats) == (None,) * 5


def test_a_machine_that_tells_all() -> None:
    kvm = [{"name": "exits", "value": 90}, {"name": "halt_exits", "value": 20}, {"name": "invlpg", "value": 3}]
    stats = [*LEAST["query-stats"], {"provider": "kvm", "qom-path": "/machine/cpu[0]", "stats": kvm}]
    queues = [{"path": "/machine/a", "sizes": [8, 4], "depths": [3, 0]}, {"path": "/machine/b", "sizes": [2]}]
    colo = {"mode": "primary", "x-pair": "p", "x-term": 1, "x-epoch": 2}
    told = LEAST | {
        "query-stats": stats, "x-query-virtio-depths": queues, "x-query-dirty-heat": heat(12),
        "query-migrate": {"status": "colo"}, "query-colo-status": colo,
        "query-colo-stats": {"checkpoints": 1, "pages": 5},
    }  # fmt: skip
    with answering(told) as client:
        found = sample(client)
    assert found.cpus == [CpuSample(0, 2.5, 90, {"halt": 20})] and found.written == 12
    assert found.queues == [QueueSample("a", 0, 8, 3), QueueSample("a", 1, 4, 0), QueueSample("b", 0, 2, None)]
    assert (found.migration, found.colo) == ({"status": "colo"}, colo)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("query-status", []), ("query-status", {"status": 5}), ("query-status", None), ("query-name", {"name": []}),
        ("query-memory-size-summary", {"base-memory": "much"}), ("query-memory-size-summary", {}),
        ("query-stats", {"a": 1}), ("query-stats", [{"provider": "kvm", "qom-path": [], "stats": []}]),
        ("query-stats", [{"provider": "pyvmm", "qom-path": "x", "stats": [{"name": "exits", "value": None}]}]),
        ("x-query-virtio-depths", [{"path": "p", "sizes": [1], "depths": [1, 2]}]),
        ("x-query-virtio-depths", [{"path": "p", "sizes": ["1"]}]), ("query-migrate", [1]), ("query-migrate", {"a": 1}),
        ("query-colo-status", {"mode": []}), ("query-colo-status", {"mode": "primary"}),
        ("x-query-dirty-heat", {"regions": 3}), ("x-query-dirty-heat", "hot"),
    ],
)  # fmt: skip
def test_what_is_no_pyvmm_is_told_in_a_line(name: str, answer: Any) -> None:
    with answering(LEAST | {name: answer}) as client, pytest.raises(HostError, match="vm: does not answer as a"):
        sample(client)


def test_one_that_stops_answering() -> None:
    with answering(LEAST | {"x-query-virtio-depths": ...}) as client, pytest.raises(DeadlineError):
        sample(client)
