"""Commands over the console: framing survives any output and any way the console cuts it up."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.cli.exec_console import STATUS_FD, ExecConsole, check_command_line, exec_argument, exec_script
from pyvmm.errors import ConfigError


def session(outputs: list[bytes], statuses: list[int]) -> bytes:
    """What the guest's console shows, as a terminal sends it."""
    text = b"kernel says\npyvmm: init\nmore\n"
    for number, (output, status) in enumerate(zip(outputs, statuses, strict=True)):
        text += b"pyvmm: command begin %d\n" % number + output + b"\npyvmm: command end %d %d\n" % (number, status)
    return text.replace(b"\n", b"\r\n")


plain = st.binary(max_size=200).map(lambda b: b.replace(b"\r", b"").replace(b"pyvmm:", b""))


@given(
    st.lists(st.tuples(plain, st.integers(0, 255)), min_size=1, max_size=4),
    st.lists(st.integers(1, 50), max_size=20),
)
def test_output_and_status_come_back_exactly(commands: list[tuple[bytes, int]], cuts: list[int]) -> None:
    written: list[bytes] = []
    console = ExecConsole(["x"] * len(commands), written.append)
    data = session([o for o, _ in commands], [s for _, s in commands])
    for cut in cuts:
        console(data[:cut])
        data = data[cut:]
    console(data)
    assert [r.output for r in console.results] == [o for o, _ in commands]
    assert [r.status for r in console.results] == [s for _, s in commands]
    assert b"".join(written) == b"".join(o for o, _ in commands)
    assert console.init_at is not None


@given(st.binary(max_size=2000))
def test_a_hostile_console_raises_nothing_and_invents_no_status(data: bytes) -> None:
    console = ExecConsole(["a", "b"], lambda data: None)
    console(b"pyvmm: command begin 0\n" + data + b"\npyvmm: command end 9999999 77\npyvmm: command begin 7\n")
    assert console.results[1].status is None


def test_the_script_is_what_init_decodes() -> None:
    commands = ["echo 'a'", "false"]
    assert base64.b64decode(exec_argument(commands).partition("=")[2]).decode() == exec_script(commands)


@pytest.mark.parametrize(
    ("last", "output", "status"),
    [
        ("echo hi", b"hi\n", 0),
        ("printf no-newline; exit 7", b"no-newline", 7),
        ("(exit 4)", b"", 4),
        ("set -e; false; echo not here", b"", 1),
        ("echo before\necho )", b"before\n", 2),
        ("if true; then", b"", 2),
        ("IFS=012; (exit 210)", b"", 210),
        ("exec sh -c 'echo gone; exit 9'", b"gone\n", None),
    ],
)
def test_a_real_shell_runs_the_script(tmp_path: Path, last: str, output: bytes, status: int | None) -> None:
    script = exec_script(["echo first; cd /; exit 3", last]).replace("kill -USR1 1", ":")
    told_to_init = tmp_path / "told"
    command = f"exec {STATUS_FD}>{told_to_init}\n{script}"
    done = subprocess.run(["busybox", "sh", "-c", command], capture_output=True, check=False, timeout=20)
    told = told_to_init.read_bytes()
    console = ExecConsole(["first", last])
    console(done.stdout)
    assert told == (b"" if status is None else b"%d\n" % status)
    assert [r.status for r in console.results] == [3, status]
    console.finish(done.returncode)
    assert [r.output for r in console.results] == [b"first\n", output]
    assert console.results[1].status == done.returncode == (9 if status is None else status)


def test_a_script_without_an_init_that_listens_still_ends_with_the_status() -> None:
    script = exec_script(["exit 5"])
    done = subprocess.run(["busybox", "sh", "-c", script], capture_output=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (5, b"")


def test_too_long_a_command_line_says_by_how_much() -> None:
    assert check_command_line("x" * 2047)
    with pytest.raises(ConfigError, match="1 bytes too long"):
        check_command_line("x" * 2048)


def test_a_nul_in_a_command_is_refused() -> None:
    with pytest.raises(ConfigError, match="NUL"):
        exec_argument(["a\0b"])


def test_output_of_a_command_that_never_ended_is_not_lost() -> None:
    written: list[bytes] = []
    console = ExecConsole(["echo hello; poweroff"], written.append)
    console(b"pyvmm: init\r\npyvmm: command begin 0\r\nhello\r\nno newline")
    console.finish()
    assert b"".join(written) == b"hello\nno newline"
    assert console.results[0].status is None
