"""Errors as QMP sends them: a class that clients may test, and a sentence for people.

Source: qapi/error.json (QapiErrorClass); the sentences are the ones QEMU's clients know.
"""

from __future__ import annotations

import enum
from typing import Any

from pyvmm.errors import PyvmmError


class ErrorClass(enum.Enum):
    """QEMU's error classes."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"
    DEVICE_NOT_FOUND = "DeviceNotFound"
    KVM_MISSING_CAP = "KVMMissingCap"


class QmpError(PyvmmError):
    """A command is refused; ``str()`` is the description sent."""

    def __init__(self, description: str, error_class: ErrorClass = ErrorClass.GENERIC) -> None:
        self.error_class = error_class
        super().__init__(description)

    def document(self) -> dict[str, Any]:
        """The ``error`` member of an answer."""
        return {"class": self.error_class.value, "desc": str(self)}
