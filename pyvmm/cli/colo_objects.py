"""``--object``: what of COLO's proxy can be tuned, by QEMU's names. ``--colo`` puts its filters together itself."""

from __future__ import annotations

from collections.abc import Sequence

from pyvmm.errors import ConfigError
from pyvmm.machine.config import parse_number
from pyvmm.machine.device_config import split_option
from pyvmm.net.compare import CompareTunables, Policy
from pyvmm.net.flow import PACKET_CLASSES

NUMBERS = ("compare_timeout", "expired_scan_cycle", "max_queue_size")
ASSEMBLED = ("filter-mirror", "filter-redirector", "filter-rewriter")


def compare_tunables_of(objects: Sequence[str]) -> CompareTunables:
    """What the options ask for; ConfigError. ``id`` is taken, and means nothing: there is one for each card."""
    found = CompareTunables()
    for number, text in enumerate(objects):
        kind, pairs = split_option("--object", text, (*NUMBERS, *PACKET_CLASSES, "id"))
        if kind in ASSEMBLED:
            raise ConfigError(f"--object {kind}: --colo puts it in its place; there is nothing to say about it")
        if kind != "colo-compare":
            raise ConfigError(f"--object {kind}: there is colo-compare")
        if number:
            raise ConfigError("--object colo-compare: say it once; it is for all cards")
        numbers = {
            name: parse_number(pairs[name], f"--object {name}", maximum=(1 << 31) - 1)
            for name in NUMBERS if name in pairs
        }  # fmt: skip
        found = CompareTunables(
            **numbers, policy={name: _policy(name, pairs[name]) for name in PACKET_CLASSES if name in pairs}
        )
    return found


def _policy(kind: str, text: str) -> Policy:
    for policy in Policy:
        if policy.name.lower() == text:
            return policy
    raise ConfigError(f"--object {kind}={text}: write {', '.join(policy.name.lower() for policy in Policy)}")
