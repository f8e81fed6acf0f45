"""The lab's own parts that can be tested without a lab."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.debian_kernel import load_order
from tests.lab.inside import files_of
from tests.lab.nested_host import shell_setup
from tests.lab.outcomes import read_outcomes
from tests.lab.root_images import FileList, package_closure
from tests.lab.selection import FOLDERS, NOT_IN_LAB, TESTS, TOO_LONG, test_functions

SAMPLE = '''
import pytest

@pytest.mark.parametrize("x", [1, 2])
def test_one(x):
    assert x == 1, "two is not one"

class TestThings:
    def test_two(self): pass
    def test_three(self): pytest.skip("not here")

@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_four(broken): pass
'''


def test_outcomes_are_found_by_file_and_test(tmp_path: Path) -> None:
    package = tmp_path / "tests" / "kvm"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "test_sample.py").write_text(SAMPLE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={tmp_path}/junit-0.xml"]
    subprocess.run([*command, "tests"], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    (tmp_path / "junit-1.xml").write_text("<testsuites><cut short")
    found = read_outcomes([tmp_path / name for name in ("junit-0.xml", "junit-1.xml", "missing.xml")])
    kinds = {test: [one.kind for one in cases] for (file, test), cases in found.items() if file == "kvm/test_sample.py"}
    assert kinds == {
        "test_one": ["passed", "failed"], "TestThings::test_two": ["passed"], "TestThings::test_three": ["skipped"],
        "test_four": ["failed"],
    }  # fmt: skip
    texts = {one.case: one.text for cases in found.values() for one in cases}
    assert "two is not one" in texts["test_one[2]"]
    assert "no fixture" in texts["test_four"]
    assert "not here" in texts["test_three"]


@pytest.mark.parametrize("name", [*NOT_IN_LAB, *TOO_LONG])
def test_what_is_left_out_of_the_lab_exists(name: str) -> None:
    file, _, test = name.partition("::")
    assert (TESTS / file).exists()
    assert not test or (file, test) in set(test_functions(FOLDERS))


def _module(folder: Path, name: str, depends: str) -> None:
    """A relocatable ELF file whose .modinfo section says ``depends``."""
    source = f'.section .modinfo,"a"\n.asciz "license=GPL"\n.asciz "depends={depends}"\n'
    subprocess.run(["gcc", "-c", "-x", "assembler", "-o", str(folder / name), "-"], input=source.encode(), check=True)


def test_modules_load_after_those_they_depend_on(tmp_path: Path) -> None:
    _module(tmp_path, "kvm-amd.ko", "kvm,ccp")
    _module(tmp_path, "kvm.ko", "irqbypass")
    _module(tmp_path, "irqbypass.ko", "")
    _module(tmp_path, "unwanted.ko", "kvm")
    order = [path.name for path in load_order(tmp_path, ("kvm_amd", "kvm", "not-there"))]
    assert order == ["irqbypass.ko", "kvm.ko", "kvm-amd.ko"]  # ccp is built in


def test_a_link_brings_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "libx.so.1.2").write_text("x")
    (tmp_path / "real" / "libx.so").symlink_to("libx.so.1.2")
    (tmp_path / "lib").symlink_to("real")
    files = FileList()
    files.add(str(tmp_path / "lib" / "libx.so"))
    files.add(str(tmp_path / "lib" / "missing"))
    assert {Path(path).relative_to(tmp_path).as_posix() for path in files.paths} == {"real/libx.so", "real/libx.so.1.2"}
    before = files.key()
    (tmp_path / "real" / "libx.so.1.2").write_text("xy")
    assert files.key() != before


def test_packages_come_with_what_they_depend_on() -> None:
    assert {"gcc", "binutils", "libc6"} <= package_closure(["gcc"])


@pytest.mark.parametrize("labs", [1, 2, 3])
def test_several_labs_share_the_files_and_leave_none_out(labs: int) -> None:
    dealt = [file for number in range(labs) for file in files_of(number, labs)]
    assert sorted(dealt) == sorted(files_of(0, 1)) and len(set(dealt)) == len(dealt) > labs


@pytest.mark.parametrize("form", ["", "long"])
def test_the_long_form_is_long_inside_too(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVMM_LAB", form)
    setup = shell_setup()
    inside = ["sh", "-c", setup + "python -c 'from tests.lab.selection import long_form; print(long_form())'"]
    environment = {"PATH": "/usr/bin:/bin"}  # nothing of this machine's gets there by itself
    done = subprocess.run(inside, capture_output=True, text=True, timeout=60, check=True, env=environment)
    assert done.stdout == f"{form == 'long'}\n"
