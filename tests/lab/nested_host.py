"""One run of the lab: a Debian kernel on QEMU's emulated AMD CPU with SVM, so a real kvm_amd host, and a command in it.

What the command leaves in /lab/results comes back. The console (the kernel's) and what the command printed are kept
as files. The machine never outlives this process: QEMU gets SIGKILL when its parent dies.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from guests.linux.cpio import Member, file, folder, write_archive
from pyvmm.errors import HostError
from tests.lab import stock_guest
from tests.lab.debian_kernel import LabKernel, find_kernel
from tests.lab.root_images import REPOSITORY, project_files, system_image, write_squashfs

CPUS = 1
"""Of one lab; for more, several run at once. Two TCG threads hang QEMU 7.2: the kernel patches its own code whenever
a static key of KVM's changes, and the thread that translates the patched bytes at that moment keeps the patch's INT3,
stale, for ever (seen in its registers; x86_emulate_instruction entering asm_exc_int3 without end).
"""
MEMORY = "6G"
"""One test has a guest with memory on both sides of the hole below 4 GiB. Only what is touched is taken."""
RESULTS_SIZE = 64 << 20
BUSYBOX = Path("/bin/busybox")

KERNEL_PARAMETERS = "console=ttyS0 quiet panic=-1 oops=panic nokaslr mitigations=off audit=0 apparmor=0 tsc=reliable"
"""Emulated CPUs: their time stamp counters agree, and nobody attacks them. Warnings stay on the console."""


@dataclass(frozen=True)
class LabRun:
    """How it went: ``status`` is the command's, None if the lab did not get to its end within its time."""

    status: int | None
    seconds: float
    folder: Path
    """Has console.log, output.log and, of a run that came to its end, results/."""

    def output(self) -> str:
        return (self.folder / "output.log").read_text(errors="replace").replace("\r\n", "\n")

    def why_it_failed(self) -> str:
        """The last lines of console and output, for a run without results."""
        console = (self.folder / "console.log").read_text(errors="replace").splitlines()[-15:]
        qemu = (self.folder / "qemu.log").read_text(errors="replace").splitlines()
        errors = [line for line in qemu if "doesn't support requested feature" not in line]
        what = ["the lab did not come to its end; console:", *console, *errors, "output:", self.output()[-3000:]]
        return "\n".join(what)


def initramfs(kernel: LabKernel, command: str) -> bytes:
    """busybox, the modules in their order, the init script, and the command for it."""
    if not BUSYBOX.exists():
        raise HostError("the lab needs /bin/busybox: install busybox-static")
    members: list[Member] = [folder(name) for name in ("bin", "dev", "proc", "sys", "lab", "lab/bin", "lab/modules")]
    members.append(file("bin/busybox", BUSYBOX.read_bytes(), 0o755))
    init = (Path(__file__).parent / "init").read_bytes()
    members += [file("init", init, 0o755), file("lab/init", init, 0o755), file("lab/command", command.encode())]
    members.append(Member("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    members += [file(f"lab/modules/{module.name}", module.read_bytes()) for module in kernel.modules]
    order = "".join(f"{module.name}\n" for module in kernel.modules)
    return write_archive([*members, file("lab/modules/order", order.encode())])


def _qemu(kernel: LabKernel, images: list[Path], work: Path, interactive: bool) -> list[str]:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise HostError("the lab needs qemu-system-x86_64: install qemu-system-x86")
    command = ["setpriv", "--pdeathsig", "KILL", qemu, "-nodefaults", "-no-user-config", "-no-reboot"]
    command += ["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt"]
    command += ["-smp", str(CPUS), "-m", MEMORY, "-display", "none"]
    command += ["-kernel", str(kernel.bzimage), "-initrd", str(work / "initramfs"), "-append", KERNEL_PARAMETERS]
    command += ["-serial", f"file:{work / 'console.log'}"]
    command += ["-serial", "mon:stdio" if interactive else f"file:{work / 'output.log'}"]
    for number, image in enumerate(images):
        writable = "off" if number == 2 else "on"
        command += ["-drive", f"file={image},format=raw,if=none,id=d{number},readonly={writable}"]
        command += ["-device", f"virtio-blk-pci,drive=d{number}"]
    return command


def run_in_lab(command: str, work: Path, deadline: float, interactive: bool = False) -> LabRun:
    """Run the shell ``command`` in the checkout inside a lab; ``work`` takes the logs and results.

    ``deadline``: seconds until the machine is killed. HostError: something the lab needs is missing here.
    """
    (run,) = run_in_labs([command], work, deadline, interactive)
    return run


def run_in_labs(commands: list[str], work: Path, deadline: float, interactive: bool = False) -> list[LabRun]:
    """Each of ``commands`` in a lab of its own, all at once; the logs and results of each are in ``work``/0, 1, ..."""
    kernel = find_kernel()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    system, project = system_image(), work / "project.squashfs"
    stock_guest.prepare(kernel)
    write_squashfs(project_files(), project)
    labs: list[_RunningLab] = []
    try:
        for number, command in enumerate(commands):
            labs.append(_RunningLab(kernel, command, [system, project], work / str(number), interactive))
        return [lab.wait(deadline) for lab in labs]
    finally:
        for lab in labs:
            lab.end()
        project.unlink()


def shell_setup() -> str:
    """What a command in the lab finds: the checkout, its Python, and in which form the lab runs (selection.py)."""
    venv, form = Path(sys.prefix) / "bin", os.environ.get("PYVMM_LAB", "")
    return (
        f"cd {shlex.quote(str(REPOSITORY))}\n"
        f"export PATH={shlex.quote(str(venv))}:$PATH PYVMM_IN_LAB=1 PYVMM_LAB={shlex.quote(form)}\n"
    )


class _RunningLab:
    """A started QEMU and its files."""

    def __init__(self, kernel: LabKernel, command: str, images: list[Path], folder: Path, interactive: bool) -> None:
        folder.mkdir()
        self.folder = folder
        self.results, self.initramfs = folder / "results.tar", folder / "initramfs"
        with self.results.open("wb") as empty:
            empty.truncate(RESULTS_SIZE)
        self.initramfs.write_bytes(initramfs(kernel, shell_setup() + command + "\n"))
        (folder / "output.log").touch()
        (folder / "console.log").touch()
        self.started = time.monotonic()
        with (folder / "qemu.log").open("wb") as warnings:
            self.machine = subprocess.Popen(
                _qemu(kernel, [*images, self.results], folder, interactive),
                stdin=None if interactive else subprocess.DEVNULL, stderr=warnings,
            )  # fmt: skip

    def wait(self, deadline: float) -> LabRun:
        """Until it is off, or ``deadline`` seconds after its start."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.machine.wait(max(0.0, self.started + deadline - time.monotonic()))
        self.end()
        seconds = time.monotonic() - self.started
        return LabRun(_take_results(self.results, self.folder / "results"), seconds, self.folder)

    def end(self) -> None:
        """Kill it if it runs. May be called again."""
        self.machine.kill()
        self.machine.wait(10)
        self.initramfs.unlink(missing_ok=True)


def _take_results(disk: Path, target: Path) -> int | None:
    """Unpack the archive the lab wrote; the command's status, None if there is no whole archive."""
    try:
        with tarfile.open(disk, "r:") as archive:
            archive.extractall(target, filter="data")
        return int((target / "status").read_text())
    except (tarfile.TarError, OSError, ValueError):
        return None
    finally:
        disk.unlink(missing_ok=True)
