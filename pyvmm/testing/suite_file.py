"""``unittests.cfg``: which images a suite has and how each is to be run (kvm-unit-tests' format).

::

    [name]
    file = image.flat            # relative to the file's folder
    smp = 2                      # or $MAX_SMP
    extra_params = -cpu max -append 'one two'     # QEMU's flags; also qemu_params, and test_args for -append
    timeout = 30s                # seconds; 0: the runner's default
    arch = x86_64
    groups = a b                 # "nodefault": only run when named or with a group that is asked for
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm.testing.qemu_flags import parse_qemu_flags
from pyvmm.testing.runner import Job

_SIZE_MAX = 1 << 20
_KNOWN = {"file", "smp", "extra_params", "qemu_params", "test_args", "timeout", "arch", "groups", "accel", "machine"}
_ARCHITECTURES = ("", "x86_64", "i386")
MAX_SMP = 4
"""``$MAX_SMP`` at most: the suites mean "some", and many vCPUs on few CPUs only take long."""


def read_suite(path: Path) -> dict[str, dict[str, str]]:
    """The sections, by name. ConfigError names the file and the line that is wrong."""
    try:
        with path.open("rb") as file:
            raw = file.read(_SIZE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(raw) > _SIZE_MAX:
        raise ConfigError(f"{path}: larger than 1 MiB, this is no list of tests")
    sections: dict[str, dict[str, str]] = {}
    section: dict[str, str] | None = None
    lines = iter(enumerate(raw.decode(errors="replace").split("\n"), 1))
    for number, text in lines:
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{path}:{number}"
        if match := re.fullmatch(r"\[([^\[\]]{1,200})\]\s*(#.*)?", line):
            if match[1] in sections:
                raise ConfigError(f"{where}: [{match[1]}] is there twice")
            section = sections[match[1]] = {}
            continue
        name, equals, value = (piece.strip() for piece in line.partition("="))
        if section is None or not equals:
            raise ConfigError(f"{where}: neither [name] nor key = value")
        if value.startswith('"""'):  # a value of several lines
            pieces = [value[3:]]
            while '"""' not in pieces[-1]:
                following = next(lines, None)
                if following is None:
                    raise ConfigError(f'{where}: {name}: the closing """ is missing')
                pieces.append(following[1])
            pieces[-1] = pieces[-1].partition('"""')[0]
            value = "\n".join(pieces)
        section[name] = value
    return sections


def suite_jobs(path: Path, wanted: Collection[str], default_timeout: float) -> list[Job]:
    """Jobs of the sections; ``wanted`` names sections or groups (empty: all that are not ``nodefault``)."""
    sections = read_suite(path)
    known = set(sections) | {group for keys in sections.values() for group in keys.get("groups", "").split()}
    if unknown := sorted(set(wanted) - known):
        raise ConfigError(f"{path}: has neither a test nor a group {unknown[0]!r}")
    jobs = []
    for name, keys in sections.items():
        groups = set(keys.get("groups", "").split())
        if (not wanted and "nodefault" in groups) or (wanted and not ({name} | groups) & set(wanted)):
            continue
        jobs.append(_job(path, name, keys, default_timeout))
    return jobs


def _job(path: Path, name: str, keys: dict[str, str], default_timeout: float) -> Job:
    image = str(path.parent / keys.get("file", ""))

    def skipped(why: str) -> Job:
        return Job(name, image, skip=why)

    if not keys.get("file"):
        return skipped("it names no file")
    if keys.get("arch", "") not in _ARCHITECTURES:
        return skipped(f"arch = {keys['arch']}: is for another architecture")
    if keys.get("accel", "kvm") != "kvm":
        return skipped(f"accel = {keys['accel']}: pyvmm runs guests on KVM only")
    if unknown := sorted(set(keys) - _KNOWN):
        if "check" not in unknown:
            return skipped(f"{unknown[0]}: a key that pyvmm does not know")
        return skipped(f"check = {keys['check']}: a condition on the host's files that pyvmm does not read")
    try:
        # The folder of the file is where its relative paths (-initrd) begin.
        words = shlex.split(" ".join(keys.get(key, "") for key in ("extra_params", "qemu_params")))
        if keys.get("test_args"):
            words += ["-append", keys["test_args"].strip("'\"")]
        if keys.get("machine"):
            words += ["-machine", keys["machine"]]
        if keys.get("smp"):
            cpus = str(max(1, min(os.cpu_count() or 1, MAX_SMP)))
            words += ["-smp", keys["smp"].replace("$MAX_SMP", cpus)]
        request = parse_qemu_flags(words)
        timeout = _timeout(keys.get("timeout", ""), default_timeout)
    except ValueError as error:  # shlex: a quotation mark is missing
        return skipped(f"extra_params: {error}")
    except ConfigError as error:
        return skipped(str(error))
    if request.initrd is not None:
        request.initrd = str(path.parent / request.initrd)
    request.testdev = True  # runners of this format always give it
    return Job(name, image, tuple(request.run_options()), timeout, notes=tuple(request.notes))


def _timeout(text: str, default: float) -> float:
    if not text or text == "0":
        return default
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)([smh]?)", text)
    if match is None or not float(match[1]):
        raise ConfigError(f"timeout = {text}: write seconds")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
