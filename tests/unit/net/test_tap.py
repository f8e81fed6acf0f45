"""What can be said of taps without one; tests/net has real ones."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError, HostError
from pyvmm.net import tap


@pytest.mark.parametrize("name", ["t", "tap0", "pyvmm-web.1", "fifteen-bytes-x"])
def test_names_of_interfaces(name: str) -> None:
    assert tap.check_name(name) == name


@pytest.mark.parametrize("name", ["", "sixteen-bytes-xx", "äöüäöüäö", "a b", "a/b", "a:b", "tap%d", ".", "..", "a\0b"])
def test_names_that_no_interface_has(name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 15 bytes"):
        tap.check_name(name)


def test_no_clone_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "CLONE_DEVICE", str(tmp_path / "tun"))
    with pytest.raises(HostError, match="modprobe tun"):
        tap.Tap("tap0")


def test_a_clone_device_that_may_not_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match=r"Permission denied; .*run as root"):
        tap.Tap("tap0")
