"""The whole way: Linux from a disk on a named network, serving files of another disk over TCP to a client beside it."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import subprocess
from pathlib import Path

import pytest

from pyvmm.net.bridge import attach
from tests.framework.net_commands import net, networks
from tests.framework.ping import ping
from tests.framework.processes import PYVMM
from tests.framework.topology import Namespace, Topology
from tests.linux.conftest import BOOT_DEADLINE

pytestmark = [pytest.mark.linux, pytest.mark.net, pytest.mark.timeout(BOOT_DEADLINE * 3 + 60)]

GUEST, HOST = "10.91.0.2", "10.91.0.1"
COMMANDS = (
    f"ping -c 2 {HOST}",
    "hostname; ifconfig eth0",
    "mkdir /tmp/www && mount -t ext4 /dev/vda /tmp/www && httpd -h /tmp/www && cat /proc/mounts | head -1",
    # Until the host says that its client has seen enough.
    f"nc {HOST} 7",
    "cd /tmp/www; for n in 1 2; do cat big big big | head -c $((n * 70001)) > out$n; done;"
    " sync; sha256sum out1 out2; cd /; killall httpd; until umount /tmp/www 2>/dev/null; do usleep 100000; done",
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
            child = host.start(PYVMM, "linux", "--net", "demo", "--name", "box", "--root", "disk",
                               "--disk", image, *arguments)  # fmt: skip
            try:
                waiting, (address, _) = server.accept()
            except TimeoutError:
                child.kill()
                pytest.fail(f"the guest did not come up: {child.communicate(timeout=10)}")
            with waiting:
                assert address == GUEST
                (vm,) = networks(host)["demo"]["vms"]
                assert (vm["vm"], vm["tap"], vm["state"]) == ("box", "vm-box", "connected")
                assert host.call(lambda: ping(GUEST, 60)) is not None
                assert get(client, "/hello") == (200, b"hello from the guest's disk\n")
                assert get(client, "/big") == (200, big)
                assert get(client, "/missing")[0] == 404
        out, err = child.communicate(timeout=BOOT_DEADLINE)
        assert child.returncode == 0, err
        assert networks(host)["demo"]["vms"] == []
        net(host, "down", "demo", "--force")
    text = out.decode()
    said = text.splitlines()
    assert "2 packets transmitted, 2 packets received" in text
    assert "box" in said and vm["mac"].upper() in text
    assert ["/dev/root", "/", "erofs"] in [line.split()[:3] for line in said]
    # A clean file system, and in it what the guest said it wrote.
    subprocess.run(["e2fsck", "-f", "-n", image], check=True, capture_output=True, timeout=30)
    for number in (1, 2):
        dump = subprocess.run(["debugfs", "-R", f"cat out{number}", image], check=True, capture_output=True, timeout=30)
        assert dump.stdout == (big * 3)[: number * 70001]
        assert f"{hashlib.sha256(dump.stdout).hexdigest()}  out{number}" in said
