"""Only the lab runs these: see tests/lab/stock_guest.py."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("PYVMM_IN_LAB") == "1" else ["test_*.py"]
