"""Every error pyvmm raises on purpose.

::

    PyvmmError                 one clear line for the user; exit status 125
    +-- ConfigError            an option, a size, a file that pyvmm's own configuration names is wrong
    +-- ImageError             a kernel, initrd or guest image is unreadable, truncated, absurd
    +-- HostError              the host lacks something (says what, and the remedy)
    |   +-- KvmError           a KVM ioctl failed (names the ioctl and the errno)
    +-- GuestMemoryError       a guest-physical address outside guest memory
    +-- BusError               a device claims a range that another one has
    +-- StateError             an operation that the current run state does not allow
    |   +-- SectionError       saved state that does not fit (names section and field)
    +-- DeadlineError          something that had a deadline did not happen in time
    +-- ChannelError           a connection to a peer is of no use any more
    +-- UnknownInstructionError
                               the instruction fallback does not know an instruction (the guest ends, status 126)

Anything else that escapes is a defect of pyvmm and keeps its traceback.
"""

from __future__ import annotations

import errno as _errno
import os

EXIT_TIMEOUT = 124
EXIT_REFUSED = 125
EXIT_GUEST_CRASHED = 126


class PyvmmError(Exception):
    """Base of all deliberate errors. ``str()`` is one line that names the thing and the remedy."""

    exit_status = EXIT_REFUSED


class ConfigError(PyvmmError):
    """The configuration is wrong: an option, a size, a combination."""


class ImageError(PyvmmError):
    """An image cannot be used. ``path`` and ``field`` name the culprit."""

    def __init__(self, path: str | os.PathLike[str], field: str, problem: str) -> None:
        self.path = os.fspath(path)
        self.field = field
        self.problem = problem
        super().__init__(f"{self.path}: {field}: {problem}")


class HostError(PyvmmError):
    """The host lacks something pyvmm needs; the message ends with the remedy."""


class KvmError(HostError):
    """A KVM ioctl failed. ``name`` is the ioctl, ``errno`` the reason the kernel gave."""

    def __init__(self, name: str, errno: int, hint: str = "") -> None:
        self.name = name
        self.errno = errno
        code = _errno.errorcode.get(errno, str(errno))
        text = f"{name} failed: {code} ({os.strerror(errno)})"
        super().__init__(f"{text}; {hint}" if hint else text)


class GuestMemoryError(PyvmmError):
    """An access of ``size`` bytes at guest-physical ``gpa`` is not inside guest memory."""

    def __init__(self, gpa: int, size: int, what: str = "access") -> None:
        self.gpa = gpa
        self.size = size
        super().__init__(f"{what} of {size} bytes at GPA {gpa:#x} is outside guest memory")


class BusError(PyvmmError):
    """A device claims a range of a bus that is not free or not possible."""


class StateError(PyvmmError):
    """The operation is not allowed in the current run state."""


class SectionError(StateError):
    """Saved state does not fit; names the section and the field."""

    def __init__(self, section: str, field: str, problem: str) -> None:
        self.section = section
        self.field = field
        self.problem = problem
        super().__init__(f"section {section!r}: {field}: {problem}")


class DeadlineError(PyvmmError):
    """Something that had a deadline did not happen in time."""


class ChannelError(PyvmmError):
    """A connection ended, stalled, or carried something that cannot be right."""


class UnknownInstructionError(PyvmmError):
    """The instruction fallback cannot carry out ``code`` found at guest-virtual ``rip``."""

    exit_status = EXIT_GUEST_CRASHED

    def __init__(self, rip: int, code: bytes, text: str) -> None:
        self.rip = rip
        self.code = code
        self.text = text
        super().__init__(f"unknown instruction at {rip:#x}: {text} [{code.hex(' ')}]")
