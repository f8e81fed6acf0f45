"""The kernel's builder, up to the point where make would run for minutes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .scripts import REPOSITORY, load_script

kernel = load_script("kernel-configs/build-kernel")

OPTIONS = st.dictionaries(
    st.from_regex(r"CONFIG_[A-Z0-9_]{1,20}", fullmatch=True),
    st.sampled_from(["y", "n", "0", "16", "0x1000000", '""', '"-tiny"']),
    max_size=12,
)


def text_of(options: dict[str, str]) -> str:
    return "".join(f"# {k} is not set\n" if v == "n" else f"{k}={v}\n" for k, v in options.items())


@given(OPTIONS)
def test_options_are_read_as_kconfig_writes_them(options: dict[str, str]) -> None:
    assert kernel.parse_options("# a comment\n\n" + text_of(options), "x") == options


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("CONFIG_A=y\nCONFIG_A=n\n", "x:2: CONFIG_A is given twice"),
        ("\n\nCONFIG_A\n", "x:3: neither an option nor a comment"),
        ("CONFIG_A =y\n", "x:1: neither"),
        ("A=y\n", "x:1: neither"),
        ("CONFIG_A=\n", "x:1: neither"),
    ],
)
def test_a_bad_line_is_named(text: str, complaint: str) -> None:
    with pytest.raises(kernel.BuildError, match=complaint):
        kernel.parse_options(text, "x")


def test_the_committed_fragment_is_well_formed_and_says_why() -> None:
    text = (REPOSITORY / "kernel-configs/tiny.config").read_text()
    options = kernel.parse_options(text, "tiny.config")
    assert options["CONFIG_64BIT"] == "y" and options["CONFIG_ACPI"] == "n"
    assert sum(line.startswith("# ") and "CONFIG_" not in line for line in text.splitlines()) > len(options) / 4


def test_dropped_options_are_named() -> None:
    wanted = {"CONFIG_A": "y", "CONFIG_B": "n", "CONFIG_C": "16", "CONFIG_GONE": "y", "CONFIG_D": "n"}
    config = {"CONFIG_A": "y", "CONFIG_B": "y", "CONFIG_C": "14", "CONFIG_D": "n"}
    assert kernel.dropped_options(wanted, config) == [
        "CONFIG_B is y, not n",
        "CONFIG_C is 14, not 16",
        "CONFIG_GONE is n, not y",
    ]
    assert kernel.dropped_options({"CONFIG_NEVER": "n"}, {}) == []


@given(OPTIONS, OPTIONS)
def test_the_key_follows_what_decides_the_kernel(one: dict[str, str], two: dict[str, str]) -> None:
    key = kernel.cache_key("6.12-1", "gcc 12", one)
    assert key == kernel.cache_key("6.12-1", "gcc 12", dict(reversed(one.items()))), "the order does not count"
    assert (key == kernel.cache_key("6.12-1", "gcc 12", two)) == (one == two)
    assert len({key, kernel.cache_key("6.12-2", "gcc 12", one), kernel.cache_key("6.12-1", "gcc 13", one)}) == 3


class Builder:
    """build-kernel with a source package and a compiler of the test's own, counting what is really built."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = tmp_path / "cache"
        self.repository = tmp_path / "repository"
        self.fragment = tmp_path / "some.config"
        self.fragment.write_text("# why\nCONFIG_A=y\n# CONFIG_B is not set\n")
        self.config = {"CONFIG_A": "y"}
        self.version = "6.12.1-1"
        self.built = 0
        self.fail = False
        monkeypatch.setenv("PYVMM_CACHE", str(self.cache))
        monkeypatch.setattr(kernel, "REPOSITORY", self.repository)
        monkeypatch.setattr(kernel, "source_version", lambda: self.version)
        monkeypatch.setattr(kernel, "check_tools", lambda: None)
        monkeypatch.setattr(kernel, "run", lambda command: "gcc 12\n")
        monkeypatch.setattr(kernel, "unpack", self.unpack)
        monkeypatch.setattr(kernel.subprocess, "run", self.configure)
        monkeypatch.setattr(kernel, "compile_kernel", self.compile)
        monkeypatch.setattr(kernel, "collect", self.collect)

    def unpack(self, work: Path, log: Any) -> Path:
        (work / "source").mkdir()
        return work / "source"

    def configure(self, command: list[str], *, cwd: Path, **_: Any) -> None:
        (cwd / ".config").write_text("".join(f"{k}={v}\n" for k, v in self.config.items()))

    def compile(self, source: Path, log: Any) -> None:
        log.write(b"  CC      a.o\nerror: no\n")
        if self.fail:
            raise subprocess.CalledProcessError(2, ["make", "-j2"])
        self.built += 1

    def collect(self, source: Path, result: Path) -> None:
        (result / "vmlinux").write_text(f"kernel {self.built}")

    @property
    def folders(self) -> set[str]:
        return {p.name for p in (self.cache / "kernels").iterdir() if p.is_dir() and not p.is_symlink()}

    def kernel(self) -> str:
        return (self.repository / "build/kernel/vmlinux").read_text()


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    return Builder(tmp_path, monkeypatch)


def test_built_once_and_found_again(builder: Builder) -> None:
    kernel.build(builder.fragment)
    kernel.build(builder.fragment)
    assert builder.built == 1 and builder.kernel() == "kernel 1"
    assert (builder.cache / "kernels/current/vmlinux").read_text() == "kernel 1"
    facts = json.loads((builder.repository / "build/kernel/build.json").read_text())
    assert facts["source_version"] == "6.12.1-1" and facts["key"] in builder.folders and facts["seconds"] >= 0
    assert len(builder.folders) == 1, "nothing of the build is left behind"


def test_comments_do_not_build_again_but_options_and_sources_do(builder: Builder) -> None:
    kernel.build(builder.fragment)
    builder.fragment.write_text("# a better reason\nCONFIG_A=y\n# CONFIG_B is not set\n")
    kernel.build(builder.fragment)
    assert builder.built == 1
    builder.fragment.write_text("CONFIG_A=y\n")
    kernel.build(builder.fragment)
    builder.version = "6.12.1-2"
    kernel.build(builder.fragment)
    assert builder.built == 3 and builder.kernel() == "kernel 3" and len(builder.folders) == 3


def test_an_option_that_kconfig_drops_is_an_error(builder: Builder, capsys: pytest.CaptureFixture[str]) -> None:
    builder.config = {"CONFIG_A": "y", "CONFIG_B": "y"}
    assert kernel.main([str(builder.fragment)]) == 1
    assert "some.config: Kconfig did not do as asked: CONFIG_B is y, not n" in capsys.readouterr().err
    assert builder.built == 0 and not builder.folders and not (builder.repository / "build/kernel").exists()


def test_a_failed_build_leaves_its_log_and_nothing_else(
    builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    builder.fail = True
    assert kernel.main([str(builder.fragment)]) == 1
    error = capsys.readouterr().err
    assert "make -j2 failed, see " in error and error.endswith("error: no\n")
    assert not builder.folders
    (log,) = (builder.cache / "kernels").glob("*.failed.log")
    builder.fail = False
    kernel.build(builder.fragment)
    assert builder.built == 1 and not log.exists()


def test_what_a_killed_build_left_is_removed(builder: Builder) -> None:
    wanted = kernel.parse_options(builder.fragment.read_text(), "x")
    key = kernel.cache_key(builder.version, "gcc 12", wanted)
    (builder.cache / f"kernels/.building-{key}/result").mkdir(parents=True)
    (builder.cache / f"kernels/.building-{key}/result/vmlinux").write_text("half")
    kernel.build(builder.fragment)
    assert builder.kernel() == "kernel 1" and builder.folders == {key}


def test_wrong_usage_and_missing_fragment(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        (["a", "b"], "usage: build-kernel"),
        (["--help"], "usage: build-kernel"),
        (["/nonexistent/x.config"], "No such file"),
    ):
        assert kernel.main(arguments) == 1
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1


def test_missing_tools_are_named_by_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.shutil, "which", lambda tool: None if tool in ("flex", "bc", "gcc") else f"/bin/{tool}")
    with pytest.raises(kernel.BuildError, match=r"Debian packages: bc flex gcc libc6-dev libelf-dev$"):
        kernel.check_tools()


def test_a_missing_source_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PACKAGE", "linux-source-0.0")
    with pytest.raises(kernel.BuildError, match=r"linux-source-0\.0 is not installed: install Debian's package"):
        kernel.source_version()


def test_the_callers_make_flags_do_not_reach_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    harmful = {"MAKEFLAGS", "MAKELEVEL", "ARCH", "KCFLAGS", "CROSS_COMPILE"}
    for name in harmful:
        monkeypatch.setenv(name, "x")
    environment = kernel.environment()
    assert "PATH" in environment and not harmful & environment.keys()


def test_pyvmm_looks_where_the_builder_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pyvmm.machine.tiny_linux import cache_folder

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "explicit"))
    for expected in (tmp_path / "explicit", tmp_path / "xdg/pyvmm", tmp_path / ".cache/pyvmm"):
        assert kernel.cache_folder() == cache_folder() == expected
        monkeypatch.delenv("PYVMM_CACHE", raising=False)
        if expected.name == "pyvmm":
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
