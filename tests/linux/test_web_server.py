"""The whole way: Linux from a disk, serving files of another disk over TCP to a client in another namespace."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import subprocess
from pathlib import Path

import pytest

from pyvmm.net.bridge import attach
from tests.framework.net_commands import net
from tests.framework.processes import PYVMM
from tests.framework.topology import Namespace, Topology
from tests.linux.conftest import BOOT_DEADLINE

pytestmark = [pytest.mark.linux, pytest.mark.net, pytest.mark.timeout(BOOT_DEADLINE * 3 + 60)]

GUEST, HOST = "10.91.0.2", "10.91.0.1"
COMMANDS = (
    "mkdir /tmp/www && mount -t ext4 /dev/vda /tmp/www && httpd -h /tmp/www && cat /proc/mounts | head -1",
    # Until the host says that its client has seen enough.
    f"nc {HOST} 7",
    "cd /tmp/www; for n in 1 2 3; do for i in 1 2 3 4 5 6 7 8; do cat big; done | head -c $((n * 70001)) > out$n; done;"
    " sync; sha256sum out1 out2 out3; cd /; killall httpd; until umount /tmp/www 2>/dev/null; do usleep 100000; done",
)


def filesystem(folder: Path, content: dict[str, bytes]) -> Path:
    source, image = folder / "content", folder / "disk.img"
    source.mkdir()
    for name, data in content.items():
        (source / name).write_bytes(data)
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-d", source, image], check=True, timeout=30)
    return image


def get(client: Namespace, path: str) -> tuple[int, bytes]:
    def inside() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(GUEST, 80, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()

    return client.call(inside)


def test_a_client_gets_files_and_the_host_finds_what_the_guest_wrote(tmp_path: Path) -> None:
    big = os.urandom(50_000)
    image = filesystem(tmp_path, {"hello": b"hello from the guest's disk\n", "big": big})
    with Topology() as topology:
        host, client = topology.namespace("host"), topology.namespace("client")
        net(host, "up", "demo")
        topology.veth((host, "port", None), (client, "eth0", "10.91.0.200/24"))
        host.call(lambda: attach("port", "pvm-demo"))
        with host.call(lambda: socket.create_server((HOST, 7))) as server:
            server.settimeout(1.5 * BOOT_DEADLINE)
            arguments = [word for command in COMMANDS for word in ("--exec", command)]
            child = host.start(PYVMM, "linux", "--net", "demo", "--root", "disk", "--disk", image, *arguments)
            try:
                waiting, _ = server.accept()
            except TimeoutError:
                child.kill()
                pytest.fail(f"the guest did not come up: {child.communicate(timeout=10)}")
            with waiting:
                assert get(client, "/hello") == (200, b"hello from the guest's disk\n")
                assert get(client, "/big") == (200, big)
                assert get(client, "/missing")[0] == 404
        out, err = child.communicate(timeout=BOOT_DEADLINE)
        assert child.returncode == 0, err
        net(host, "down", "demo", "--force")
    said = out.decode().splitlines()
    assert said[0].split()[:3] == ["/dev/root", "/", "erofs"]
    # A clean file system, and in it what the guest said it wrote.
    subprocess.run(["e2fsck", "-f", "-n", image], check=True, capture_output=True, timeout=30)
    for number in (1, 2, 3):
        dump = subprocess.run(["debugfs", "-R", f"cat out{number}", image], check=True, capture_output=True, timeout=30)
        assert dump.stdout == (big * 8)[: number * 70001]
        assert f"{hashlib.sha256(dump.stdout).hexdigest()}  out{number}" in said
