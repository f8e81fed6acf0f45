"""From the start of ``pyvmm linux`` to the first byte its web server sends to a client, part by part.

A named network, a root disk and a second disk with the file, as tests/linux/test_web_server.py has them; the client is
in a namespace of its own and tries to connect all the time. Parts, in seconds of wall-clock time:

load     process start -> the vCPU runs
kernel   -> /init's first line
init     -> the shell that runs the commands
server   -> the disk is mounted and httpd listens (the client's connection is accepted)
answer   -> the first byte of the file
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from figures import PYVMM, REPOSITORY, child_environment, document, figure, main
from linux_boot import running_since

from pyvmm.errors import HostError
from pyvmm.net.bridge import attach

sys.path.insert(0, str(REPOSITORY))
from tests.framework.topology import Namespace, Topology

WHAT = "first byte served over TCP by the tiny Linux"
AGAINST = "nothing: where the time goes"
ROUNDS = 2
DEADLINE = 120.0
GUEST = "10.91.0.2"
PARTS = ("load", "kernel", "init", "server", "answer")
MARKERS = {b"pyvmm: init": "kernel", b"pyvmm: command begin 0": "init"}
COMMAND = "mkdir /tmp/www; mount -t ext4 /dev/vda /tmp/www; httpd -f -h /tmp/www"


def disk(folder: str) -> str:
    content, image = os.path.join(folder, "content"), os.path.join(folder, "disk.img")
    os.mkdir(content)
    Path(content, "hello").write_bytes(b"hello")
    with open(image, "wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-d", content, image], check=True)
    return image


def fetch(client: Namespace, moments: dict[str, float]) -> None:
    """Connect until somebody listens, ask for the file, note when its first byte comes."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        with client.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as sock:
            sock.settimeout(0.5)
            try:
                sock.connect((GUEST, 80))
            except OSError:
                time.sleep(0.05)
                continue
            moments["server"] = time.monotonic()
            sock.settimeout(DEADLINE)
            sock.sendall(b"GET /hello HTTP/1.0\r\n\r\n")
            if sock.recv(1):
                moments["answer"] = time.monotonic()
            return


def serve_once() -> dict[str, float]:
    """One boot: part -> when it was over, in seconds from the process's start."""
    moments: dict[str, float] = {}
    with Topology() as topology, tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        image, trace = disk(folder), os.path.join(folder, "trace")
        host, client = topology.namespace("host"), topology.namespace("client")
        host.run(*PYVMM, "net", "up", "bench", cwd=REPOSITORY)
        topology.veth((host, "port", None), (client, "eth0", "10.91.0.200/24"))
        host.call(lambda: attach("port", "pvm-bench"))
        command = [*PYVMM, "linux", "--net", "bench", "--root", "disk", "--disk", image, "--console", "--exec", COMMAND]
        command += ["--timeout", str(DEADLINE), "--trace", f"run_state_change,file={trace}"]
        start = time.monotonic()
        child = host.start(*command, cwd=REPOSITORY, env=child_environment())
        client_thread = threading.Thread(target=fetch, args=(client, moments))
        client_thread.start()
        assert child.stderr is not None
        for line in child.stderr:
            for marker, part in MARKERS.items():
                if line.startswith(marker):
                    moments.setdefault(part, time.monotonic())
            if "init" in moments:
                break
        client_thread.join(DEADLINE)
        child.terminate()
        child.communicate(timeout=30)
        if "answer" not in moments:
            raise HostError("the guest did not answer")
        moments["load"] = running_since(trace)
    return {part: moment - start for part, moment in moments.items()}


def measure() -> dict[str, Any]:
    """A few boots."""
    runs = [serve_once() for _ in range(ROUNDS)]
    parts = {
        part: figure([run[part] - (run[before] if before else 0.0) for run in runs], "s")
        for before, part in zip((None, *PARTS), PARTS, strict=False)
    }
    return document(
        what=WHAT, against=AGAINST, figures={"whole": figure([run["answer"] for run in runs], "s"), "parts": parts}
    )


if __name__ == "__main__":
    main(measure)
