"""Patterns, the --trace option, groups that come later, and threads."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import ConfigError
from pyvmm.trace import all_declared_events, control, trace_group
from pyvmm.trace.backends import Backend, LogBackend
from pyvmm.trace.events import Event, group_events


class Recorder(Backend):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def write(self, event: Event, values: tuple[Any, ...]) -> None:
        self.seen.append((event.name, values))

    def abandon(self) -> None:
        pass


def on(group: str) -> set[str]:
    return {name for name, event in group_events(trace_group(group)).items() if event.on}


def test_every_declared_event_of_the_package_is_found(package: Path) -> None:
    assert sorted(all_declared_events()) == ["disk_read", "net_poll_begin", "net_poll_end", "net_send"]


def test_a_name_declared_in_two_folders_is_refused(package: Path) -> None:
    (package / "net" / "trace-events").write_text('disk_read(void) "again"\n')
    with pytest.raises(ConfigError, match="disk_read"):
        all_declared_events()


def test_an_event_is_off_until_it_is_enabled_and_then_delivered(package: Path) -> None:
    T, recorder = trace_group("net"), Recorder()
    T.net_send(0, 1, "x")
    assert on("net") == set()
    control.enable(["net_send"], recorder)
    assert on("net") == {"net_send"}
    T.net_send(1, 2, "y")
    assert recorder.seen == [("net_send", (1, 2, "y"))]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["net_*"], {"net_send", "net_poll_begin", "net_poll_end"}),
        (["net_*,-net_poll_*"], {"net_send"}),
        (["net_*", "-net_poll_*", "net_poll_end"], {"net_send", "net_poll_end"}),
        (["-net_send", "net_send"], {"net_send"}),
        (["*,-*"], set()),
        (["net_pol?_[be]*"], {"net_poll_begin", "net_poll_end"}),
        ([" net_send , disk_read "], {"net_send"}),
    ],
)
def test_patterns_apply_in_order(package: Path, patterns: list[str], expected: set[str]) -> None:
    trace_group("net")
    control.enable(patterns, Recorder())
    assert on("net") == expected


def test_groups_imported_later_pick_the_patterns_up(package: Path) -> None:
    recorder = Recorder()
    control.enable(["disk_*", "net_send"], recorder)
    assert on("block/disk") == {"disk_read"}
    assert on("net") == {"net_send"}
    control.close_all()
    assert on("net") == on("block/disk") == set()


def test_two_backends_have_their_own_patterns(package: Path) -> None:
    T, one, two = trace_group("net"), Recorder(), Recorder()
    control.enable(["net_send"], one)
    control.enable(["net_*"], two)
    T.net_send(0, 0, "")
    T.net_poll_end(1)
    assert [name for name, _ in one.seen] == ["net_send"]
    assert [name for name, _ in two.seen] == ["net_send", "net_poll_end"]
    control.disable(two)
    T.net_send(0, 0, "")
    assert (len(one.seen), len(two.seen), T.net_poll_end.on) == (2, 2, False)


def test_an_unknown_pattern_is_named_with_near_matches_and_changes_nothing(package: Path) -> None:
    trace_group("net")
    with pytest.raises(ConfigError, match=r"'net_sned'.*near matches: net_send"):
        control.enable(["net_poll_begin", "net_sned"], Recorder())
    with pytest.raises(ConfigError, match=r"'blk_\*'"):
        control.enable(["-blk_*"], Recorder())
    assert on("net") == set()


@pytest.mark.parametrize("patterns", [[], [""], [" , "]])
def test_no_pattern_at_all_is_refused(package: Path, patterns: list[str]) -> None:
    with pytest.raises(ConfigError, match="no pattern"):
        control.enable(patterns, Recorder())


def test_an_undeclared_event_is_an_attribute_error(package: Path) -> None:
    with pytest.raises(AttributeError, match=r"'net_nothing' is not declared in net/trace-events"):
        trace_group("net").net_nothing  # noqa: B018


# -- the option


def test_option_without_file_logs_to_stderr(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    control.enable_from_option("net_send")
    trace_group("net").net_send(1, 255, "z")
    assert stderr.getvalue().endswith("[MainThread] net_send queue 1 gpa 0xff z\n")


def test_option_with_file_and_events_file(package: Path, tmp_path: Path) -> None:
    patterns, out = tmp_path / "patterns", tmp_path / "out"
    patterns.write_text("# what we want\nnet_*\n\n-net_poll_begin  # but not this\n")
    control.enable_from_option(f"disk_read,events={patterns},file={out}")
    assert on("net") == {"net_send", "net_poll_end"}
    trace_group("block/disk").disk_read(7, 512)
    control.close_all()
    assert out.read_text().splitlines()[1].split("\t")[2:] == ["block/disk", "disk_read", "sector 7 bytes 512"]


def test_two_options_with_one_file_share_it(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    control.enable_from_option(f"net_send,file={out},format=log")
    control.enable_from_option(f"disk_read,file={out},format=log")
    with pytest.raises(ConfigError, match="already open with format=log"):
        control.enable_from_option(f"disk_read,file={out}")
    trace_group("net").net_send(0, 0, "a")
    trace_group("block/disk").disk_read(1, 2)
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("", "no pattern"),
        ("file=/dev/null", "no pattern"),
        ("net_sendd", "net_sendd"),
        ("net_send,format=xml", "unknown format 'xml'"),
        ("net_send,format=chrome", "format=chrome needs file="),
        ("net_send,format=simple", "format=simple needs file="),
        ("net_send,fil=x", "unknown option 'fil'"),
        ("net_send,file=", "file= must be given once"),
        ("net_send,file=a,file=b", "file= must be given once"),
        ("net_send,file=/nonexistent/dir/t", "/nonexistent/dir/t: No such file"),
        ("net_send,file=/nonexistent/dir/t,format=log", "/nonexistent/dir/t: No such file"),
        ("net_send,file=/nonexistent/dir/t,format=chrome", "/nonexistent/dir/t: No such file"),
        ("events=/nonexistent/events", "/nonexistent/events: No such file"),
        ("events=/dev/zero", "more than"),
    ],
)
def test_bad_options_are_one_clear_line(package: Path, option: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        control.enable_from_option(option)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistyped_pattern_does_not_destroy_an_old_trace(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace"
    out.write_text("precious")
    with pytest.raises(ConfigError):
        control.enable_from_option(f"net_sendd,file={out}")
    assert out.read_text() == "precious"


# -- threads


@pytest.mark.usefixtures("prompt_switches")
def test_events_from_many_threads_while_patterns_change(package: Path) -> None:
    stream = io.StringIO()
    T, log, stop = trace_group("net"), LogBackend(stream), threading.Event()
    failures: list[BaseException] = []

    def trace() -> None:
        try:
            while not stop.is_set():
                T.net_send.on and T.net_send(1, 2, "thread")
                T.net_poll_end(3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=trace) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        control.enable(["net_*"], log)
        control.disable(log)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    lines = stream.getvalue().splitlines()
    assert all(line.endswith(("net_send queue 1 gpa 0x2 thread", "net_poll_end 3 packets")) for line in lines)


def test_close_all_twice(package: Path, tmp_path: Path) -> None:
    control.enable_from_option(f"net_send,file={tmp_path / 'out'}")
    control.close_all()
    control.close_all()
    trace_group("net").net_send(1, 2, "late")
    assert len((tmp_path / "out").read_text().splitlines()) == 1
