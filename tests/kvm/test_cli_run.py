"""``pyvmm run`` as a process: its exit statuses, its report, and one clear line for whatever it refuses."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from pyvmm.cli import main
from tests.framework.kvm_device import KINDS, bound_by_permissions, with_kvm_device
from tests.framework.processes import PYVMM, REPOSITORY, pyvmm, refused
from tests.framework.real_mode import HLT_FOREVER, SPIN, TRIPLE_FAULT, image, out8, out16, text
from tests.unit.arch.x86.boot.images import Seg, elf


@pytest.fixture
def halting(tmp_path: Path) -> str:
    return image(tmp_path, HLT_FOREVER)


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    """A 64-bit ELF at 1 MiB that halts."""
    path = tmp_path / "kernel"
    path.write_bytes(elf([Seg(1 << 20, HLT_FOREVER)], 1 << 20))
    return str(path)


class TestStatuses:
    @pytest.mark.parametrize(
        ("code", "options", "kind", "status", "value"),
        [
            (text(b"hi") + HLT_FOREVER, [], "halt", 0, None),
            (text(b"hi") + out8(0xF4, 0x10), [], "debug-exit", 33, 0x10),
            (text(b"hi") + out8(0xF4, 0), [], "debug-exit", 1, 0),
            (text(b"hi") + out8(0xF4, 0x80), [], "debug-exit", 1, 0x80),
            (text(b"hi") + out16(0x501, 0x1234), ["--debug-exit", "0x501,2"], "debug-exit", 0x69, 0x1234),
            (text(b"hi") + SPIN, ["--timeout", "0.7"], "timeout", 124, None),
            (text(b"hi") + TRIPLE_FAULT, [], "triple-fault", 126, None),
            (text(b"hi") + out8(0x64, 0xFE), ["--no-reboot"], "reset", 0, None),
        ],
    )  # fmt: skip
    def test_status_and_report_say_how_it_ended(
        self, tmp_path: Path, code: bytes, options: list[str], kind: str, status: int, value: int | None
    ) -> None:
        report = tmp_path / "report"
        path = image(tmp_path, code)
        done = pyvmm("run", path, "--report", str(report), "--name", "test", *options)
        assert (done.returncode, done.stdout) == (status, b"hi"), done.stderr
        said = json.loads(report.read_text())
        assert (said["kind"], said["status"], said["guest_value"]) == (kind, status, value)
        assert (said["name"], said["image"], said["image_kind"]) == ("test", path, "flat")
        assert 0 < said["seconds"] < 30
        assert said["statistics"]["cpus"][0]["exits"] > 0
        assert (said["crash"] is not None) == (kind in ("timeout", "triple-fault"))
        assert not list(tmp_path.glob("*.partial"))
        if status in (124, 126):
            assert done.stderr.startswith(b"pyvmm: the guest "), done.stderr
        else:
            assert done.stderr == b""

    def test_a_crash_is_shown_with_registers_and_code(self, tmp_path: Path) -> None:
        done = pyvmm("run", image(tmp_path, TRIPLE_FAULT))
        assert b"triple fault on vCPU 0" in done.stderr
        assert b"rip " in done.stderr and b"cr0 " in done.stderr and b"mov ds,ax" in done.stderr

    def test_a_reset_starts_over(self, tmp_path: Path) -> None:
        done = pyvmm("run", image(tmp_path, text(b"x") + out8(0x64, 0xFE) + HLT_FOREVER), "--timeout", "1")
        assert done.returncode == 124
        assert len(done.stdout) > 3 and set(done.stdout) == {ord("x")}

    def test_a_report_may_go_to_a_pipe_and_spares_devices(self, halting: str, tmp_path: Path) -> None:
        """Replacing what is not a regular file would do away with /dev/null or /dev/stdout."""
        assert json.loads(pyvmm("run", halting, "--report", "/dev/stdout").stdout)["kind"] == "halt"
        target, link = tmp_path / "target", tmp_path / "link"
        target.write_text("old")
        link.symlink_to(target)
        assert pyvmm("run", halting, "--report", str(link)).returncode == 0
        assert link.is_symlink() and json.loads(target.read_text())["kind"] == "halt"

    def test_the_report_of_an_earlier_run_does_not_speak_for_one_that_was_refused(
        self, halting: str, tmp_path: Path
    ) -> None:
        report = tmp_path / "report.json"
        assert pyvmm("run", halting, "--report", str(report)).returncode == 0
        assert json.loads(report.read_text())["kind"] == "halt"
        for arguments in (["/nonexistent"], [halting, "--memory", "1"], [halting, "--disk", str(tmp_path / "none")]):
            line = refused("run", *arguments, "--report", str(report))
            found = json.loads(report.read_text())
            assert (found["kind"], found["status"], f"pyvmm: {found['reason']}\n") == ("refused", 125, line)
            report.write_text("old")
        refused("linux", "--smp", "many", "--report", str(report))
        assert json.loads(report.read_text())["kind"] == "refused"
        assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []

    def test_a_report_that_cannot_be_written_in_the_end_is_told(self, halting: str) -> None:
        assert refused("run", halting, "--report", "/dev/full").startswith("pyvmm: --report /dev/full: No space left")

    def test_trace_to_a_file(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        path = image(tmp_path, out8(0x123, 0x45) + out8(0xF4, 7))
        done = pyvmm("run", path, "--trace", f"vcpu_io,bus_unclaimed_*,file={log},format=log")
        assert (done.returncode, done.stderr) == (15, b"")
        lines = log.read_text()
        assert "port 0x0123" in lines and "port 0x00f4" in lines and "bus_unclaimed_write" in lines

    def test_chrome_trace_is_json(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace.json"
        pyvmm("run", image(tmp_path, text(b"x") + HLT_FOREVER), "--trace", f"machine_*,file={trace},format=chrome")
        assert "machine_ended" in {event["name"] for event in json.loads(trace.read_text())}


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--memory", "128Q"], "--memory"),
            (["--memory", "0"], "--memory 0"),
            (["--memory", "4095"], "--memory 4095"),
            (["--memory", "1023K"], "--memory"),
            (["--memory", "2T"], "--memory"),
            (["--memory", "1T"], "this host has"),
            (["--memory", "99999999999999999999T"], "--memory"),
            (["--memory", ""], "--memory"),
            (["--memory", "-1"], "--memory"),
            (["--smp", "0"], "--smp 0"),
            (["--smp", "65"], "--smp 65"),
            (["--smp", "two"], "--smp 'two'"),
            (["--smp", ""], "--smp ''"),
            (["--timeout", "0"], "--timeout"),
            (["--timeout", "nan"], "--timeout nan"),
            (["--timeout", "soon"], "--timeout 'soon'"),
            (["--timeout", ""], "--timeout ''"),
            (["--quirks", "magic"], "--quirks 'magic'"),
            (["--quirks", ""], "--quirks ''"),
            (["--trace", "no_such_event"], "no_such_event"),
            (["--trace", "vcpu_*,format=xml"], "format"),
            (["--trace", "vcpu_*,file=/nonexistent/log"], "/nonexistent/log"),
            (["--report", "/nonexistent/report"], "--report /nonexistent/report"),
            (["--report", "/"], "--report /"),
            (["--initrd", "/nonexistent"], "--initrd"),
            (["--append", "x"], "--append"),
            (["--serial", "tcp:1234"], "--serial tcp:1234"),
            (["--serial", "file:"], "--serial file:"),
            (["--serial", "file:/nonexistent/file"], "/nonexistent/file"),
            (["--serial", "file:/"], "--serial file:/"),
            (["--serial", "unix:/nonexistent/socket"], "/nonexistent/socket"),
            (["--serial", "unix:/" + "x" * 200], "too long"),
            (["--debug-exit", "0x10000"], "--debug-exit"),
            (["--debug-exit", "0xf4,3"], "debug-exit"),
            (["--debug-exit", "0xf4,0"], "debug-exit"),
            (["--debug-exit", "0x80"], "overlaps"),
            (["--debug-exit", ""], "--debug-exit"),
            (["--load-address", "zero"], "--load-address"),
            (["--load-address", "0x100"], "load address 0x100"),
            (["--load-address", "0xfffff"], "load address"),
            (["--load-address", ""], "--load-address"),
            (["--no-such-option"], "--no-such-option"),
            (["two-images"], "two-images"),
        ],
    )
    def test_bad_options(
        self, capfd: pytest.CaptureFixture[str], halting: str, options: list[str], said: str
    ) -> None:
        """In this process, which is ten times as fast."""
        try:
            status = main(["run", halting, *options])
        except SystemExit as error:  # argparse's way
            status = int(str(error.code))
        out, line = capfd.readouterr()
        assert (status, out, line.count("\n")) == (125, "", 1), line
        assert line.startswith("pyvmm") and said in line

    @pytest.mark.parametrize("arguments", [[], ["fly"], ["run", ""], ["run", "x", "--memory", "128Q"]])
    def test_as_a_process(self, arguments: list[str]) -> None:
        refused(*arguments)

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("empty.bin", b"", "empty"),
            ("text", b"#!/bin/sh\necho this is no kernel\n" * 50, "not a kernel"),
            ("cut", elf([Seg(1 << 20, HLT_FOREVER)], 1 << 20)[:100], ""),
            ("header", b"\x7fELF", ""),
            ("huge", elf([Seg(1 << 20, HLT_FOREVER, memsz=1 << 62)], 1 << 20), ""),
            ("far", elf([Seg(1 << 50, HLT_FOREVER)], 1 << 50), ""),
            ("large.bin", bytes(700 << 10), ""),
        ],
    )
    def test_bad_images(self, tmp_path: Path, name: str, content: bytes, said: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        line = refused("run", str(path))
        assert str(path) in line and said in line

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo.bin")
        assert "not a regular file" in refused("run", str(tmp_path / "fifo.bin"))
        assert "not a regular file" in refused("run", "/dev/zero")
        assert "no such file" in refused("run", "/nonexistent")
        assert "guests.toml" in refused("run", str(tmp_path))

    def test_memory_too_small_for_the_image(self, kernel: str) -> None:
        assert kernel in refused("run", kernel, "--memory", "1M")

    def test_an_initrd_that_does_not_fit(self, kernel: str, tmp_path: Path) -> None:
        (tmp_path / "initrd").write_bytes(bytes(4 << 20))
        assert "initrd" in refused("run", kernel, "--memory", "2M", "--initrd", str(tmp_path / "initrd"))
        assert "/nonexistent" in refused("run", kernel, "--initrd", "/nonexistent")

    def test_a_command_line_that_is_too_long(self, kernel: str) -> None:
        assert "command line" in refused("run", kernel, "--append", "x" * 70_000)

    def test_files_this_user_may_not_read_or_write(self, halting: str, tmp_path: Path) -> None:
        secret = tmp_path / "secret.bin"
        secret.write_bytes(HLT_FOREVER)
        secret.chmod(0)
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        for options, said in (
            ([str(secret)], "permission denied"),
            ([halting, "--report", str(locked / "report")], "not writable"),
            ([halting, "--serial", f"unix:{locked}/socket"], "Permission denied"),
            ([halting, "--serial", f"file:{locked}/file"], "Permission denied"),
        ):
            self.check(bound_by_permissions(str(PYVMM), "run", *options), said)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("quirks", ["auto", "none"])
    def test_no_usable_kvm(self, halting: str, tmp_path: Path, kind: str, quirks: str) -> None:
        folder = tmp_path / "device"
        folder.mkdir()
        said = {"missing": "does not exist", "forbidden": "permission denied; add this user to the group kvm"}
        command = with_kvm_device(kind, folder, str(PYVMM), "run", halting, "--quirks", quirks)
        self.check(command, said.get(kind, "is not a KVM device"))

    @staticmethod
    def check(command: list[str], said: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=REPOSITORY)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (125, "", 1), done.stderr
        assert done.stderr.startswith("pyvmm: ") and said in done.stderr

    def test_debug_shows_the_traceback_and_keeps_the_status(self) -> None:
        done = pyvmm("--debug", "run", "/nonexistent")
        assert done.returncode == 125
        assert done.stderr.startswith(b"Traceback") and done.stderr.endswith(b"no such file\n")
