"""Image files: opening them safely, reading them within bounds, and telling what they are.

Files are read with ``pread`` into one reused staging buffer rather than mapped: a file that shrinks while
it is mapped ends the process with SIGBUS, where a short read is an error that can be named. The buffer
stays warm in the cache, so the second copy costs next to nothing beside the first touch of guest memory.
"""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Iterator
from types import TracebackType

from pyvmm.arch.x86.boot.payload import compression_of
from pyvmm.errors import ImageError
from pyvmm.memory.guest_memory import GuestMemory

_STAGING = 1 << 20

MULTIBOOT_SEARCH = 8192
"""The Multiboot header lies within the first 8192 bytes (Multiboot 0.6.96, section 3.1)."""
MULTIBOOT_MAGIC = 0x1BADB002

class ImageKind(enum.Enum):
    """What a file looks like from its first bytes."""

    ELF = "elf"
    BZIMAGE = "bzimage"
    MULTIBOOT = "multiboot"
    """A Multiboot 1 header, in an ELF file or in one that gives its own load addresses."""
    FLAT = "flat"


class ImageFile:
    """A regular, non-empty file opened for reading. Every failure is an ImageError naming ``what`` it was for."""

    def __init__(self, path: str, what: str = "image") -> None:
        self.path = path
        self._fd = -1
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._fd)
        except FileNotFoundError:
            raise ImageError(path, what, "no such file") from None
        except PermissionError:
            raise ImageError(path, what, "permission denied; make it readable for this user") from None
        except (OSError, ValueError) as error:
            self.close()
            raise ImageError(path, what, f"cannot be opened: {error}") from None
        self.size = status.st_size
        problem = ""
        if stat.S_ISDIR(status.st_mode):
            problem = "is a directory; name the file in it"
        elif not stat.S_ISREG(status.st_mode):
            problem = "is not a regular file"
        elif self.size == 0:
            problem = "is empty"
        if problem:
            self.close()
            raise ImageError(path, what, problem)

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, offset: int, size: int, field: str) -> bytes:
        """Exactly ``size`` bytes at ``offset``; an ImageError about ``field`` if the file has less."""
        self._check(offset, size, field)
        pieces = []
        while size:
            try:
                piece = os.pread(self._fd, size, offset)
            except OSError as error:
                raise ImageError(self.path, field, f"cannot be read: {error.strerror}") from None
            if not piece:
                raise ImageError(self.path, field, "the file became shorter while it was read")
            pieces.append(piece)
            offset += len(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def head(self, size: int) -> bytes:
        """The first ``size`` bytes, or all of a shorter file."""
        return self.read(0, min(size, self.size), "image")

    def chunks(self, offset: int, size: int, field: str) -> Iterator[memoryview]:
        """``[offset, offset+size)`` in pieces of up to 1 MiB; each view is only good until the next one."""
        self._check(offset, size, field)
        staging = memoryview(bytearray(min(_STAGING, size)))
        while size:
            view = staging[: min(size, len(staging))]
            try:
                got = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise ImageError(self.path, field, f"cannot be read: {error.strerror}") from None
            if got == 0:
                raise ImageError(self.path, field, "the file became shorter while it was read")
            yield view[:got]
            offset += got
            size -= got

    def copy_to(self, memory: GuestMemory, gpa: int, offset: int, size: int, field: str) -> None:
        """Copy ``[offset, offset+size)`` of the file into guest memory at ``gpa``."""
        for chunk in self.chunks(offset, size, field):
            memory.write(gpa, chunk)
            gpa += len(chunk)

    def _check(self, offset: int, size: int, field: str) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            span = f"bytes {offset:#x}..{offset + size:#x}"
            raise ImageError(self.path, field, f"{span} are beyond the file's end at {self.size:#x} (truncated?)")


def find_multiboot_header(head: bytes) -> int | None:
    """Offset of a Multiboot 1 header (magic, flags, checksum that makes the sum zero) in the file's ``head``.

    It lies, 4-byte aligned, within the first 8192 bytes (Multiboot 0.6.96, 3.1.1).
    """
    magic = MULTIBOOT_MAGIC.to_bytes(4, "little")
    end = min(len(head), MULTIBOOT_SEARCH)
    at = head.find(magic, 0, end)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= end:
            flags = int.from_bytes(head[at + 4 : at + 8], "little")
            checksum = int.from_bytes(head[at + 8 : at + 12], "little")
            if (MULTIBOOT_MAGIC + flags + checksum) & 0xFFFFFFFF == 0:
                return at
        at = head.find(magic, at + 1, end)
    return None


def classify(image: ImageFile) -> ImageKind:
    """What kind of image a file is, from its contents; ImageError if it is none that pyvmm can start.

    A flat image has no magic: a boot sector's signature (0x55 0xAA at 510) or the name ``*.bin`` makes one.
    """
    head = image.head(MULTIBOOT_SEARCH)
    if head[0x202:0x206] == b"HdrS":
        return ImageKind.BZIMAGE
    if find_multiboot_header(head) is not None:
        return ImageKind.MULTIBOOT
    if head.startswith(b"\x7fELF"):
        return ImageKind.ELF
    if (compression := compression_of(head)) is not None:
        raise ImageError(image.path, "magic", f"is a {compression}-compressed file, not a kernel; unpack it first")
    if head.startswith(b"MZ"):  # a bzImage with EFI stub begins so, too, and has its HdrS at 0x202
        raise ImageError(image.path, "magic", "is an EFI/DOS program or a truncated bzImage, not a kernel")
    if head[510:512] == b"\x55\xaa" or image.path.endswith(".bin"):
        return ImageKind.FLAT
    raise ImageError(
        image.path,
        "magic",
        "is not a kernel: neither ELF, bzImage, Multiboot nor a boot sector"
        " (a flat real-mode image needs a name ending in .bin or a load address)",
    )
