"""``pyvmm doctor``: its JSON, its table and its exit, on hosts that are given here instead of measured."""

from __future__ import annotations

import argparse
import json

import pytest

from pyvmm import __version__
from pyvmm.cli import doctor
from pyvmm.errors import EXIT_REFUSED, HostError
from pyvmm.host import profile as profile_module
from pyvmm.host import surroundings
from pyvmm.host.profile import HostProfile
from pyvmm.host.surroundings import Surroundings
from tests.unit.host.conftest import plain_profile

AROUND = Surroundings(
    kvm="yes",
    tap="yes",
    network_namespace="yes",
    bridge="yes",
    nftables="yes",
    memfd="yes",
    cpus=2,
    memory_total=1 << 30,
    memory_available=1 << 29,
    disk_path="/tmp",
    disk_free=1 << 30,
    open_files=1024,
)


def doctor_with(monkeypatch: pytest.MonkeyPatch, found: HostProfile | HostError, *options: str) -> int:
    def load_profile(*, refresh: bool) -> HostProfile:
        assert refresh == ("--refresh" in options)
        if isinstance(found, HostError):
            raise found
        return found

    monkeypatch.setattr(profile_module, "load_profile", load_profile)
    monkeypatch.setattr(surroundings, "look_around", lambda: AROUND)
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", *options])
    return int(args.run(args))


def test_json_of_a_good_host(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_with(monkeypatch, plain_profile(quirks=("emulated-cpl0",)), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"version", "pyvmm", "usable", "error", "profile", "surroundings", "findings"}
    assert (report["version"], report["pyvmm"], report["usable"], report["error"]) == (1, __version__, True, None)
    assert report["profile"]["quirks"] == ["emulated-cpl0"]
    assert report["profile"].keys() == set(HostProfile.__struct_fields__)
    assert report["surroundings"]["cpus"] == 2
    assert all(row.keys() == {"what", "value", "action"} for row in report["findings"])


def test_the_table_shows_every_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert doctor_with(monkeypatch, plain_profile(cpu="[bold]odd[/bold] CPU"), "--refresh") == 0
    table = capsys.readouterr().out
    assert "[bold]odd[/bold] CPU" in table  # the host's words are not markup
    for what in ("kind of host", "CPL 0, long mode", "cost of a port exit", "CPUID masking holds", "quirks", "memory"):
        assert what in table


def test_no_kvm_is_refused_after_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HostError, match="permission denied") as caught:
        doctor_with(monkeypatch, HostError("/dev/kvm: permission denied; join the group"), "--json")
    assert caught.value.exit_status == EXIT_REFUSED
    report = json.loads(capsys.readouterr().out)
    assert (report["usable"], report["profile"]) == (False, None)
    assert report["error"] == "/dev/kvm: permission denied; join the group"


def test_a_kvm_whose_guests_do_not_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = plain_profile(guests_run=False, notes=("long mode: an empty guest ended with shutdown",))
    with pytest.raises(HostError, match="an empty guest ended with shutdown"):
        doctor_with(monkeypatch, broken, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["usable"] is False
    assert report["profile"]["guests_run"] is False
