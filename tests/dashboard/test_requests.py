"""The dashboard of a machine that runs: what it answers, to whom, and what becomes of it and of the guest."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.framework.dashboards import Dashboard, wait_gone
from tests.framework.migrating import Side, dirtier, sides
from tests.framework.processes import Running, refused

pytestmark = [pytest.mark.kvm, pytest.mark.guest]
AT = ("--dashboard", "127.0.0.1:0")
GUEST = dirtier(50, 20, 0)


@pytest.fixture(scope="module")
def shown() -> Iterator[Dashboard]:
    """One that only answers: no test here changes it."""
    with Running("run", *GUEST, *AT, "--sandbox", "on", "--name", "shown") as process:
        yield Dashboard(process)


def test_the_page_needs_nothing_from_elsewhere(shown: Dashboard) -> None:
    link = shown.connection()
    link.request("GET", "/")
    answer = link.getresponse()
    text = answer.read().decode()
    link.close()
    assert answer.status == 200
    policy = answer.getheader("content-security-policy", "")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert set(re.findall(r"https?://[^\"']*", text)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"src=|@import|url\(|innerHTML|localStorage", text) == []
    assert answer.getheader("x-content-type-options") == "nosniff"


def test_the_state_is_that_of_the_machine(shown: Dashboard) -> None:
    state = shown.state()
    assert (state["name"], state["status"], state["memory"]) == ("shown", "running", 32 << 20)
    assert (state["colo"], state["migration"], len(state["cpus"])) == (None, None, 1)
    (region,) = state["heat"]["regions"]
    assert region["size"] == 32 << 20


def test_both_processes_are_confined(shown: Dashboard) -> None:
    shown.state()
    for process in (psutil.Process(shown.process.process.pid), shown.child()):
        for thread in process.threads():
            status = Path(f"/proc/{process.pid}/task/{thread.id}/status").read_text()
            assert "Seccomp:\t2\n" in status, process


@pytest.mark.parametrize("path", [
    "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/page/page.js", "/page.js", "/%00", "/state/",
])  # fmt: skip
def test_there_are_no_files(shown: Dashboard, path: str) -> None:
    assert shown.ask("GET", path)[0] in (404, 307)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "localhost:1", "10.1.2.3:80", "LOCALHOST"])
def test_names_that_cannot_be_somebody_elses(shown: Dashboard, host: str) -> None:
    assert shown.ask("GET", "/", {"Host": host})[0] == 200
    assert shown.ask("GET", "/state", {"Host": host, "Origin": f"http://{host}"})[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "[::1"])
def test_a_name_that_was_rebound(shown: Dashboard, host: str) -> None:
    for path in ("/", "/state", "/events"):
        assert shown.ask("GET", path, {"Host": host})[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1", "file://", ""])
def test_other_pages(shown: Dashboard, origin: str) -> None:
    right = {"X-Pyvmm-Token": shown.token}
    assert shown.ask("GET", "/state", {"Origin": origin})[0] == 403
    assert shown.ask("POST", "/failover", right | {"Origin": origin})[0] == 403


def test_the_button_takes_the_token(shown: Dashboard) -> None:
    assert shown.ask("POST", "/failover")[0] == 403
    for wrong in ("", "x", shown.token[:-1], shown.token + "x", shown.token.swapcase(), "\xff" * 32):
        assert shown.ask("POST", "/failover", {"X-Pyvmm-Token": wrong})[0] == 403
    assert shown.ask("POST", f"/failover?x-pyvmm-token={shown.token}")[0] == 403
    assert shown.ask("POST", "/failover", {"Cookie": f"x-pyvmm-token={shown.token}"})[0] == 403
    link = shown.connection()
    link.putrequest("POST", "/failover")
    for token in (shown.token, "x"):
        link.putheader("X-Pyvmm-Token", token)
    link.endheaders()
    assert link.getresponse().status == 403
    link.close()
    status, why = shown.ask("POST", "/failover", {"X-Pyvmm-Token": shown.token})
    assert (status, "COLO is not configured" in why) == (409, True)


def test_requests_that_are_none(shown: Dashboard) -> None:
    assert shown.ask("PUT", "/")[0] == 405
    assert shown.ask("GET", "/failover")[0] == 405
    assert shown.ask("POST", "/state", {"X-Pyvmm-Token": shown.token})[0] == 405
    assert shown.ask("POST", "/failover", {"X-Pyvmm-Token": shown.token, "Content-Length": "9"})[0] == 413
    assert shown.ask("POST", "/failover", {"X-Pyvmm-Token": shown.token, "Transfer-Encoding": "chunked"})[0] == 413
    long = b"x" * 40_000
    for said in (b"\0" * 100 + b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
                 b"GET http://a/ b HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + long, b"GET /" + long):  # fmt: skip
        with socket.create_connection((shown.host, shown.port), 10) as link:
            link.sendall(said)
            assert link.recv(100).startswith(b"HTTP/1.1 400"), said[:50]
    with socket.create_connection((shown.host, shown.port), 10) as link:
        link.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert link.recv(100).startswith(b"HTTP/1.1 403")


def stream(shown: Dashboard) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    link = shown.connection()
    link.request("GET", "/events")
    return link, link.getresponse()


def test_seventeen_look(shown: Dashboard) -> None:
    links = [stream(shown) for _ in range(16)]
    try:
        assert {answer.status for _, answer in links} == {200}
        for _, answer in links:
            assert answer.readline() == b"retry: 2000\n"
            assert answer.readline() == b"\n"
            assert json.loads(answer.readline().removeprefix(b"data: "))["name"] == "shown"
        assert shown.ask("GET", "/events")[0] == 503
        assert shown.ask("GET", "/state")[0] == 503
        assert shown.ask("GET", "/")[0] == 200
        gone, answer = links.pop()
        answer.close()
        gone.close()
        deadline = time.monotonic() + 5
        while shown.ask("GET", "/state")[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        for link, answer in links:
            answer.close()
            link.close()


def test_the_vmm_is_killed_and_nothing_is_left(tmp_path: Path) -> None:
    with Running("run", *GUEST, *AT) as process:
        shown = Dashboard(process)
        link, answer = stream(shown)
        child = shown.child()
        process.process.send_signal(signal.SIGKILL)
        wait_gone(child)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
        link.close()
        with pytest.raises(ConnectionRefusedError):
            shown.ask("GET", "/")


def test_who_looks_is_told_that_it_has_ended() -> None:
    with Running("run", *dirtier(50, 20, 20), *AT) as process:
        shown = Dashboard(process)
        link, answer = stream(shown)
        said = b""
        while piece := answer.readline():
            said = piece if piece.startswith(b"data: ") else said
        link.close()
        status, _, problems = process.finish()
        assert (status, problems) == (0, b"")
        assert json.loads(said.removeprefix(b"data: "))["status"] == "ended"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_guest_goes_on_without_a_dashboard(tmp_path: Path, how: signal.Signals) -> None:
    with sides(tmp_path) as start:
        side: Side = start("one", *dirtier(50, 20, 20), *AT)
        shown = Dashboard(side)
        shown.state()
        child = shown.child()
        child.send_signal(how)
        status, output, problems = side.end()
        assert (status, problems) == (0, "")
        assert b"round 20:" in output
        wait_gone(child)


def test_it_ends_with_the_machine_and_takes_its_socket_along(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("correct-horse-battery\n")
    path = tmp_path / "web"
    options = ("--dashboard", f"unix:{path}", "--dashboard-token", str(token), "--sandbox", "on")
    with sides(tmp_path) as start:
        side: Side = start("one", *GUEST, *options)
        assert side.status() == "running"
        (child,) = psutil.Process(side.process.pid).children()
        assert post(path, "wrong-horse-battery") == 403
        assert post(path, "correct-horse-battery") == 409
        side.qmp.execute("quit")
        status, _, problems = side.finish()
        assert (status, problems.decode()) == (0, f"pyvmm: dashboard at unix:{path}\n")
        wait_gone(child)
        assert not path.exists()


def post(path: Path, token: str) -> int:
    """The status of an answer at a unix socket."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(10)
        link.connect(str(path))
        link.sendall(f"POST /failover HTTP/1.1\r\nHost: localhost\r\nX-Pyvmm-Token: {token}\r\n\r\n".encode())
        return int(link.recv(100).split()[1])


def test_what_cannot_be(tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    short.write_text("secret")
    long.write_text("x" * 4000)
    guest = ("run", *GUEST)
    assert "write HOST:PORT or unix:PATH" in refused(*guest, "--dashboard", "here")
    assert "--dashboard tcp:h:x" in refused(*guest, "--dashboard", "h:x")
    assert "goes with --dashboard" in refused(*guest, "--dashboard-token", str(short))
    for file, why in ((short, "has to hold"), (long, "has to hold"), (tmp_path, "has to be a file"),
                      (tmp_path / "none", "No such file"), ("/dev/zero", "has to be a file")):  # fmt: skip
        assert why in refused(*guest, *AT, "--dashboard-token", str(file))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        assert "already in use" in refused(*guest, "--dashboard", where)
