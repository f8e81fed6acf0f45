"""``pyvmm run`` and the world: signals, pipes that close, slow readers, files and sockets on the serial line."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.framework.processes import PYVMM, REPOSITORY, Running, pyvmm, refused
from tests.framework.real_mode import ECHO_UNTIL_Q, HLT_FOREVER, SPIN, image, out8, text

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


class TestSignals:
    @pytest.mark.parametrize("number", SIGNALS)
    def test_it_ends_in_order(self, tmp_path: Path, number: signal.Signals) -> None:
        path = tmp_path / "socket"
        with Running("run", image(tmp_path, text(b"ready") + SPIN), "--name", "x") as vmm:
            vmm.read_until(b"ready")
            vmm.process.send_signal(number)
            status, _, err = vmm.finish()
        assert (status, err.decode()) == (128 + number, f"pyvmm: ended by {number.name}\n")
        assert not path.exists()

    @pytest.mark.parametrize(
        ("number", "guest"),
        [(signal.SIGTERM, "sends for ever"), (signal.SIGTERM, "is done"), (signal.SIGINT, "is done")],
    )
    def test_it_ends_although_nobody_reads(self, tmp_path: Path, number: signal.Signals, guest: str) -> None:
        """A reader that looks afterwards gets what the pipe held."""
        end = {"sends for ever": JUMP_BACK, "is done": HLT_FOREVER}[guest]
        with Running("run", big_output(tmp_path, end), "--report", str(tmp_path / "report")) as vmm:
            time.sleep(1)
            vmm.process.send_signal(number)
            deadline = time.monotonic() + 12
            while vmm.process.poll() is None:
                assert time.monotonic() < deadline, "it does not end"
                time.sleep(0.05)
            status, out, err = vmm.finish()
        assert status == 128 + number
        assert b"output is incomplete: its reader does not read" in err
        assert json.loads((tmp_path / "report").read_text())["status"] == status
        assert out == BIG[: len(out)] and len(out) > 50_000

    def test_output_before_the_signal_comes_out(self, tmp_path: Path) -> None:
        """Also what KVM or the native loop had collected: the guest made no exit since."""
        with Running("run", image(tmp_path, text(b"one") + text(b"two", 0x3F8) + SPIN)) as vmm:
            vmm.read_until(b"o")
            time.sleep(0.05)
            vmm.process.send_signal(signal.SIGTERM)
            assert vmm.finish()[1] == b"netwo"

    def test_what_its_parent_ignores_stays_ignored(self, tmp_path: Path) -> None:
        """As nohup has it."""

        def ignore() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        with Running("run", image(tmp_path, text(b"ready") + SPIN), preexec_fn=ignore) as vmm:
            vmm.read_until(b"ready")
            vmm.process.send_signal(signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                vmm.process.wait(0.5)
            vmm.process.send_signal(signal.SIGTERM)
            assert vmm.finish()[0] == 143

    def test_a_parent_that_blocks_signals_does_not_keep_vcpus_running(self, tmp_path: Path) -> None:
        """The mask is inherited, and vCPUs are brought out of KVM_RUN by a signal."""

        def block() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, range(signal.SIGRTMIN, signal.SIGRTMAX + 1))

        with Running("run", image(tmp_path, SPIN), "--timeout", "0.3", preexec_fn=block) as vmm:
            assert vmm.finish()[0] == 124


def big_output(folder: Path, end: bytes) -> str:
    """A guest that sends :data:`BIG` by 32 times ``rep outsb``, then executes ``end``."""
    # cld; mov bx,32; 1: mov si,0x8000; mov cx,0x8000; mov dx,0x3f8; rep outsb; dec bx; jnz 1b
    code = b"\xfc\xbb\x20\x00\xbe\x00\x80\xb9\x00\x80\xba\xf8\x03\xf3\x6e\x4b\x75\xf2" + end
    return image(folder, code.ljust(0x400, b"\x90") + BIG[:0x8000])


JUMP_BACK = b"\xe9\xeb\xff"  # to the start of big_output's code
BIG = random.Random(1).randbytes(0x8000) * 32
"""1 MiB."""


class TestStandardStreams:
    def test_a_slow_reader_gets_everything_in_order(self, tmp_path: Path) -> None:
        """It starts to read long after the guest has halted."""
        with Running("run", big_output(tmp_path, HLT_FOREVER), "--timeout", "60") as vmm:
            assert vmm.process.stdout is not None
            time.sleep(3.5)
            got = b""
            while piece := os.read(vmm.process.stdout.fileno(), 50_000):
                got += piece
                time.sleep(0.02)
            status, _, err = vmm.finish()
        assert (status, err) == (0, b"")
        assert got == BIG

    def test_bytes_sent_one_by_one_come_in_order_too(self, tmp_path: Path) -> None:
        # mov cx,30000; mov dx,0x3f8; 1: mov al,cl; xor al,ch; out dx,al; loop 1b
        code = b"\xb9\x30\x75\xba\xf8\x03\x88\xc8\x30\xe8\xee\xe2\xf9" + HLT_FOREVER
        done = pyvmm("run", image(tmp_path, code))
        assert done.stdout == bytes(n & 0xFF ^ n >> 8 for n in range(30000, 0, -1))

    def test_a_reader_that_leaves_early_does_not_stop_the_guest(self, tmp_path: Path) -> None:
        guest = image(tmp_path, text(b"first\n") + text(b"more\n") * 200 + out8(0xF4, 0x21))
        with Running("run", guest) as vmm:
            vmm.read_until(b"first\n")
            assert vmm.process.stdout is not None and vmm.process.stderr is not None
            vmm.process.stdout.close()
            assert vmm.process.wait(15) == 0x21 << 1 | 1
            assert vmm.process.stderr.read() == b""

    def test_in_a_shell_pipeline(self, tmp_path: Path) -> None:
        guest = image(tmp_path, text(b"first\n") + text(b"more\n") * 100 + HLT_FOREVER)
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {PYVMM} run {guest} | head -1"],
            capture_output=True, timeout=30, check=False, cwd=REPOSITORY,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, b"first\n", b"")

    def test_input_from_a_pipe_and_from_a_file(self, tmp_path: Path) -> None:
        guest = image(tmp_path, ECHO_UNTIL_Q)
        sent = b"hello, " * 40 + b"q"
        assert pyvmm("run", guest, stdin=sent).stdout == sent
        (tmp_path / "input").write_bytes(sent)
        with open(tmp_path / "input", "rb") as file, Running("run", guest, stdin=file) as vmm:
            status, out, _ = vmm.finish()
        assert (status, out) == (0, sent)

    @pytest.mark.parametrize("closing", ["</dev/null", "<&-", "<&- >&-", "<&- >&- 2>&-"])
    def test_without_input_or_output_the_guest_just_runs(self, tmp_path: Path, closing: str) -> None:
        guest, output = image(tmp_path, text(b"hi") + out8(0xF4, 5)), tmp_path / "output"
        command = f"exec {PYVMM} run {guest} --serial file:{output} {closing}"
        assert subprocess.run(["sh", "-c", command], timeout=30, check=False).returncode == 11
        assert output.read_bytes() == b"hi"
        command = f"exec {PYVMM} run {guest} {closing}"
        assert subprocess.run(["sh", "-c", command], timeout=30, check=False).returncode == 11


class TestSerialFile:
    def test_output_replaces_what_was_there(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_bytes(b"old and longer than the new content")
        done = pyvmm("run", image(tmp_path, text(b"new", 0x3F8) + HLT_FOREVER), "--serial", f"file:{tmp_path}/out")
        assert (done.returncode, done.stdout) == (0, b"")
        assert (tmp_path / "out").read_bytes() == b"new"

    def test_a_full_disk_is_told_and_does_not_stop_the_guest(self, tmp_path: Path) -> None:
        done = pyvmm("run", image(tmp_path, text(b"x" * 10) + out8(0xF4, 1)), "--serial", "file:/dev/full")
        assert done.returncode == 3
        assert done.stderr == b"pyvmm: --serial file:/dev/full: output is incomplete: No space left on device\n"


class TestSerialSocket:
    @staticmethod
    def connect(path: Path) -> socket.socket:
        deadline = time.monotonic() + 15
        while True:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.settimeout(10)
            try:
                client.connect(str(path))
                return client
            except OSError:
                client.close()
                assert time.monotonic() < deadline, "nobody listens"
                time.sleep(0.02)

    @staticmethod
    def receive(client: socket.socket, size: int) -> bytes:
        got = b""
        while len(got) < size and (piece := client.recv(size - len(got))):
            got += piece
        return got

    def test_clients_come_and_go(self, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with Running("run", image(tmp_path, ECHO_UNTIL_Q), "--serial", f"unix:{path}") as vmm:
            for word in (b"one", b"two", b"a long one " * 20):
                with self.connect(path) as client:
                    client.sendall(word)
                    assert self.receive(client, len(word)) == word
            with self.connect(path) as client:
                client.sendall(b"bye q")
                assert self.receive(client, 100) == b"bye q", "the rest, then the end of the stream"
            assert vmm.finish() == (0, b"", b"")
        assert not path.exists()

    def test_a_client_that_vanishes_in_the_middle_of_output(self, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with Running("run", big_output(tmp_path, JUMP_BACK), "--serial", f"unix:{path}") as vmm:
            for _ in range(5):
                with self.connect(path) as client:
                    assert len(self.receive(client, 5000)) == 5000
            vmm.process.send_signal(signal.SIGTERM)
            assert vmm.finish()[0] == 143

    def test_a_killed_vmm_does_not_block_the_next_one(self, tmp_path: Path) -> None:
        path, guest = tmp_path / "socket", image(tmp_path, ECHO_UNTIL_Q)
        with Running("run", guest, "--serial", f"unix:{path}") as vmm:
            self.connect(path).close()
            vmm.process.kill()
            vmm.finish()
        assert path.exists(), "nothing could remove it"
        with Running("run", guest, "--serial", f"unix:{path}") as vmm:
            with self.connect(path) as client:
                assert "in use" in refused("run", guest, "--serial", f"unix:{path}")
                client.sendall(b"q")
                assert self.receive(client, 1) == b"q"
            assert vmm.finish()[0] == 0
