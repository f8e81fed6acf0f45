"""What the page is told of a machine: one document, whole each time, so that a browser may miss as many as it likes."""

from __future__ import annotations

import time
from typing import Any

from pyvmm.qmp.client import CommandError, QmpClient

CHECKPOINTS = 120
"""The last ones that are told."""
FAILOVER = "x-colo-lost-heartbeat"
"""What the button does."""
COMMANDS = frozenset({
    "qmp_capabilities", "query-name", "query-status", "query-memory-size-summary", "query-colo-status",
    "query-colo-stats", "query-colo-checkpoints", "query-migrate", "x-query-dirty-heat", FAILOVER,
})  # fmt: skip
"""All that the dashboard can ask of its machine."""


class StateReader:
    """Asks ``client``. What a machine refuses to tell, or does not have, is left out."""

    def __init__(self, client: QmpClient) -> None:
        self._client = client
        self._name = ""

    def read(self) -> dict[str, Any]:
        """The state now. HostError: the machine is gone. DeadlineError: it does not answer."""
        ask = self._ask
        if not self._name:
            self._name = (ask("query-name") or {}).get("name", "")
        status = ask("query-status") or {}
        memory = ask("query-memory-size-summary") or {}
        state: dict[str, Any] = {
            "at": time.time(),
            "name": self._name,
            "status": status.get("status", "unknown"),
            "memory": memory.get("base-memory", 0),
            "migration": ask("query-migrate"),
            "heat": self._heat(),
        }
        colo = ask("query-colo-status")
        if colo is not None:
            state["colo"] = colo
            state["colo_stats"] = ask("query-colo-stats")
            state["checkpoints"] = (ask("query-colo-checkpoints") or [])[-CHECKPOINTS:]
        return state

    def _heat(self) -> dict[str, Any]:
        try:
            answer = self._client.execute("x-query-dirty-heat")
        except CommandError as error:
            return {"problem": str(error)}
        assert isinstance(answer, dict)
        return answer

    def _ask(self, command: str) -> Any:
        try:
            return self._client.execute(command)
        except CommandError:
            return None
