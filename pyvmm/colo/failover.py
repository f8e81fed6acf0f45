"""How far a failover is: one variable, changed by compare-and-swap alone.

::

            request()          begin()            complete()
     none ------------> require ------> active ------------> completed
      ^ |                                 | ^                    |
      | +--- (the request stands) --------|-+                    |
      |          relaunch() as one        | defer()              |
      +------------------------------- relaunch                  |
      +----------------------------------------------------------+
                               protect_again()

A failover is asked for by whoever finds the peer gone or is told so: the heartbeat's thread, a broken connection, a
person at the monitor. It is carried out by one thread, the one that owns the VM's replication. While that one loads a
checkpoint the guest's state is half old and half new, so the failover is put off: *relaunch* says that one is wanted
as soon as the checkpoint is whole.
"""

from __future__ import annotations

import enum
import threading

from pyvmm.errors import StateError
from pyvmm.trace import trace_group

T = trace_group("colo")


class FailoverStatus(enum.StrEnum):
    """QEMU's names (qapi/migration.json, FailoverStatus)."""

    NONE = "none"
    REQUIRE = "require"
    ACTIVE = "active"
    COMPLETED = "completed"
    RELAUNCH = "relaunch"


TRANSITIONS = frozenset(
    {
        (FailoverStatus.NONE, FailoverStatus.REQUIRE),
        (FailoverStatus.REQUIRE, FailoverStatus.ACTIVE),
        (FailoverStatus.ACTIVE, FailoverStatus.COMPLETED),
        (FailoverStatus.ACTIVE, FailoverStatus.RELAUNCH),
        (FailoverStatus.RELAUNCH, FailoverStatus.NONE),
        (FailoverStatus.COMPLETED, FailoverStatus.NONE),
    }
)


class Failover:
    """The variable and the steps that change it. Any thread may call any of it; nothing here waits."""

    def __init__(self) -> None:
        self._status = FailoverStatus.NONE
        self._lock = threading.Lock()

    def failover_get_state(self) -> FailoverStatus:
        """How far it is now."""
        with self._lock:
            return self._status

    def failover_set_state(self, old: FailoverStatus, new: FailoverStatus) -> FailoverStatus:
        """Make it ``new`` if it is ``old``. Returns what it was: ``old`` if, and only if, the change was made.

        ValueError: no failover ever goes that way.
        """
        if (old, new) not in TRANSITIONS:
            raise ValueError(f"a failover does not go from {old} to {new}")
        with self._lock:
            found = self._status
            if found is old:
                self._status = new
        T.colo_failover_set_state.on and T.colo_failover_set_state(str(found), str(new), int(found is old))
        return found

    def request(self) -> None:
        """Ask for a failover. StateError: one has been asked for, or is under way, or is over."""
        found = self.failover_set_state(FailoverStatus.NONE, FailoverStatus.REQUIRE)
        if found is FailoverStatus.COMPLETED:
            raise StateError("this VM has taken over already; it is not protected")
        if found is not FailoverStatus.NONE:
            raise StateError(f"a failover is under way ({found})")

    def begin(self) -> bool:
        """For the thread that carries it out: is there a request? If so it is being carried out from now on."""
        return self.failover_set_state(FailoverStatus.REQUIRE, FailoverStatus.ACTIVE) is FailoverStatus.REQUIRE

    def defer(self) -> None:
        """Put off what was begun: a checkpoint is being loaded."""
        self._must(FailoverStatus.ACTIVE, FailoverStatus.RELAUNCH)

    def relaunch(self) -> None:
        """Ask again for what was put off; the checkpoint is whole."""
        self._must(FailoverStatus.RELAUNCH, FailoverStatus.NONE)
        # Another thread's request may come in between: then that one stands, and one is all that is wanted.
        self.failover_set_state(FailoverStatus.NONE, FailoverStatus.REQUIRE)

    def complete(self) -> None:
        """The guest runs on without the peer."""
        self._must(FailoverStatus.ACTIVE, FailoverStatus.COMPLETED)

    def protect_again(self) -> None:
        """A new peer is to be found."""
        self._must(FailoverStatus.COMPLETED, FailoverStatus.NONE)

    def _must(self, old: FailoverStatus, new: FailoverStatus) -> None:
        """A step of the one thread that carries a failover out: nobody else makes it, so it cannot fail."""
        found = self.failover_set_state(old, new)
        if found is not old:
            raise AssertionError(f"the failover is {found} where it must be {old}")
