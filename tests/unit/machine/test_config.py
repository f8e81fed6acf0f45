"""Sizes, numbers and the checks of the frozen configuration."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.machine.config import DebugExitConfig, MachineConfig, parse_debug_exit, parse_number, parse_size


@pytest.mark.parametrize(
    ("text", "value"),
    [("128M", 128 << 20), ("1G", 1 << 30), ("0x1000", 4096), ("64K", 65536), ("7", 7), ("2GiB", 2 << 30)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "M", "12Q", "-1", "1.5G", "0x", "1e6", "9" * 40, "128 M M", "١M"])
def test_malformed_sizes_name_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_size(text, "--memory")


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_size(text) >= 0


@given(st.integers(0, 1 << 40), st.sampled_from(["", "K", "M", "G", "T"]))
def test_a_printed_size_is_read_back(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit]


def test_numbers_are_bounded() -> None:
    assert parse_number("0xf4", "--debug-exit", maximum=0xFFFF) == 0xF4
    with pytest.raises(ConfigError, match="0xffff"):
        parse_number("0x10000", "--debug-exit", maximum=0xFFFF)


def test_debug_exit_is_port_and_size() -> None:
    assert parse_debug_exit("0x501,4") == DebugExitConfig(0x501, 4)
    assert parse_debug_exit("244") == DebugExitConfig(244, 1)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("memory", 1000, "--memory"),
        ("memory", 4096, "--memory"),
        ("memory", (1 << 30) + 1, "--memory"),
        ("cpus", 0, "--smp"),
        ("cpus", 65, "--smp"),
        ("timeout", 0.0, "--timeout"),
        ("timeout", float("nan"), "--timeout"),
        ("serial", "tcp:1", "--serial"),
        ("serial", "file:", "--serial"),
        ("debug_exit", DebugExitConfig(0xFFFF, 2), "--debug-exit"),
    ],
)
def test_a_wrong_field_names_its_option(field: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        MachineConfig(image="x", **{field: value})
