"""Commands run where /dev/kvm is not what it should be, and without root's right to read everything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_SCRIPTS = {
    "other-device": "mount --bind /dev/null /dev/kvm",
    "plain-file": ': > "$0/kvm" && mount --bind "$0/kvm" /dev/kvm',
    "forbidden": ': > "$0/kvm" && chmod 0 "$0/kvm" && mount --bind "$0/kvm" /dev/kvm',
    "missing": 'mkdir "$0/dev" && for d in null zero urandom; do'
    ' : > "$0/dev/$d" && mount --bind "/dev/$d" "$0/dev/$d" || exit; done && mount --rbind "$0/dev" /dev',
}
KINDS = tuple(_SCRIPTS)
_NO_OVERRIDE = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all"]


def with_kvm_device(kind: str, folder: Path, *command: str) -> list[str]:
    """``command`` in a mount namespace where /dev/kvm is of ``kind`` (see KINDS); skips if none can be made."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False, timeout=30).returncode:
        pytest.skip("no mount namespace can be made here")
    script = f'{_SCRIPTS[kind]} && exec "$@"'
    return [*unshare, "sh", "-c", script, str(folder), *bound_by_permissions(*command)]


def bound_by_permissions(*command: str) -> list[str]:
    """``command`` as a user whom file permissions bind: root without its right to pass over them."""
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv here")
    return [*_NO_OVERRIDE, *command]
