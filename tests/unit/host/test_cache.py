"""The cached profile: kept, found again, and ignored when it is anything but what pyvmm wrote for this boot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.errors import HostError
from pyvmm.host import cache, probes
from pyvmm.host import profile as profile_module
from pyvmm.host.profile import load_profile
from pyvmm.kvm import system
from tests.unit.host.conftest import plain_profile

MUTATED = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_what_was_written_is_read(cache_directory: Path) -> None:
    profile = plain_profile(notes=("ümlaut", "line\nbreak"))
    path = cache.write(profile)
    assert path == str(cache_directory / cache.FILE_NAME)
    assert cache.read() == profile
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(cache_directory).st_mode & 0o777 == 0o700
    assert os.listdir(cache_directory) == [cache.FILE_NAME]


def test_nothing_there(cache_directory: Path) -> None:
    assert cache.read() is None
    assert not cache_directory.exists()


def test_a_second_write_replaces_the_first(cache_directory: Path) -> None:
    cache.write(plain_profile(cpu="old"))
    cache.write(plain_profile(cpu="new"))
    found = cache.read()
    assert found is not None
    assert found.cpu == "new"
    assert os.listdir(cache_directory) == [cache.FILE_NAME]


@MUTATED
@given(data=st.data())
def test_a_damaged_file_is_ignored_or_a_whole_profile(cache_directory: Path, data: st.DataObject) -> None:
    cache.write(plain_profile())
    path = cache_directory / cache.FILE_NAME
    text = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "garbage"]))
    at = data.draw(st.integers(0, len(text) - 1))
    if kind == "cut":
        del text[at:]
    elif kind == "flip":
        text[at] ^= data.draw(st.integers(1, 255))
    elif kind == "insert":
        text[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    else:
        text = bytearray(data.draw(st.binary(max_size=64)))
    path.write_bytes(text)
    os.chmod(path, 0o600)
    found = cache.read()
    # A flip inside a name or number may leave a well-formed profile; anything else must be refused whole.
    assert found is None or (kind in ("flip", "insert") and msgspec.json.encode(found))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"key": {}, "profile": null}',
        b"[" * 100_000,
        b"\xff\xfe",
        b" " * (cache.MAX_SIZE + 1),
    ],
)
def test_not_a_profile_at_all(cache_directory: Path, text: bytes) -> None:
    cache_directory.mkdir(parents=True)
    path = cache_directory / cache.FILE_NAME
    path.write_bytes(text)
    os.chmod(path, 0o600)
    assert cache.read() is None
    cache.write(plain_profile())
    assert cache.read() == plain_profile()


def test_a_missing_field_is_refused(cache_directory: Path) -> None:
    cache.write(plain_profile())
    path = cache_directory / cache.FILE_NAME
    raw = msgspec.json.decode(path.read_bytes())
    del raw["profile"]["quirks"]
    path.write_bytes(msgspec.json.encode(raw))
    assert cache.read() is None


@pytest.mark.parametrize("part", ["boot_id", "pyvmm", "uid", "modules", "format"])
def test_another_key_is_another_profile(
    cache_directory: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    key = cache.cache_key()
    assert part in key
    cache.write(plain_profile())
    assert cache.read() is not None
    monkeypatch.setattr(cache, "cache_key", lambda: key | {part: "another"})
    assert cache.read() is None


def test_another_users_file_is_ignored(cache_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(plain_profile())
    key, uid = cache.cache_key(), os.geteuid()
    monkeypatch.setattr(cache, "cache_key", lambda: key)
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert cache.read() is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_others_may_write_is_ignored(cache_directory: Path, mode: int) -> None:
    cache.write(plain_profile())
    os.chmod(cache_directory / cache.FILE_NAME, mode)
    assert cache.read() is None


def test_a_symbolic_link_is_not_followed(cache_directory: Path, tmp_path: Path) -> None:
    cache.write(plain_profile())
    path = cache_directory / cache.FILE_NAME
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.read() is None


def test_a_fifo_does_not_block(cache_directory: Path) -> None:
    cache_directory.mkdir(parents=True)
    os.mkfifo(cache_directory / cache.FILE_NAME, 0o600)
    assert cache.read() is None


def test_a_directory_in_its_place(cache_directory: Path) -> None:
    (cache_directory / cache.FILE_NAME).mkdir(parents=True)
    assert cache.read() is None
    assert cache.write(plain_profile()) is None
    assert os.listdir(cache_directory) == [cache.FILE_NAME]  # the temporary file is gone


def test_where_nothing_can_be_written_the_next_place_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    places = [str(tmp_path / "file" / "pyvmm"), str(tmp_path / "good" / "pyvmm")]
    monkeypatch.setattr(cache, "directories", lambda: iter(places))
    assert cache.write(plain_profile()) == os.path.join(places[1], cache.FILE_NAME)
    assert cache.read() == plain_profile()
    monkeypatch.setattr(cache, "directories", lambda: iter(places[:1]))
    assert cache.write(plain_profile()) is None


class TestDirectories:
    def test_the_runtime_directory_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert next(cache.directories()) == str(tmp_path / "pyvmm")

    def test_home_is_the_last_resort(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert list(cache.directories())[-1] == str(tmp_path / ".cache" / "pyvmm")

    def test_not_below_another_users_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.setenv(name, str(tmp_path))
        uid = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
        assert not [d for d in cache.directories() if d.startswith(str(tmp_path))]

    @pytest.mark.parametrize("value", ["relative", "", "/nowhere/at/all"])
    def test_a_useless_variable_is_ignored(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert not any("relative" in d or "nowhere" in d for d in cache.directories())


class TestLoadProfile:
    class Closing:
        def __enter__(self) -> TestLoadProfile.Closing:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def test_measured_once_then_cached(self, cache_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        measured = []

        def measure(_: object) -> object:
            measured.append(plain_profile(cpu=f"measured {len(measured)}"))
            return measured[-1]

        monkeypatch.setattr(system, "System", self.Closing)
        monkeypatch.setattr(probes, "measure", measure)
        assert load_profile().cpu == "measured 0"
        assert load_profile().cpu == "measured 0"
        assert load_profile(refresh=True).cpu == "measured 1"
        assert load_profile().cpu == "measured 1"
        assert len(measured) == 2

    def test_half_a_profile_is_not_kept(self, cache_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        results = [plain_profile(notes=("syscall: deadline",)), plain_profile(cpu="whole")]
        monkeypatch.setattr(system, "System", self.Closing)
        monkeypatch.setattr(probes, "measure", lambda _: results.pop(0))
        assert load_profile().notes
        assert load_profile().cpu == "whole"
        assert load_profile().cpu == "whole"

    def test_an_unusable_kvm_is_a_host_error_and_cached_nowhere(
        self, cache_directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse() -> None:
            raise HostError("no KVM here; get one")

        monkeypatch.setattr(system, "System", refuse)
        with pytest.raises(HostError, match="no KVM here"):
            load_profile()
        assert not cache_directory.exists()


def test_loading_from_the_cache_imports_nothing_heavy() -> None:
    assert profile_module.__file__
    code = (
        "import sys; import pyvmm.host.profile, pyvmm.host.cache; pyvmm.host.cache.read();"
        "print([m for m in sys.modules if m.split('.')[0] in"
        " ('rich', 'psutil', 'iced_x86', 'pyroute2', 'cffi', 'json', 'subprocess')"
        " or m in ('pyvmm.native', 'pyvmm.host.probes', 'pyvmm.host.probe_vm')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
