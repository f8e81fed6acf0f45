"""``pyvmm diff-run IMAGE``: the same user-mode code natively and in a guest, step by step."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pyvmm.errors import ConfigError
from pyvmm.machine.config import parse_number

if TYPE_CHECKING:
    from pyvmm.explain.diff_run import Step
    from pyvmm.kvm.state import Regs

DIFFERENT = 1
STEPS = 200
_ELF = b"\x7fELF"


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "diff-run",
        help="run user-mode code natively and in a guest, and compare each step",
        description="Run flat x86 code at CPL 3 natively (in a child process, by ptrace) and in a guest, one"
        " instruction at a time from the same state, and show what each changed; what differs is marked. Natively,"
        " system calls are not made. Status 0: no difference, 1: there is one. RDI and RSP point to 16 KiB of memory at"
        " 0x20000000.",
    )
    add = parser.add_argument
    add("image", metavar="IMAGE", nargs="?", help="flat code, as of objcopy -O binary; it is at 0x10000000")
    add("--hex", metavar="BYTES", help='code as hexadecimal digits instead: "48 ff c0 0f a2"')
    add("--regs", metavar="NAME=VALUE,...", help="registers before the first step (rax=1,rcx=0x10)")
    add("--data", metavar="BYTES", help="what is in memory at 0x20000000 before it, as hexadecimal digits")
    add("--bits", choices=("64", "32"), default="64", help="64-bit code (default), or 32-bit under a 64-bit kernel")
    add("--steps", metavar="N", help=f"at most N instructions (default {STEPS})")
    add("--fallback", action="store_true",
        help="have pyvmm's own instruction fallback do each as well, as far as it knows them")  # fmt: skip
    add("--json", action="store_true", help="a step is a line of JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: the same everywhere; 1: not."""
    from pyvmm.explain.diff_run import STEPS_MAX, DiffRun

    code = _code(args)
    steps = parse_number(args.steps, "--steps", maximum=STEPS_MAX) if args.steps is not None else STEPS
    data = _bytes(args.data, "--data") if args.data is not None else b""
    number = differences = 0
    with DiffRun(code, _registers(args.regs), data, bits=int(args.bits), fallback=args.fallback) as both:
        for step in both.steps(steps):
            number += 1
            differences += bool(step.differences)
            print(_json(step) if args.json else _text(step), flush=True)
    if not args.json:
        word = "no difference" if not differences else f"{differences} of them with differences"
        print(f"\n{number} instructions, {word}")
    return DIFFERENT if differences else 0


def _code(args: argparse.Namespace) -> bytes:
    if (args.image is None) == (args.hex is None):
        raise ConfigError("diff-run: give one of IMAGE and --hex")
    if args.hex is not None:
        return _bytes(args.hex, "--hex")
    from pyvmm.arch.x86.native_oracle import PAGE

    try:
        with open(args.image, "rb") as file:
            code = file.read(PAGE + 1)
    except OSError as error:
        raise ConfigError(f"{args.image}: {error.strerror}") from None
    if code[:4] == _ELF:
        raise ConfigError(f"{args.image}: is an ELF file; make flat code of it: objcopy -O binary -j .text FILE OUT")
    return code


def _bytes(text: str, option: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ConfigError(f"{option}: {text[:40]!r} are not hexadecimal digits, two for each byte") from None


def _registers(text: str | None) -> Regs:
    from pyvmm.arch.x86.native_oracle import DATA, DATA_SIZE
    from pyvmm.kvm.state import Regs

    regs = Regs(rdi=DATA, rsp=DATA + DATA_SIZE - 0x1000)
    names = [name for name in Regs.__struct_fields__ if name not in ("rip", "rflags")]
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        if name not in names or not equals:
            raise ConfigError(f"--regs {part}: NAME=VALUE, with a name of {', '.join(names)}")
        setattr(regs, name, parse_number(value, f"--regs {name}", maximum=(1 << 64) - 1))
    return regs


def _text(step: Step) -> str:
    line = f"{step.number:5}  {step.address:#x}  {step.code.hex(' '):<24} {step.instruction:<36} "
    return "\n".join([(line + " ".join(step.changes)).rstrip(), *(f"       != {text}" for text in step.differences)])


def _json(step: Step) -> str:
    import msgspec

    found = {
        "number": step.number, "address": step.address, "code": step.code.hex(), "instruction": step.instruction,
        "changes": step.changes, "differences": step.differences,
        "ends": {name: side.end for name, side in step.sides.items()},
    }  # fmt: skip
    return msgspec.json.encode(found).decode()
