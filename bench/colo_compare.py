"""What compare and rewrite cost for each packet: the proxy over traffic of three sides, against plain copies of it.

Traffic is made up here (long connections with short answers, connections of one answer, large answers cut differently
by the two guests, UDP), and recorded: ``recordings/store.pcap.xz``, the demo's Linux service and its clients, made by
``service.py --record``. ``colo_compare.py FILE.pcap GUEST_MAC`` takes another classic pcap file of Ethernet, as
``tcpdump -w`` writes it at the primary's tap. What that guest sent is what both guests send; the secondary's has other
initial sequence numbers where the recording has the SYN.

A packet is one of a client's through the rewriter, or one of the primary's compared and released, with all that the
secondary sent for it rewritten and compared. ``packets_per_second`` is the native core's, ``python`` that of the same
through ``Compare`` and ``Rewriter``, as filters of a card's chain use them. Prints JSON: packets a second of one core,
nanoseconds each, and how many times a copy's.
"""

from __future__ import annotations

import lzma
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from figures import REPOSITORY, document, figure, main, paired_ratio

from pyvmm.errors import ConfigError, HostError
from pyvmm.native import lib
from pyvmm.net.compare import Compare, Mode
from pyvmm.net.filter import Direction, Frame
from pyvmm.net.rewriter import Rewriter

ROUNDS = 15
TARGET = 300_000
NATIVE = REPOSITORY / "pyvmm" / "native"
RECORDING = REPOSITORY / "bench" / "recordings" / "store.pcap.xz"
RECORDED_GUEST = bytes.fromhex("525400c01002")
CLIENT, PRIMARY, SECONDARY = 0, 1, 2
OFFSET = 123_456_789
"""The secondary's initial sequence numbers minus the primary's."""
Record = tuple[int, bytes]

GUEST, PEER = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")
FIN, SYN, ACK = 1, 2, 16


def ip(out: bool, protocol: int, body: bytes) -> bytes:
    ends = (b"\x0a\0\0\1", b"\x0a\0\0\2")
    macs = PEER + GUEST if out else GUEST + PEER
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0)
    return macs + b"\x08\0" + header + b"".join(ends if out else ends[::-1]) + body


def tcp(out: bool, port: int, seq: int, ack: int, flags: int, payload: bytes = b"") -> bytes:
    """With timestamps. Nobody on the way looks at whether a checksum is right."""
    ports = (80, port) if out else (port, 80)
    numbers = (seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 8 << 12 | flags, 500, 0, 0)
    return ip(out, 6, struct.pack(">HHIIHHHHHBBII", *ports, *numbers, 0x0101, 8, 10, 7, 7) + payload)


def connection(port: int, requests: int, answer: int) -> Iterator[Record]:
    """Requests of 200 bytes; answers cut at 16 KiB by the primary and at 1448 bytes by the secondary."""
    isn, client = port * 70_001, port * 90_001

    def both(seq: int, ack: int, flags: int, payload: bytes = b"") -> Iterator[Record]:
        for at in range(0, max(len(payload), 1), 16384):
            yield PRIMARY, tcp(True, port, isn + seq + at, client + ack, flags, payload[at : at + 16384])
        for at in range(0, max(len(payload), 1), 1448):
            yield SECONDARY, tcp(True, port, isn + OFFSET + seq + at, client + ack, flags, payload[at : at + 1448])

    def heard(seq: int, ack: int, flags: int, payload: bytes = b"") -> Record:
        return CLIENT, tcp(False, port, client + seq, isn + ack, flags, payload)

    yield CLIENT, tcp(False, port, client, 0, SYN)
    yield from both(0, 1, SYN | ACK)
    yield heard(1, 1, ACK)
    ours, theirs = 1, 1
    for _ in range(requests):
        yield heard(theirs, ours, ACK, b"q" * 200)
        theirs += 200
        yield from both(ours, theirs, ACK, b"a" * answer)
        ours += answer
        yield heard(theirs, ours, ACK)
    yield heard(theirs, ours, FIN | ACK)
    yield from both(ours, theirs + 1, FIN | ACK)
    yield heard(theirs + 1, ours + 1, ACK)


def datagrams(port: int, requests: int) -> Iterator[Record]:
    for number in range(requests):
        payload = struct.pack(">I", number) * 20
        yield CLIENT, ip(False, 17, struct.pack(">HHHH", port, 53, 8 + len(payload), 0) + payload)
        answer = ip(True, 17, struct.pack(">HHHH", 53, port, 8 + len(payload), 0) + payload)
        yield PRIMARY, answer
        yield SECONDARY, answer


def made_up() -> list[Record]:
    """A hundred flows in turns, packet by packet."""
    flows = [connection(1000 + i, 40, 700) for i in range(40)]
    flows += [connection(2000 + i, 1, 300) for i in range(200)]
    flows += [connection(3000 + i, 10, 20_000) for i in range(5)]
    flows += [datagrams(4000 + i, 50) for i in range(20)]
    records: list[Record] = []
    while flows:
        going = []
        for each in flows:
            step = next(each, None)
            if step is not None:
                records.append(step)
                going.append(each)
        flows = going
    return records


def recorded(file: Path, guest: bytes) -> list[Record]:
    """ConfigError if it is no classic pcap file of Ethernet, or has nothing of the guest's."""
    data = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
    order = {b"\xd4\xc3\xb2\xa1": "<", b"\x4d\x3c\xb2\xa1": "<", b"\xa1\xb2\xc3\xd4": ">"}.get(data[:4])
    if order is None or struct.unpack_from(order + "I", data, 20)[0] != 1:
        raise ConfigError(f"{file} is no pcap file of Ethernet; make it with tcpdump -w")
    records: list[Record] = []
    begun: set[bytes] = set()
    at = 24
    while at + 16 <= len(data):
        _, _, size, whole = struct.unpack_from(order + "IIII", data, at)
        frame = data[at + 16 : at + 16 + size]
        at += 16 + size
        if size < whole or not 14 <= len(frame) <= lib.PV_NET_FRAME_MAX:
            continue
        if frame[6:12] != guest:
            records.append((CLIENT, frame))
            continue
        records += [(PRIMARY, frame), (SECONDARY, shifted(frame, begun))]
    if not any(kind == PRIMARY for kind, _ in records):
        raise ConfigError(f"{file} has no frame of {guest.hex(':')}; name the guest's address")
    return records


def shifted(frame: bytes, begun: set[bytes]) -> bytes:
    """With another sequence number, if it is IPv4 TCP of a connection whose SYN was there."""
    size = 14 + (frame[14] & 15) * 4
    if frame[12:14] != b"\x08\0" or frame[23] != 6 or len(frame) < size + 20:
        return frame
    name = frame[26:34] + frame[size : size + 4]
    if frame[size + 13] & SYN:
        begun.add(name)
    if name not in begun:
        return frame
    (seq,) = struct.unpack_from(">I", frame, size + 4)
    return frame[: size + 4] + struct.pack(">I", (seq + OFFSET) & 0xFFFFFFFF) + frame[size + 8 :]


def build(folder: Path) -> Path:
    """The program with both loops, made of the native core's own sources."""
    program = folder / "colo_compare_loop"
    sources = [REPOSITORY / "bench" / "colo_compare_loop.c", *sorted(NATIVE.glob("proxy_*.c"))]
    command = ["gcc", "-O2", "-std=gnu11", f"-I{NATIVE}", *map(str, sources), "-o", str(program), "-lpthread"]
    try:
        subprocess.run(command, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(f"the C loops cannot be built: {error}; run make packages") from None
    return program


def through_python(frames: list[tuple[int, Frame]]) -> float:
    """Seconds of CPU time."""
    compare, rewriter = Compare(), Rewriter()
    compare.set_mode(Mode.HYBRID, 1, 0)
    start = time.thread_time()
    for kind, frame in frames:
        if kind == CLIENT:
            rewriter.rewrite(Direction.RX, frame, 0)
            continue
        if kind == PRIMARY:
            compare.primary(frame, 0)
        else:
            compare.secondary(rewriter.rewrite(Direction.TX, frame, 0), 1, 0)
        compare.release()
    return time.thread_time() - start


def measure_traffic(name: str, records: list[Record]) -> dict[str, Any]:
    """Both loops over one traffic, and the filters' Python."""
    packets = sum(kind != SECONDARY for kind, _ in records)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "traffic"
        file.write_bytes(b"".join(struct.pack("<II", kind, len(frame)) + frame for kind, frame in records))
        command = [str(build(Path(folder))), str(file), str(ROUNDS)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
    rounds = [tuple(map(int, line.split())) for line in lines]
    proxy, copy = ([each[side] / packets for each in rounds] for side in (0, 1))
    frames = [(kind, Frame(bytes(lib.PV_NET_HEADER), frame)) for kind, frame in records]
    python = [packets / through_python(frames) for _ in range(ROUNDS)]
    rate = figure([1e9 / each for each in proxy], "packets/s", 0)
    return {
        "traffic": f"{name}: {len(records)} frames in {packets} packets",
        "packets_per_second": rate,
        "python": figure(python, "packets/s", 0),
        "proxy": figure(proxy, "ns"),
        "copy": figure(copy, "ns"),
        "ratio": paired_ratio(proxy, copy),
        "released": {
            "of": sum(kind == PRIMARY for kind, _ in records), "value": rounds[0][2], "checkpoint_due": rounds[0][3],
        },
        "target": {"packets_per_second_at_least": TARGET, "value": rate.median, "met": rate.median >= TARGET},
    }  # fmt: skip


def measure() -> dict[str, Any]:
    """What was named, or both that there are."""
    if len(sys.argv) == 3:
        guest = bytes.fromhex(sys.argv[2].replace(":", ""))
        traffics = {"recorded": measure_traffic(sys.argv[1], recorded(Path(sys.argv[1]), guest))}
    else:
        traffics = {
            "recorded": measure_traffic(RECORDING.name, recorded(RECORDING, RECORDED_GUEST)),
            "made_up": measure_traffic("made up", made_up()),
        }
    return document(
        what="compare and rewrite, one thread, CPU time",
        against="a C loop that copies the same frames",
        **traffics,
    )


if __name__ == "__main__":
    main(measure)
