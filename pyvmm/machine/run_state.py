"""The machine's run state and which changes of it are legal (names are QEMU's RunState)."""

from __future__ import annotations

import enum
import threading

from pyvmm.errors import StateError
from pyvmm.trace import trace_group

T = trace_group("machine")


class RunState(enum.Enum):
    """What the machine as a whole is doing."""

    PRELAUNCH = "prelaunch"
    """Built, no vCPU has run yet."""
    RUNNING = "running"
    PAUSED = "paused"
    """All vCPUs are parked between two instructions; state may be read and written."""
    COLO = "colo"
    """Stands still for a checkpoint, or because its guest runs elsewhere and this is its replica."""
    INMIGRATE = "inmigrate"
    """Waits for a guest from elsewhere."""
    POSTMIGRATE = "postmigrate"
    """The guest was handed to another process."""
    SHUTDOWN = "shutdown"
    """The guest ended by itself (power-off, halt, debug-exit, reset with --no-reboot)."""
    GUEST_PANICKED = "guest-panicked"
    """The guest cannot go on (triple fault)."""
    INTERNAL_ERROR = "internal-error"
    """pyvmm cannot go on with the guest (an instruction nobody can carry out)."""


_LEGAL: dict[RunState, frozenset[RunState]] = {
    RunState.PRELAUNCH: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.INMIGRATE, RunState.SHUTDOWN}),
    RunState.INMIGRATE: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.SHUTDOWN, RunState.COLO}),
    RunState.COLO: frozenset(
        {
            RunState.RUNNING,
            RunState.PAUSED,
            RunState.PRELAUNCH,
            RunState.SHUTDOWN,
            RunState.GUEST_PANICKED,
            RunState.INTERNAL_ERROR,
        }
    ),
    # By hand, if its owner knows that nobody else has it.
    RunState.POSTMIGRATE: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.SHUTDOWN, RunState.PRELAUNCH}),
    RunState.RUNNING: frozenset(
        {RunState.PAUSED, RunState.COLO, RunState.SHUTDOWN, RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR}
    ),
    RunState.PAUSED: frozenset(
        {
            RunState.RUNNING,
            RunState.PRELAUNCH,
            RunState.POSTMIGRATE,
            RunState.SHUTDOWN,
            RunState.GUEST_PANICKED,
            RunState.INTERNAL_ERROR,
        }
    ),
    # Only a reset brings a guest that has ended back.
    RunState.SHUTDOWN: frozenset({RunState.PRELAUNCH}),
    RunState.GUEST_PANICKED: frozenset({RunState.PRELAUNCH}),
    RunState.INTERNAL_ERROR: frozenset({RunState.PRELAUNCH}),
}


class RunStateTracker:
    """Holds the state; a change that is not in the table is a StateError and changes nothing."""

    def __init__(self) -> None:
        self._state = RunState.PRELAUNCH
        self._lock = threading.Lock()

    @property
    def state(self) -> RunState:
        """The state now."""
        return self._state

    def change(self, new: RunState) -> RunState:
        """Go to ``new``; returns the state left."""
        with self._lock:
            old = self._state
            if new not in _LEGAL[old]:
                raise StateError(f"a machine that is {old.value} cannot become {new.value}")
            self._state = new
        T.run_state_change.on and T.run_state_change(old.value, new.value)
        return old
