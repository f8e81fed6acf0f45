"""QEMU's flags in terms of ``pyvmm run``; unittests.cfg; the shim's answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.cli import qemu_shim
from pyvmm.errors import ConfigError
from pyvmm.testing.qemu_flags import QemuRequest, parse_qemu_flags
from pyvmm.testing.suite_file import read_suite, suite_jobs

RUNNER = (
    "--no-reboot -nodefaults -global kvm-pit.lost_tick_policy=discard -device pc-testdev"
    " -device isa-debug-exit,iobase=0xf4,iosize=0x4 -vnc none -serial stdio -machine accel=kvm"
    " -kernel x86/apic.flat -initrd /tmp/env -smp 2 -cpu max"
)


def test_what_a_runner_gives() -> None:
    assert parse_qemu_flags([*RUNNER.split(), "-append", "-x one,two"]) == QemuRequest(
        kernel="x86/apic.flat", initrd="/tmp/env", append="-x one,two", cpus=2, serial="stdio", no_reboot=True,
        testdev=True, debug_exit=(0xF4, 4),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("-smp 3", "cpus", 3),
        ("-smp cpus=4", "cpus", 4),
        ("-smp 4,sockets=2,cores=2", "cpus", 4),
        ("-smp sockets=2,cores=3", "cpus", 6),
        ("-m 256", "memory", 256 << 20),
        ("-m 2G", "memory", 2 << 30),
        ("-m size=1024k,slots=2", "memory", 1 << 20),
        ("-serial mon:stdio", "serial", "stdio"),
        ("-serial file:x.log", "serial", "file:x.log"),
        ("-display none", "serial", "null"),
        ("-nographic", "serial", "stdio"),
        ("-serial null -nographic", "serial", "null"),
        ("-device testdev,chardev=testlog -chardev testdev,id=testlog", "testdev", True),
        ("-device isa-debug-exit", "debug_exit", (0x501, 2)),
        ("-machine pc,accel=kvm:tcg", "cpus", 1),
        ("-M q35 -accel kvm -enable-kvm", "cpus", 1),
        ("-machine pc,acpi=off", "acpi", False),
        ("-version", "query", "version"),
        ("-machine help", "query", "machine"),
        ("-cpu ?", "query", "cpu"),
        ("-device ?", "query", "device"),
        ("-cpu qemu64", "notes", []),
        ("-cpu max,-vmx", "notes", ["-cpu max,-vmx: -vmx is not carried out"]),
        ("-cpu Haswell", "notes", ["-cpu Haswell: the guest gets the host's CPU"]),
    ],
)
def test_single_flags(flags: str, field: str, value: object) -> None:
    assert getattr(parse_qemu_flags(flags.split()), field) == value


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("-machine accel=tcg", "tcg"),
        ("-accel tcg,thread=multi", "-accel"),
        ("-machine microvm", "microvm"),
        ("-frobnicate", "-frobnicate: invalid option"),
        ("-kernel", "-kernel: requires an argument"),
        ("disk.img", "disk.img"),
        ("-smp 0", "-smp"),
        ("-smp 65", "-smp"),
        ("-smp many=2", "many"),
        ("-smp sockets=64,cores=64", "CPUs"),
        ("-m lots", "-m lots"),
        ("-device e1000", "e1000"),
        ("-device isa-debug-exit,iosize=3", "iosize"),
        ("-device isa-debug-exit,iobase=0x10000", "iobase"),
        ("-serial tcp::1234", "-serial"),
        ("-serial stdio -serial null", "one serial port"),
        ("-display gtk", "-display"),
        ("-vnc :0", "-vnc"),
        ("-machine kernel_irqchip=split", "kernel_irqchip"),
        ("-qmp unix:x", "-qmp"),
    ],
)
def test_what_cannot_be_had_is_named(flags: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        parse_qemu_flags(flags.split())
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["-smp", "-m", "-cpu", "-device", "-machine", "-serial", "-append", "-accel", "-", "--"]),
            st.text(max_size=12),
            st.sampled_from(["isa-debug-exit,iobase=9", "accel=kvm", "4,cores=2", "1.0", "=,=", ",", "cpus="]),
        ),
        max_size=6,
    )
)
def test_any_command_line_is_taken_or_refused(words: list[str]) -> None:
    try:
        request = parse_qemu_flags(words)
    except ConfigError:
        return
    assert 1 <= request.cpus <= 64
    assert request.memory >= 0


def test_the_shim_answers_what_runners_ask(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, wanted in (
        ("-device ?", '"pc-testdev"'),
        ("-device help", '"isa-debug-exit"'),
        ("--version", "QEMU emulator version"),
        ("-machine help", "pc"),
        ("-accel help", "kvm"),
        ("-cpu help", "max"),
    ):
        assert qemu_shim.main(flags.split()) == 0
        assert wanted in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["-frobnicate", "", "-machine accel=tcg -kernel x", "-kernel /no/such/file"])
def test_the_shim_refuses_in_one_line_with_qemus_status(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "/no/such" in flags and not Path("/dev/kvm").exists():
        pytest.skip("an image is looked for after /dev/kvm")
    assert qemu_shim.main(flags.split()) == 1
    said = capsys.readouterr().err
    assert said.startswith("pyvmm-qemu: ") and said.count("\n") == 1


# -- unittests.cfg

SUITE = """
# a comment
[apic]
file = apic.flat
smp = 2
extra_params = -cpu max -append 'one two' -m 64
timeout = 30s
arch = x86_64
groups = apic fast

[slow]
file = slow.flat
smp = $MAX_SMP
groups = nodefault

[other]
file = other.flat
arch = arm64

[tcg]
file = t.flat
accel = tcg

[flags]
file = f.flat
extra_params = -device intel-iommu

[checked]
file = c.flat
check = /sys/module/kvm/parameters/x=Y

[quoted]
file = q.flat
test_args = "a b"
qemu_params = -cpu qemu64,-nx -initrd env
extra_params = \"\"\"-m
32\"\"\"
"""


def test_a_suite(tmp_path: Path) -> None:
    path = tmp_path / "unittests.cfg"
    path.write_text(SUITE)
    jobs = {job.name: job for job in suite_jobs(path, (), 90)}
    assert list(jobs) == ["apic", "other", "tcg", "flags", "checked", "quoted"]
    apic = jobs["apic"]
    assert (apic.image, apic.timeout, apic.skip) == (str(tmp_path / "apic.flat"), 30, "")
    assert apic.options == ("--smp", "2", "--memory", str(64 << 20), "--append=one two", "--device", "testdev")
    for name, why in (("other", "arm64"), ("tcg", "tcg"), ("flags", "intel-iommu"), ("checked", "/sys/module")):
        assert why in jobs[name].skip
    quoted = jobs["quoted"]
    assert "--append=a b" in quoted.options and str(32 << 20) in quoted.options
    assert str(tmp_path / "env") in quoted.options
    assert quoted.notes == ("-cpu qemu64,-nx: -nx is not carried out",)
    assert [job.name for job in suite_jobs(path, ("fast", "slow"), 90)] == ["apic", "slow"]
    with pytest.raises(ConfigError, match="neither a test nor a group 'fsat'"):
        suite_jobs(path, ("fsat",), 90)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("file = x", ":1: neither"), ("[a]\nwhat", ":2: neither"), ("[a]\n[a]", "twice"), ('[a]\nx = """y', "missing")],
)
def test_a_suite_that_is_wrong(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "unittests.cfg"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_suite(path)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["[a]", "[b]", "file = x", "smp = 2", "timeout = 0", 'extra_params = "', "groups = g"]),
            st.text(max_size=20),
        ),
        max_size=8,
    ).map("\n".join)
)
def test_any_suite_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("suite") / "unittests.cfg"
    path.write_bytes(text.encode(errors="replace"))
    try:
        jobs = suite_jobs(path, (), 90)
    except ConfigError as error:
        assert str(path) in str(error)
        return
    assert all(job.timeout > 0 for job in jobs)
