"""One debugger's conversation: packets in, replies out. It knows the protocol, debugger.py knows the machine.

Source: GDB's manual, appendix E.2 "Packets", E.4 "General Query Packets"; QEMU's additions ``qqemu.*`` as its manual
("GDB usage") tells them. What is not known gets the empty reply, as the protocol wants it. Nothing a client sends is
trusted: numbers are bounded before use, a packet that makes no sense gets ``E.`` and a line for its user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import EFAULT, EINVAL
from typing import TYPE_CHECKING

from pyvmm.errors import PyvmmError
from pyvmm.gdb.breakpoints import Key
from pyvmm.gdb.debugger import Debugger, Motion
from pyvmm.gdb.linear_memory import read_memory, write_memory
from pyvmm.gdb.packets import PACKET_MAX, Decoder, Mark, encode
from pyvmm.gdb.registers import RegisterFile
from pyvmm.gdb.stops import Exited, Stop
from pyvmm.gdb.target_description import TargetDescription
from pyvmm.kvm.state import Sregs
from pyvmm.trace import trace_group

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine

T = trace_group("gdb")

READ_MAX = PACKET_MAX // 2
"""Bytes of memory in one reply; GDB asks again for the rest."""
_RESENDS_MAX = 10
_FEATURES = (
    f"PacketSize={PACKET_MAX:x};qXfer:features:read+;QStartNoAckMode+;vContSupported+;swbreak+;hwbreak+"
)
_STEP_ENABLE, _STEP_NO_IRQ = 1, 2

MonitorCommand = Callable[[str, int], Sequence[str]]


class Refused(Exception):
    """What is replied as ``E.``."""


class SessionEnd(Exception):
    """The client is to be let go."""


class Session:
    """``send`` takes bytes for the client, ``monitor`` carries a ``monitor`` command out for a vCPU."""

    def __init__(
        self,
        machine: Machine,
        debugger: Debugger,
        description: TargetDescription,
        send: Callable[[bytes], None],
        monitor: MonitorCommand,
    ) -> None:
        self._machine = machine
        self._debugger = debugger
        self._description = description
        self._send_bytes = send
        self._monitor = monitor
        self._decoder = Decoder()
        self._acks = True
        self._last_frame = b""
        self._resends = 0
        self._cpu = 0
        self._go_cpu: int | None = None
        self._physical = False

    def receive(self, data: bytes) -> None:
        """Serve what arrived; SessionEnd."""
        for event in self._decoder.feed(data):
            if isinstance(event, bytes):
                if self._acks:
                    self._send_bytes(b"+")
                self._serve(event)
            elif event is Mark.INTERRUPT:
                self._attempt(self._debugger.interrupt)
            elif event is Mark.BAD and self._acks:
                self._send_bytes(b"-")
            elif event is Mark.NACK and self._acks:
                self._resends += 1
                if self._resends > _RESENDS_MAX:
                    raise SessionEnd("it did not understand an answer")
                self._send_bytes(self._last_frame)
            elif event is Mark.ACK:
                self._resends = 0

    def told(self, stop: Stop | Exited) -> None:
        """What a client that waits for the guest gets."""
        if isinstance(stop, Stop):
            self._cpu = stop.cpu
        self._reply(stop.packet())

    def _reply(self, payload: bytes) -> None:
        T.gdb_reply.on and T.gdb_reply(payload[:1000].decode("latin-1"))
        self._last_frame = encode(payload)
        self._send_bytes(self._last_frame)

    def _serve(self, packet: bytes) -> None:
        T.gdb_packet.on and T.gdb_packet(packet[:1000].decode("latin-1"))
        try:
            answer = self._answer(packet)
        except (Refused, PyvmmError) as error:
            # Where data is expected GDB takes "E." for some: these have numbers (GDB shows them as they are).
            answer = b"E%02x" % EFAULT if packet[:1] in b"mxgp" else f"E.{error}".encode()
        except ValueError:
            answer = b"E%02x" % EINVAL if packet[:1] in b"mxgp" else b"E.malformed packet"
        if answer is not None:
            self._reply(answer)

    def _attempt(self, action: Callable[[], None]) -> None:
        """What has no reply of its own: a mistake is shown as the guest's console output."""
        try:
            action()
        except PyvmmError as error:
            self._reply(b"O" + f"pyvmm: {error}\n".encode().hex().encode())

    # -- packets --------------------------------------------------------------------------------

    def _answer(self, packet: bytes) -> bytes | None:
        """The reply, or ``None`` if there is none now."""
        name, rest = packet[:1], packet[1:]
        if name in b"cCsSv" and packet:
            return self._run_packet(packet)
        if self._debugger.running:
            return b"E.the guest runs: interrupt it first"
        if name in b"mMxX" and packet:
            return self._memory_packet(name, rest)
        if name in b"gGpP" and packet:
            with self._machine.standing_still():
                return self._register_packet(name, rest)
        if name in b"zZ" and packet:
            return self._breakpoint_packet(name, rest.decode("ascii"))
        if name == b"?":
            return self._debugger.last_stop.packet()
        if name == b"H":
            return self._choose_thread(rest.decode("ascii"))
        if name == b"T":
            return b"OK" if 0 <= _hex(rest.decode("ascii")) - 1 < len(self._machine.vcpus) else b"E.no such thread"
        if name == b"D":
            self._reply(b"OK")
            raise SessionEnd("it detached")
        if name == b"k":
            self._debugger.kill()
            raise SessionEnd("it killed the guest")
        if name in b"qQ" and packet:
            return self._query(packet)
        return b""

    def _memory_packet(self, name: bytes, rest: bytes) -> bytes:
        where, _, data = rest.partition(b":")
        address, size = (_hex(number) for number in where.decode("ascii").split(","))
        memory = self._machine.memory
        with self._machine.standing_still():
            sregs = self._sregs()
            if name in b"mx":
                found = read_memory(memory, sregs, address, min(size, READ_MAX))
                if not found and size:
                    raise Refused(f"there is no memory at {address:#x}")
                return found.hex().encode() if name == b"m" else b"b" + found
            if name == b"M":
                data = bytes.fromhex(data.decode("ascii"))
            if len(data) != size:
                raise ValueError
            if not write_memory(memory, sregs, address, data):
                raise Refused(f"there is no memory at {address:#x}")
            return b"OK"

    def _sregs(self) -> Sregs | None:
        return None if self._physical else self._machine.vcpus[self._cpu].get_sregs()

    def _register_packet(self, name: bytes, rest: bytes) -> bytes:
        registers = self._description.registers
        file = RegisterFile(self._machine.vcpus[self._cpu])
        if name == b"g":
            return b"".join(file.read(register) for register in registers).hex().encode()
        if name == b"p":
            return file.read(registers[_index(rest, len(registers))]).hex().encode()
        if name == b"P":
            number, _, text = rest.partition(b"=")
            chosen = [registers[_index(number, len(registers))]]
        else:
            text, chosen = rest, registers
        value = bytes.fromhex(text.decode("ascii"))
        if len(value) < sum(register.bits // 8 for register in chosen):
            raise ValueError
        at = 0
        for register in chosen:
            new = value[at : at + register.bits // 8]
            if new != file.read(register):
                file.write(register, new)
            at += len(new)
        return b"OK"

    def _breakpoint_packet(self, name: bytes, rest: str) -> bytes:
        kind, address, size = rest.partition(";")[0].split(",")
        if kind not in "01234" or kind == "3":  # x86 cannot watch reads alone
            return b""
        key = Key(int(kind), _hex(address), _hex(size) if int(kind) > 1 else 1)
        if name == b"Z":
            self._debugger.insert(key, self._cpu)
        else:
            self._debugger.remove(key)
        return b"OK"

    # -- threads and running ----------------------------------------------------------------------

    def _thread(self, text: str) -> int | None:
        """A vCPU; ``None``: all, or any."""
        if text in ("-1", "0", ""):
            return None
        cpu = _hex(text) - 1
        if not 0 <= cpu < len(self._machine.vcpus):
            raise Refused(f"there is no thread {text}")
        return cpu

    def _choose_thread(self, rest: str) -> bytes:
        cpu = self._thread(rest[1:])
        if rest[:1] == "g":
            self._cpu = self._debugger.last_stop.cpu if cpu is None else cpu
        elif rest[:1] == "c":
            self._go_cpu = cpu
        else:
            raise ValueError
        return b"OK"

    def _run_packet(self, packet: bytes) -> bytes | None:
        text = packet.decode("ascii")
        if text == "vCont?":
            return b"vCont;c;C;s;S"
        if text.startswith("vKill"):
            self._debugger.kill()
            return b"OK"
        if text.startswith("v") and not text.startswith("vCont;"):
            return b""
        if self._debugger.running:
            return None
        motions = self._motions(text[6:].split(";")) if text[0] == "v" else self._old_motion(text)
        try:
            self._debugger.go(motions)
        except PyvmmError as error:
            self._reply(b"O" + f"pyvmm: {error}\n".encode().hex().encode())
            return self._debugger.last_stop.packet()
        return None

    def _motions(self, actions: list[str]) -> dict[int, Motion]:
        """Of ``vCont``: for each thread the first action that names it, or all."""
        motions: dict[int, Motion] = {}
        for action in actions:
            what, _, thread = action.partition(":")
            if what[:1] not in ("c", "C", "s", "S"):
                raise ValueError
            cpu = self._thread(thread)
            for index in range(len(self._machine.vcpus)) if cpu is None else [cpu]:
                motions.setdefault(index, Motion.STEP if what[0] in "sS" else Motion.RUN)
        return motions

    def _old_motion(self, text: str) -> dict[int, Motion]:
        """Of ``c``, ``C``, ``s``, ``S``; GDB sends no address with them."""
        if text[0] in "sS":
            return {self._cpu if self._go_cpu is None else self._go_cpu: Motion.STEP}
        return dict.fromkeys(range(len(self._machine.vcpus)), Motion.RUN)

    # -- queries --------------------------------------------------------------------------------

    def _query(self, packet: bytes) -> bytes:
        text = packet.decode("ascii")
        name, _, rest = text.partition(":")
        if name == "qSupported":
            return _FEATURES.encode()
        if name == "QStartNoAckMode":
            self._acks = False
            return b"OK"
        if name == "qXfer" and rest.startswith("features:read:target.xml:"):
            return self._piece(self._description.xml().encode(), rest.rpartition(":")[2])
        if name == "qC":
            return f"QC{self._cpu + 1:x}".encode()
        if name == "qfThreadInfo":
            return b"m" + ",".join(f"{n + 1:x}" for n in range(len(self._machine.vcpus))).encode()
        if name == "qsThreadInfo":
            return b"l"
        if name == "qAttached":
            return b"1"  # so that GDB's quit lets the guest live
        if text.startswith("qThreadExtraInfo,"):
            return self._extra_info(text.partition(",")[2])
        if text.startswith("qRcmd,"):
            return self._carry_out(bytes.fromhex(text.partition(",")[2]).decode("utf-8", "replace"))
        return self._qemu_query(name, rest, text)

    def _qemu_query(self, name: str, rest: str, text: str) -> bytes:
        debugger = self._debugger
        if name == "Qqemu.PhyMemMode" and rest in ("0", "1"):
            self._physical = rest == "1"
            return b"OK"
        if name == "qqemu.PhyMemMode":
            return b"1" if self._physical else b"0"
        if name == "qqemu.sstepbits":
            return f"ENABLE={_STEP_ENABLE:x},NOIRQ={_STEP_NO_IRQ:x}".encode()
        if name == "qqemu.sstep":
            return f"0x{_STEP_ENABLE | (_STEP_NO_IRQ if debugger.block_interrupts else 0):x}".encode()
        if text.startswith("Qqemu.sstep="):
            debugger.block_interrupts = bool(_hex(text.partition("=")[2].removeprefix("0x")) & _STEP_NO_IRQ)
            return b"OK"
        return b""

    def _piece(self, whole: bytes, where: str) -> bytes:
        at, size = (_hex(number) for number in where.split(","))
        piece = whole[at : at + min(size, READ_MAX)]
        return (b"l" if at + len(piece) >= len(whole) else b"m") + piece

    def _extra_info(self, text: str) -> bytes:
        cpu = self._thread(text)
        if cpu is None:
            raise ValueError
        with self._machine.standing_still():
            sregs = self._machine.vcpus[cpu].get_sregs()
        mode = "real mode" if not sregs.cr0 & 1 else f"CPL {sregs.ss.dpl}"
        return f"vCPU {cpu}, {mode}".encode().hex().encode()

    def _carry_out(self, line: str) -> bytes:
        """``monitor LINE``: the output as hexadecimal, in console packets where it is long."""
        lines = self._monitor(line.strip(), self._cpu)
        output = "".join(f"{each}\n" for each in lines).encode()
        for at in range(0, len(output), READ_MAX // 2):
            self._reply(b"O" + output[at : at + READ_MAX // 2].hex().encode())
        return b"OK"


def _hex(text: str) -> int:
    """An unsigned number of at most 64 bits; ValueError."""
    if not 0 < len(text) <= 16 or not all(mark in "0123456789abcdefABCDEF" for mark in text):
        raise ValueError
    return int(text, 16)


def _index(text: bytes, count: int) -> int:
    number = _hex(text.decode("ascii"))
    if number >= count:
        raise Refused(f"there is no register {number}")
    return number
