"""A session by itself: order, negotiation, out-of-band, and the bounds on what waits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.qmp.json_stream import VALUE_MAX
from pyvmm.qmp.session import UNSENT_MAX, WAITING_MAX, Request, Session

HELLO = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'


class Client:
    """A session whose commands the test answers when it likes; qmp_capabilities is done at once, as by the server."""

    def __init__(self, only: frozenset[str] | None = None) -> None:
        self.started: list[tuple[str, bool, Request]] = []
        self.session = Session(1, self._start, only)

    def _start(self, session: Session, request: Request, oob: bool) -> None:
        assert request.found is not None
        if request.found.name == "qmp_capabilities":
            session.negotiated, session.oob = True, bool(request.arguments)
            session.answered(request, {"return": {}}, oob)
        else:
            self.started.append((request.found.name, oob, request))

    def say(self, text: bytes) -> None:
        self.session.receive(text)

    def finish(self, number: int = 0) -> None:
        name, oob, request = self.started.pop(number)
        self.session.answered(request, {"return": name}, oob)
        self.session.proceed()

    def heard(self) -> list[Any]:
        lines = b""
        while piece := self.session.unsent():
            lines += piece
            self.session.sent(len(piece))
        assert not lines or lines.endswith(b"\r\n")
        return [json.loads(line) for line in lines.splitlines()]

    def errors(self) -> list[str]:
        return [answer["error"]["desc"] for answer in self.heard()]


@pytest.fixture
def client() -> Client:
    made = Client()
    made.say(HELLO)
    assert made.heard() == [{"return": {}}]
    return made


def test_nothing_but_the_negotiation_comes_first_and_it_comes_once() -> None:
    client = Client()
    client.say(b'{"execute":"query-status","id":1}{"execute":"no-such"}{"execute":"qmp_capabilities"}' + HELLO)
    answers = client.heard()
    assert answers[0]["id"] == 1
    assert [answer.get("error", {}).get("class") for answer in answers] == ["CommandNotFound"] * 2 + [
        None, "CommandNotFound"
    ]  # fmt: skip
    assert "Expecting capabilities negotiation" in answers[0]["error"]["desc"]
    assert "Expecting capabilities negotiation" in answers[1]["error"]["desc"]
    assert "already complete" in answers[3]["error"]["desc"]
    assert client.started == []


def test_commands_are_answered_in_their_order_one_at_a_time(client: Client) -> None:
    client.say(b'{"execute":"stop","id":1} {"execute":"cont","id":2} {"oops":1,"id":3} {"execute":"stop"}')
    assert [name for name, _, _ in client.started] == ["stop"]
    client.finish()
    assert [name for name, _, _ in client.started] == ["cont"]
    assert client.heard() == [{"return": "stop", "id": 1}]
    client.finish()
    answers = client.heard()
    assert (answers[0], answers[1]["id"]) == ({"return": "cont", "id": 2}, 3)
    client.finish()
    assert client.heard() == [{"return": "stop"}]


def test_out_of_band_overtakes(client: Client) -> None:
    client.say(b'{"execute":"stop","id":1}{"execute":"cont","id":2}{"exec-oob":"query-status","id":3}')
    assert [(name, oob) for name, oob, _ in client.started] == [("stop", False), ("query-status", True)]
    client.finish(1)
    assert client.heard() == [{"return": "query-status", "id": 3}]
    assert [name for name, _, _ in client.started] == ["stop"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b"[]", "QMP input must be a JSON object"),
        (b"3 ", "QMP input must be a JSON object"),
        (b"{}", "QMP input lacks member 'execute'"),
        (b'{"execute":1}', "QMP input member 'execute' must be a string"),
        (b'{"execute":"stop","foo":1}', "QMP input member 'foo' is unexpected"),
        (b'{"execute":"stop","arguments":3}', "QMP input member 'arguments' must be an object"),
        (b'{"execute":"stop","exec-oob":"x"}', "QMP input member 'execute' clashes with 'exec-oob'"),
        (b'{"execute":"no-such"}', "The command no-such has not been found"),
        (b'{"exec-oob":"no-such"}', "The command no-such has not been found"),
        (b'{"exec-oob":"stop"}', "The command stop does not support OOB"),
    ],
)
def test_mistakes_in_qemus_words(client: Client, text: bytes, error: str) -> None:
    client.say(text)
    assert client.errors() == [error]


def test_without_the_capability_there_is_no_out_of_band() -> None:
    client = Client()
    client.say(b'{"execute":"qmp_capabilities"}{"exec-oob":"query-status"}')
    assert client.heard()[1]["error"]["desc"] == "QMP input member 'exec-oob' is unexpected"


def test_a_client_that_asks_too_much_is_not_read_from(client: Client) -> None:
    client.say(b'{"execute":"stop"}' * (WAITING_MAX + 20))
    assert not client.session.wants_input
    for _ in range(WAITING_MAX + 20):
        client.finish()
    assert client.session.wants_input
    assert len(client.heard()) == WAITING_MAX + 20


def test_a_client_that_does_not_read_is_given_up(client: Client) -> None:
    line = b"x" * 65536
    for _ in range(UNSENT_MAX // len(line)):
        client.session.send_line(line)
    assert client.session.failed is None
    client.session.send_line(line)
    assert client.session.failed == "it does not read"
    assert client.session.unsent() == b"" and not client.session.wants_input


def test_a_message_without_end_ends_the_session(client: Client) -> None:
    client.say(b'{"execute":"' + b"x" * VALUE_MAX)
    assert client.session.failed is not None
    assert client.errors() == ["JSON message size limit exceeded"]


WORDS = st.sampled_from([
    b'{"execute":"stop"}', b'{"execute":"stop","id":', b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"1e99", b" ",
    b'{"exec-oob":"query-status"}', b'"arguments":{"x":1}', b"\\", b"\xff", b"\x00", HELLO, b"'", b"NaN",
])  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS | st.binary(max_size=10), max_size=12))
def test_whatever_comes_has_answers_and_raises_nothing(pieces: list[bytes]) -> None:
    client = Client()
    client.say(HELLO)
    for piece in pieces:
        client.say(piece)
        while client.started:
            client.finish()
    answers = client.heard()
    assert all(set(a) <= {"return", "error", "id"} and ("return" in a) != ("error" in a) for a in answers)


def test_a_client_that_may_give_some_commands_only() -> None:
    client = Client(frozenset({"qmp_capabilities", "query-name"}))
    client.say(HELLO + b'{"execute":"query-name"}')
    client.finish()
    client.heard()
    for way in (b"execute", b"exec-oob"):
        for name in (b"quit", b"query-status", b"no-such-command"):
            client.say(b'{"%s":"%s"}' % (way, name))
            assert client.errors() == [f"The command {name.decode()} is not for this client"]
    assert client.started == []
