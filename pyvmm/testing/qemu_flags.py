"""QEMU's command line, as far as runners of bare-metal test images use it, in terms of ``pyvmm run``.

Source: QEMU's qemu-options.hx. A flag may have one dash or two. What would change what a guest sees and cannot be had
is refused by name; what would not (``-display``, ``-vnc none``, ``-nodefaults``, ``-global``...) is taken silently;
a wish about the CPU's model is taken with a note, since a guest gets the host's CPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pyvmm.errors import ConfigError

_CPUS_SILENT = ("host", "max", "qemu64", "kvm64")
_UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}
DEFAULT_MEMORY = 128 << 20

_IGNORED_WITH_VALUE = ("global", "monitor", "name", "rtc", "boot", "vga", "usbdevice", "D", "d", "mon")
_IGNORED = ("nodefaults", "no-user-config", "enable-kvm", "no-hpet", "no-fd-bootchk", "nographic", "no-reboot")


@dataclass
class QemuRequest:
    """What was asked for. ``query``: a question to answer instead of running (``version``, ``device``...)."""

    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    cpus: int = 1
    memory: int = DEFAULT_MEMORY
    serial: str = "null"
    no_reboot: bool = False
    acpi: bool = True
    testdev: bool = False
    debug_exit: tuple[int, int] | None = None
    query: str | None = None
    notes: list[str] = field(default_factory=list)

    def run_options(self) -> list[str]:
        """The arguments of ``pyvmm run`` besides the image and what concerns its serial port and end."""
        options = ["--smp", str(self.cpus), "--memory", str(self.memory)]
        if self.initrd is not None:
            options += ["--initrd", self.initrd]
        if self.append is not None:
            options += [f"--append={self.append}"]  # with "=": it may begin with a dash
        if self.testdev:
            options += ["--device", "testdev"]
        if not self.acpi:
            options.append("--no-acpi")
        return options


def parse_qemu_flags(arguments: Sequence[str]) -> QemuRequest:
    """ConfigError, one line that names the flag, for what is unknown or cannot be had."""
    request = QemuRequest()
    words = list(arguments)
    serial_given = False
    while words:
        word = words.pop(0)
        flag = word[2:] if word.startswith("--") else word[1:]
        if not word.startswith("-") or not flag:
            raise ConfigError(f"{word}: disk images are not taken here; use -kernel")
        if flag in _IGNORED:
            request.no_reboot |= flag == "no-reboot"
            if flag == "nographic" and not serial_given:
                request.serial = "stdio"
        elif flag == "no-acpi":
            request.acpi = False
        elif flag in ("version", "h", "help"):
            request.query = "version" if flag == "version" else "help"
            return request
        else:
            take = _FLAGS.get(flag)
            if take is None and flag not in _IGNORED_WITH_VALUE:
                raise ConfigError(f"-{flag}: invalid option")
            if not words:
                raise ConfigError(f"-{flag}: requires an argument")
            value = words.pop(0)
            if take is None:
                continue
            if value in ("help", "?") and flag in ("device", "machine", "M", "cpu", "accel"):
                request.query = "machine" if flag == "M" else flag
                return request
            if flag == "serial":
                if serial_given:
                    raise ConfigError(f"-serial {value}: there is one serial port")
                serial_given = True
            take(request, value)
    return request


def _pairs(text: str) -> tuple[str, dict[str, str]]:
    """QEMU's ``first,name=value``; a doubled comma is one in a value."""
    words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
    return words[0], {name: value for name, _, value in (word.partition("=") for word in words[1:])}


def _number(flag: str, text: str, low: int, high: int) -> int:
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}|[0-9]{1,9}", text) is None or not low <= int(text, 0) <= high:
        raise ConfigError(f"-{flag}: {text!r} must be a number from {low} to {high:#x}")
    return int(text, 0)


def _kernel(request: QemuRequest, value: str) -> None:
    request.kernel = value


def _initrd(request: QemuRequest, value: str) -> None:
    request.initrd = value


def _append(request: QemuRequest, value: str) -> None:
    request.append = value


def _smp(request: QemuRequest, value: str) -> None:
    first, pairs = _pairs(value if "=" not in value.split(",")[0] else f",{value}")
    if (unknown := set(pairs) - {"cpus", "sockets", "dies", "cores", "threads", "maxcpus"}) != set():
        raise ConfigError(f"-smp {value}: unknown {sorted(unknown)[0]!r}")
    text = first or pairs.pop("cpus", "")
    parts = [_number("smp", pairs[name], 1, 64) for name in ("sockets", "dies", "cores", "threads") if name in pairs]
    product = 1
    for part in parts:
        product *= part
    request.cpus = _number("smp", text, 1, 64) if text else product
    if request.cpus > 64:
        raise ConfigError(f"-smp {value}: more than 64 CPUs")
    if any(part > 1 for part in parts):
        request.notes.append(f"-smp {value}: the topology is not shown to the guest")


def _memory(request: QemuRequest, value: str) -> None:
    first, pairs = _pairs(value)
    text = first.removeprefix("size=")
    match = re.fullmatch(r"([0-9]{1,12})(?:\.0)?([kKmMgGtT]?)", text)
    if match is None or pairs.keys() - {"slots", "maxmem"}:
        raise ConfigError(f"-m {value}: write a number of MiB, or with K, M, G or T")
    request.memory = int(match[1]) << _UNITS[match[2].lower() or "m"]


def _cpu(request: QemuRequest, value: str) -> None:
    model, *features = value.split(",")
    if model not in _CPUS_SILENT:
        request.notes.append(f"-cpu {model}: the guest gets the host's CPU")
    request.notes.extend(f"-cpu {value}: {feature} is not carried out" for feature in features if feature)


def _serial(request: QemuRequest, value: str) -> None:
    if value in ("stdio", "mon:stdio", "chardev:stdio"):
        request.serial = "stdio"
    elif value in ("null", "none"):
        request.serial = "null"
    elif value.startswith("file:") and len(value) > 5:
        request.serial = value
    else:
        raise ConfigError(f"-serial {value}: stdio, mon:stdio, null, none and file:PATH are taken")


def _machine(request: QemuRequest, value: str) -> None:
    for word in value.split(","):
        name, equals, setting = word.partition("=")
        if name == "accel":
            _accel(request, setting)
        elif name == "acpi":
            request.acpi = setting != "off"
        elif equals and name in ("type", "usb", "graphics", "kernel_irqchip", "kernel-irqchip", "vmport", "hpet"):
            if name.startswith("kernel") and setting != "on":
                raise ConfigError(f"-machine {word}: the interrupt controllers are the kernel's here")
        elif equals or not re.fullmatch(r"pc|q35|pc-(i440fx|q35)-[0-9.]+", word):
            raise ConfigError(f"-machine {word}: is not known here; there is pc")


def _accel(request: QemuRequest, value: str) -> None:
    # A list in the order of preference: kvm:tcg.
    if "kvm" not in value.split(",")[0].split(":"):
        raise ConfigError(f"-accel {value}: pyvmm runs guests on KVM only")


def _device(request: QemuRequest, value: str) -> None:
    name, pairs = _pairs(value)
    if name == "isa-debug-exit":
        port = _number("device isa-debug-exit,iobase", pairs.get("iobase", "0x501"), 0, 0xFFFF)
        size = _number("device isa-debug-exit,iosize", pairs.get("iosize", "0x2"), 1, 4)
        if size == 3:
            raise ConfigError(f"-device {value}: iosize must be 1, 2 or 4")
        request.debug_exit = (port, size)
    elif name in ("pc-testdev", "testdev"):
        request.testdev = True
    else:
        raise ConfigError(f"-device {name}: is not a device that pyvmm-qemu has")


def _display(request: QemuRequest, value: str) -> None:
    if value != "none":
        raise ConfigError(f"-display {value}: there is none; -display none is taken")


def _vnc(request: QemuRequest, value: str) -> None:
    if value != "none":
        raise ConfigError(f"-vnc {value}: there is none; -vnc none is taken")


def _chardev(request: QemuRequest, value: str) -> None:
    kind, _ = _pairs(value)
    if kind not in ("testdev", "null", "file"):  # the old test device's own output, which images print twice anyway
        raise ConfigError(f"-chardev {kind}: is not known here")


_FLAGS: dict[str, Callable[[QemuRequest, str], None]] = {
    "kernel": _kernel,
    "initrd": _initrd,
    "append": _append,
    "smp": _smp,
    "m": _memory,
    "cpu": _cpu,
    "serial": _serial,
    "machine": _machine,
    "M": _machine,
    "accel": _accel,
    "device": _device,
    "display": _display,
    "vnc": _vnc,
    "chardev": _chardev,
}
