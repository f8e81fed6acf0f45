"""``pyvmm diff-run``: where CPU and guest agree, where they cannot, and what is never run natively."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.native_oracle import DATA, DATA_SIZE
from pyvmm.explain.diff_run import DiffRun
from pyvmm.kvm.state import Regs
from tests.framework.processes import pyvmm, refused
from tests.unit.arch.x86.boot.images import Seg, elf

pytestmark = pytest.mark.kvm

# mov rax,0x1234; push; pop; pushfq; pop; add; mov [rdi],rax; cvtsi2sd xmm0,rax; sqrtsd; movups [rdi+16],xmm0; lock xadd
SAME = "48c7c034120000 50 59 9c 5b 4801c8 488907 f2480f2ac0 f20f51c0 0f114710 f0480fc107"


def ran(*arguments: str, status: int) -> list[dict[str, Any]]:
    done = pyvmm("diff-run", "--json", *arguments)
    assert done.returncode == status, (done.stdout, done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_same_on_both_sides() -> None:
    steps = ran("--hex", SAME, status=0)
    assert [step["instruction"].partition(" ")[0] for step in steps] == [
        "mov", "push", "pop", "pushfq", "pop", "add", "mov", "cvtsi2sd", "sqrtsd", "movups", "lock"
    ]  # fmt: skip
    assert steps[0]["changes"] == ["rax=0x1234"]
    assert steps[6]["changes"] == ["[0x20000000]=0x2468"]
    assert any(change.startswith("xmm0=") for change in steps[7]["changes"])
    text = pyvmm("diff-run", "--hex", SAME).stdout.decode()
    assert text.endswith("\n11 instructions, no difference\n") and "!=" not in text


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("31c0 f7f0", "#DE"), ("f4", "#GP"), ("0f0b", "#UD"), ("cc", "#BP"), ("488b042500000000", "#PF at 0x0"),
        ("e460", "#GP"), ("fa", "#GP"), ("48b80000000000000080 488b00", "#GP"), ("0f20c0", "#GP"),
        ("c60425000000105a", "#PF at 0x10000000"),
        ("4831e4 9d", "#PF at 0x0"),
    ],
)  # fmt: skip
def test_exceptions_are_the_same(code: str, end: str) -> None:
    steps = ran("--hex", code, status=0)
    assert steps[-1]["ends"] == {"native": end, "guest": end}


def test_what_cannot_be_the_same() -> None:
    steps = ran("--hex", "0f31 48ffc0", status=1)
    assert "rax" in [line.partition(":")[0] for line in steps[0]["differences"]]
    assert steps[1]["instruction"] == "inc rax"


@pytest.mark.parametrize("code", ["b827000000 0f05", "b814000000 cd80", "0f34"])
def test_system_calls_are_not_made_natively(code: str) -> None:
    last = ran("--hex", code, status=1)[-1]
    assert last["ends"]["native"] == "not run: it would be a system call"
    assert last["ends"]["guest"] is not None


def test_a_loop_ends_at_the_limit_and_one_that_leaves_the_code_there() -> None:
    assert len(ran("--hex", "ebfe", "--steps", "7", status=0)) == 7
    assert len(ran("--hex", "48ffc0 eb10 90 90", status=0)) == 2


def test_registers_data_and_32_bits() -> None:
    steps = ran("--hex", "40 ff07 8b07", "--bits", "32", "--regs", "rax=0xffffffff", "--data", "ff000000", status=0)
    assert [step["changes"][0] for step in steps] == ["rax=0x0", "rflags=0x14", "rax=0x100"]
    assert steps[1]["changes"][1] == "[0x20000000]=0x100"


def test_the_fallback_is_a_third_side() -> None:
    # cmpxchg16b [rdi]; bsf; imul: KVM's emulator lacks some, so pyvmm does them
    steps = ran("--fallback", "--hex", "480fc70f 480fbcc1 480fafc3 0f57c1", "--regs", "rbx=5,rcx=6", status=0)
    assert all(set(step["ends"]) == {"native", "guest", "fallback"} for step in steps)
    assert steps[-1]["instruction"] == "xorps xmm0, xmm1"


_PIECES = [
    "4801d8", "4829c3", "48f7e1", "4821c8", "4809d1", "4831c6", "48d1e0", "48c1c807", "480fafc3", "480fbcc8", "0fc8",
    "480fa3c8", "4893", "480fb6c1", "9c59", "505b", "48890f", "488b07", "480107", "f0480fc11f", "0f58c1", "660fefca",
    "0f1107", "0f1017", "f3480f2cc0", "f2480f2ac8", "dbe3", "d9e8", "d91f", "99", "4898", "f5", "fc", "f8",
]  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(_PIECES), min_size=1, max_size=8),
    st.lists(st.integers(0, (1 << 64) - 1), min_size=4, max_size=4),
    st.binary(max_size=32),
)
def test_any_sequence_is_the_same(pieces: list[str], values: list[int], data: bytes) -> None:
    regs = Regs(rdi=DATA, rsp=DATA + DATA_SIZE - 64, rax=values[0], rbx=values[1], rcx=values[2], rdx=values[3])
    with DiffRun(bytes.fromhex("".join(pieces)), regs, data) as both:
        for step in both.steps():
            undefined = {"480fafc3", "480fbcc8", "48c1c807", "48f7e1", "480fa3c8"}
            assert step.differences == [] or step.code.hex() in undefined, step


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give one of IMAGE and --hex"), (("x", "--hex", "90"), "give one of"), (("--hex", "9"), "hexadecimal"),
        (("--hex", ""), "0 bytes of code"), (("/nowhere",), "No such file"),
        (("--hex", "90", "--regs", "rip=1"), "rip=1"),
        (("--hex", "90", "--regs", "rax=x"), "--regs rax"), (("--hex", "90" * 4097), "4097 bytes"),
        (("--hex", "90", "--data", "00" * 16385), "16385 bytes"), (("--hex", "90", "--steps", "99999"), "--steps"),
    ],
)  # fmt: skip
def test_refused_in_one_line(options: tuple[str, ...], says: str) -> None:
    assert says in refused("diff-run", *options)


def test_an_elf_file_is_told_how_to_become_code(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(elf([Seg(1 << 20, b"\x90")], 1 << 20))
    assert "objcopy -O binary" in refused("diff-run", str(path))
