"""The Linux guest of the demo."""

from __future__ import annotations

from pyvmm.demo.topology import Topology
from pyvmm.demo.workload import Workload
from pyvmm.errors import ConfigError


def can_be_shown() -> bool:
    """Whether a kernel has been built."""
    return False


def store_workload(topology: Topology) -> Workload:
    """ConfigError."""
    raise ConfigError("--vm linux: not yet")
