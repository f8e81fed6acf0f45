"""``--virtconsole``, ``--balloon`` and ``--vsock``."""

from __future__ import annotations

import argparse

import pytest

from pyvmm.cli.device_options import add_device_options, devices_of
from pyvmm.errors import ConfigError
from pyvmm.machine.device_config import BalloonConfig, ConsoleConfig, DeviceConfig, VsockConfig


def devices(*words: str) -> tuple[DeviceConfig, ...]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_device_options(parser)
    return devices_of(parser.parse_args(words))


def test_what_is_asked_for_is_there() -> None:
    assert devices("--vsock", "7,unix:/a,b:c", "--balloon", "target=32M", "--virtconsole", "unix:x") == (
        ConsoleConfig(path="x"), BalloonConfig(target=32 << 20), VsockConfig(cid=7, path="/a,b:c"),
    )  # fmt: skip
    assert devices("--balloon") == (BalloonConfig(target=0),)
    assert devices() == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--virtconsole", "x"], "--virtconsole 'x': write unix:PATH"),
     (["--virtconsole", "unix:"], "write unix:PATH"),
     (["--balloon", "image.elf"], "--balloon 'image.elf': write --balloon target=SIZE"),
     (["--balloon", "target=1X"], "--balloon target '1X'"),
     (["--balloon", "target=1M,size=2"], "unknown 'size'"),
     (["--vsock", "3"], "--vsock 3, '': write unix:PATH"),
     (["--vsock", "x,unix:p"], "--vsock 'x': write a number"),
     (["--vsock", "2,unix:p"], "--vsock 2: a guest's CID is 3 to"),
     (["--vsock", "4294967295,unix:p"], "--vsock '4294967295'")],
)  # fmt: skip
def test_what_makes_no_sense_is_one_clear_line(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        devices(*words)
    assert said in str(caught.value) and "\n" not in str(caught.value)
