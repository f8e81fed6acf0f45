"""Debian's Chromium without a window, to look at pages as a reader would."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def chromium() -> str:
    """Its path; skips where PYVMM_ALLOW_NO_BROWSER=1 says that it may be missing."""
    found = shutil.which("chromium")
    if found is None and os.environ.get("PYVMM_ALLOW_NO_BROWSER") == "1":
        pytest.skip("no chromium")
    assert found is not None, "chromium is missing: make packages, or PYVMM_ALLOW_NO_BROWSER=1"
    return found


def look(browser: str, page: Path, *options: str) -> tuple[str, list[str]]:
    """(what it printed, what the page wrote on its console)."""
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars",
         f"--user-data-dir={page.parent}/profile", *options, page.as_uri()],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.decode(), [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
