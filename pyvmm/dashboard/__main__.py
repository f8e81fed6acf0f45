"""``python -m pyvmm.dashboard``: the dashboard's process, started by the VMM that it shows (launch.py)."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import sys

from pyvmm.dashboard.launch import START_MAX

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """What to do comes on standard input, as launch.py writes it."""
    told = json.loads(os.read(0, START_MAX))
    # Should this process hang, it still goes with the VMM.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    link, listener = socket.socket(fileno=told["link"]), socket.socket(fileno=told["listener"])
    from pyvmm.dashboard.server import serve

    if told["confined"]:
        from pyvmm.host.sandbox import enter_sandbox

        enter_sandbox(cards=False)
    asyncio.run(serve(link, listener, told["token"], told["name"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
