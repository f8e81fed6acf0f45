"""The same questions to pyvmm and to the QEMU of this host: the answers have the same shape."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyvmm.errors import PyvmmError
from pyvmm.qmp.client import CommandError, QmpClient, open_client
from tests.framework.real_mode import SPIN
from tests.qmp.conftest import QmpMachine, machines

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU here to compare with")
Start = Callable[..., QmpMachine]
Both = tuple[QmpClient, QmpClient]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """(pyvmm's, QEMU's) clients of machines that are built and not started."""
    folder = tmp_path_factory.mktemp("both")
    path = folder / "qemu"
    command = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-S", "-m", "64", "-display", "none", "-nodefaults"]
    disk = folder / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    command += ["-drive", f"file={disk},format=raw,if=virtio,file.locking=off"]
    qemu = subprocess.Popen([*command, "-name", "same", "-qmp", f"unix:{path},server=on,wait=off"])
    try:
        with machines(folder) as start, contextlib.ExitStack() as stack:
            machine = start(SPIN, "-S", "--memory", "64M", "--name", "same", "--disk", str(disk))
            ours = stack.enter_context(machine.client())
            deadline = time.monotonic() + 30
            while True:
                try:
                    its = stack.enter_context(open_client(f"unix:{path}", 20))
                    break
                except PyvmmError:
                    assert time.monotonic() < deadline and qemu.poll() is None
                    time.sleep(0.05)
            yield ours, its
    finally:
        qemu.kill()
        qemu.wait(10)


def shape(value: Any) -> Any:
    """Types instead of values; of a list its first element."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in sorted(value.items())}
    if isinstance(value, list):
        return [shape(one) for one in value[:1]]
    return type(value).__name__


def outcome(client: QmpClient, name: str, arguments: dict[str, Any]) -> Any:
    try:
        return shape(client.execute(name, arguments))
    except CommandError as error:
        return (error.error_class, str(error))


@pytest.mark.parametrize(
    "name",
    ["query-version", "query-status", "query-kvm", "query-name", "query-cpus-fast", "query-memory-size-summary",
     "query-commands", "query-chardev", "stop", "query-dump-guest-memory-capability"],
)  # fmt: skip
def test_answers_have_the_same_shape(both: Both, name: str) -> None:
    ours, its = (shape(client.execute(name)) for client in both)
    assert ours == its


def test_disks_have_the_same_members(both: Both) -> None:
    ours, its = (client.execute("query-block")[0] for client in both)
    for members, reference in ((ours, its), (ours["inserted"], its["inserted"]),
                               (ours["inserted"]["image"], its["inserted"]["image"])):  # fmt: skip
        assert set(members) <= set(reference)
    assert ours["device"] == its["device"]
    assert ours["inserted"]["image"]["virtual-size"] == its["inserted"]["image"]["virtual-size"] == 1 << 20
    assert ours["inserted"]["file"] == its["inserted"]["file"]


def test_what_depends_on_nothing_is_the_same(both: Both) -> None:
    for name in ("query-status", "query-name", "query-memory-size-summary"):
        ours, its = (client.execute(name) for client in both)
        assert ours == its


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("no-such", {}),
        ("stop", {"x": 1}),
        ("memsave", {"val": 1}),
        ("memsave", {"val": "a", "size": 1, "filename": "x"}),
        ("memsave", {"val": 0, "size": 1, "filename": "/no/such"}),
        ("memsave", {"val": 0, "size": 1, "filename": "/tmp/x", "cpu-index": 9}),
        ("dump-guest-memory", {"paging": False, "protocol": "foo:x"}),
        ("dump-guest-memory", {"paging": "x", "protocol": "foo:x"}),
        ("dump-guest-memory", {"paging": False, "protocol": "file:/tmp/x", "begin": 0}),
        ("trace-event-get-state", {"name": "no-such"}),
        ("screendump", {}),
        ("qmp_capabilities", {}),
        ("query-balloon", {}),
        ("balloon", {"value": 5}),
        ("getfd", {"fdname": "x"}),
        ("closefd", {"fdname": "x"}),
        ("human-monitor-command", {}),
    ],
)
def test_mistakes_are_told_in_the_same_words(both: Both, name: str, arguments: dict[str, Any]) -> None:
    ours, its = (outcome(client, name, arguments) for client in both)
    assert ours == its


@pytest.mark.parametrize(
    "line", ["info status", "info name", "foo", "info foo", "x/2zz 0", "x", "x $nope", "info memory_size_summary",
             "xp/3xw 0x500000", "xp/20xb 0x500003", "xp/3dw 0x500000", "xp/3ug 0x500000", "xp/3oh 0x500000"]
)  # fmt: skip
def test_the_human_monitor_says_the_same(both: Both, line: str) -> None:
    ours, its = (client.execute("human-monitor-command", {"command-line": line}) for client in both)
    assert ours == its


def test_the_register_dump_has_the_same_lines(both: Both) -> None:
    """Names and widths; what is in them is another machine's. QEMU's vendor adds nothing else before FPU state."""

    def names(text: str) -> list[str]:
        digits = str.maketrans("0123456789abcdef", "0" * 16)
        return [line.translate(digits).replace("*", "") for line in text.splitlines() if "=" in line][:23]

    ours, its = (names(c.execute("human-monitor-command", {"command-line": "info registers"})) for c in both)
    assert ours == its


SIMPLER = {"snapshot-save", "snapshot-load"}
"""QEMU's are jobs that write into nodes of disk images; here a tag names a file."""
OWN_COMMANDS = {
    "colo-checkpoint-now", "query-colo-checkpoints", "query-colo-stats", "x-colo-protect", "gdbserver",
    "x-query-dirty-heat", "x-query-virtio-depths", "x-query-disk-sums",
}  # fmt: skip
OWN_MEMBERS = {
    "migrate-set-parameters": {"x-stall-timeout", "x-checkpoint-timeout", "x-colo-mode", "x-colo-delta"},
}
"""What pyvmm has beyond QEMU, marked as such by its name."""


def test_every_command_and_event_is_one_of_qemus_and_takes_what_qemus_takes(both: Both) -> None:
    ours, its = ({e["name"]: e for e in client.execute("query-qmp-schema")} for client in both)

    def members(schema: dict[str, Any], entry: dict[str, Any]) -> dict[str, bool]:
        kind = schema[entry["arg-type"]]
        found = {member["name"]: "default" in member for member in kind.get("members", [])}
        # Of a union the members of each case; pyvmm has them all in one struct, and refuses them in the other cases.
        for case in kind.get("variants", []):
            found |= {member["name"]: True for member in schema[case["type"]]["members"]}
        return found

    for name, entry in ours.items():
        if entry["meta-type"] not in ("command", "event") or name.startswith("x-pyvmm") or name in OWN_COMMANDS:
            continue
        assert its[name]["meta-type"] == entry["meta-type"]
        if name in SIMPLER:
            continue
        mine, reference = members(ours, entry), members(its, its[name])
        mine = {member: optional for member, optional in mine.items() if member not in OWN_MEMBERS.get(name, ())}
        assert mine.items() <= reference.items(), name
        missing = {member for member, optional in reference.items() if not optional} - set(mine)
        assert not missing, f"{name} lacks {missing}"


def test_the_schema_has_qemus_form(both: Both) -> None:
    ours, its = ({(e["meta-type"], tuple(sorted(e))) for e in c.execute("query-qmp-schema")} for c in both)
    assert ours <= its
