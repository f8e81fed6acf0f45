"""Tiny flat guests for tests, assembled by hand: 16-bit real mode, loaded at 0x7c00."""

from __future__ import annotations

import struct
from pathlib import Path

HLT_FOREVER = b"\xfa\xf4\xeb\xfc"  # cli; 1: hlt; jmp 1b-1


def out8(port: int, value: int) -> bytes:
    """mov dx, port; mov al, value; out dx, al."""
    return b"\xba" + struct.pack("<H", port) + b"\xb0" + bytes([value]) + b"\xee"


def out16(port: int, value: int) -> bytes:
    """mov dx, port; mov ax, value; out dx, ax."""
    return b"\xba" + struct.pack("<H", port) + b"\xb8" + struct.pack("<H", value) + b"\xef"


def in8(port: int) -> bytes:
    """mov dx, port; in al, dx."""
    return b"\xba" + struct.pack("<H", port) + b"\xec"


def text(message: bytes, port: int = 0xE9) -> bytes:
    """Print ``message`` on the debug console."""
    return b"".join(out8(port, byte) for byte in message)


def image(folder: Path, code: bytes, name: str = "guest.bin") -> str:
    """Write a flat image; its path."""
    path = folder / name
    path.write_bytes(code)
    return str(path)


def out32(port: int, value: int) -> bytes:
    """mov dx, port; mov eax, value; out dx, eax."""
    return b"\xba" + struct.pack("<H", port) + b"\x66\xb8" + struct.pack("<I", value) + b"\x66\xef"


IDLE_FOREVER = b"\xfb\xf4\xeb\xfd"  # sti; 1: hlt; jmp 1b
SPIN = b"\xeb\xfe"  # jmp .
COUNTER = 0x2000
COUNT_FOREVER = b"\x66\xff\x06\x00\x20\xeb\xf9"  # 1: inc dword [COUNTER]; jmp 1b
# lidt [0x3000]; lgdt [0x3000], which is zero: no handlers, no segments; into protected mode; mov ds, ax -> #GP
TRIPLE_FAULT = b"\x0f\x01\x1e\x00\x30\x0f\x01\x16\x00\x30\x0f\x20\xc0\x0c\x01\x0f\x22\xc0\xb8\x28\x00\x8e\xd8"

# 1: mov dx,0x3fd; 2: in al,dx; test al,1; jz 2b; mov dx,0x3f8; in al,dx; out dx,al; cmp al,'q'; jne 1b; cli; hlt
ECHO_UNTIL_Q = b"\xba\xfd\x03\xec\xa8\x01\x74\xfb\xba\xf8\x03\xec\xee\x3c\x71\x75\xef" + HLT_FOREVER
