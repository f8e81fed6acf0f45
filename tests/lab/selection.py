"""Which tests the lab repeats on kvm_amd: everything in the folders that touch KVM, but for what is named here."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

FOLDERS = ("linux", "stock", "guest", "kvm", "colo")
"""In the order they run: what matters most first, should the time not be enough."""

NOT_IN_LAB = {
    "guest/test_guests.py::test_qemu_agrees": "is QEMU without KVM, which the lab itself runs on",
    "kvm/test_fallback.py::test_xgetbv_and_xsetbv": "TCG does not intercept XSETBV: KVM's copy of XCR0 is stale",
    "kvm/test_hostile_guest.py::test_any_sequence_on_the_interrupt_controllers_too":
        "random writes to the in-kernel PIC and IOAPIC once stopped the lab's whole kernel",
    "kvm/test_no_kvm.py": "is about a host without /dev/kvm",
    "colo/test_arbiter.py": "touches no KVM",
    "linux/test_store.py": "touches no KVM",
    "kvm/test_explain.py::test_the_page_in_a_browser": "there is no browser there",
    "kvm/test_explain.py::test_interrupts_are_seen_when_stepping": "a CPU that steps by TF does not step handlers",
    "kvm/test_explain.py::test_every_instruction_down_to_a_program_and_back": "and saves TF with SYSCALL's flags",
    "colo/test_faults_at_calls.py": "starts pyvmm thousands of times in the long form",
    "colo/test_faults_with_disks.py": "the same",
    "colo/test_pair.py::test_etcd_decides": "there is no etcd there",
    "colo/test_arbiter_out_of_reach.py": "there is no etcd there",
}
"""A file, or a test in it (with its class, if it has one), and why it is not repeated."""

A_PROCESS_EACH = "starts pyvmm dozens of times, which takes seconds there, for little that depends on the CPU"

TOO_LONG = {
    "linux/test_migration_under_load.py": "starts pyvmm ten times beside a guest that is always busy",
    "linux/test_moved_linux.py::test_linux_moves_while_it_boots_and_in_userland": "one more boot of Linux",
    "linux/test_moved_linux.py::test_a_damaged_snapshot_costs_a_boot_and_nothing_else": "one more boot of Linux",
    "linux/test_named_network.py": "one more boot of Linux",
    "linux/test_protected_linux.py": "two more boots of Linux",
    "linux/test_protected_service.py": "one more boot of Linux",
    "kvm/test_hung_disk.py": A_PROCESS_EACH,
    "kvm/test_sandbox.py": A_PROCESS_EACH,
    "colo/test_protected_network.py": A_PROCESS_EACH,
    "colo/test_replicated_disk.py": A_PROCESS_EACH,
    "colo/test_links_gone.py": A_PROCESS_EACH,
    "colo/test_hostile_clients.py": A_PROCESS_EACH,
    "colo/test_life_of_a_pair.py": A_PROCESS_EACH,
    "colo/test_pair.py::test_protected_again_and_again": A_PROCESS_EACH,
    "colo/test_pair.py::test_a_guest_that_ends_is_over_on_both_sides": "a guest that goes on for seconds, twice",
    "colo/test_pair.py::test_a_survivor_that_is_protected_again_has_its_memory_once": A_PROCESS_EACH,
    "colo/test_pair.py::test_what_the_monitor_says": A_PROCESS_EACH,
    "colo/test_pair.py::test_pages_are_sent_as_changes_if_that_is_wanted": A_PROCESS_EACH,
    "colo/test_pair.py::test_a_conversation_is_kept_and_judged": A_PROCESS_EACH,
    "colo/test_pair.py::test_told_that_the_other_side_is_gone_while_it_is_not": A_PROCESS_EACH,
    "colo/test_pair.py::test_a_primary_that_was_only_stopped_finds_that_it_has_lost": "is about time",
    "kvm/test_virtio_blk.py::test_an_error_of_the_hosts_disk_is_one_of_the_guests": A_PROCESS_EACH,
    "guest/test_kut.py::test_under_the_shim": A_PROCESS_EACH,
    "guest/test_kut.py::test_the_fixture_types_at_the_guest": A_PROCESS_EACH,
    "kvm/test_virtio_blk.py::test_a_disk_that_cannot_be_is_refused_in_one_line": A_PROCESS_EACH,
    "guest/test_kut.py::test_an_image_that_hangs_one_that_crashes_and_one_that_is_none": A_PROCESS_EACH,
    "guest/test_kut.py::test_another_projects_tests_use_the_fixture": A_PROCESS_EACH,
    "guest/test_kut.py::test_pyvmm_test_as_tap": A_PROCESS_EACH,
    "guest/test_kut.py::test_pyvmm_test_refuses_bad_options": A_PROCESS_EACH,
    "kvm/test_cli_run.py": A_PROCESS_EACH,
    "guest/test_book.py": A_PROCESS_EACH,
    "kvm/test_cli_streams.py": A_PROCESS_EACH,
    "kvm/test_console.py": A_PROCESS_EACH,
    "kvm/test_hostile_guest.py::test_every_port": "65,536 exits, six times",
    "kvm/test_boot_entry.py": "a compiler and a process for each case",
    "guest/test_guests.py::test_the_dirtier_refuses_options_it_cannot_follow": A_PROCESS_EACH,
}
"""Repeated only where there is time: PYVMM_LAB=long, which is `make lab-torture`."""


def long_form() -> bool:
    """Is this the form without a bound of some minutes?"""
    return os.environ.get("PYVMM_LAB") == "long"


def is_in_lab(file: str, test: str) -> bool:
    """``file`` relative to tests/, ``test`` as in a node id: ``TestClass::test_name`` or ``test_name``."""
    left_out = set(NOT_IN_LAB) if long_form() else {*NOT_IN_LAB, *TOO_LONG}
    return file.split("/")[0] in FOLDERS and not left_out & {file, f"{file}::{test}"}


def test_functions(folders: tuple[str, ...] = FOLDERS) -> Iterator[tuple[str, str]]:
    """(file, test) of every test in ``folders``, read from the source: nothing is imported."""
    for folder in folders:
        for path in sorted((TESTS / folder).rglob("test_*.py")):
            file = str(path.relative_to(TESTS))
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                    inner = [one for one in node.body if isinstance(one, ast.FunctionDef)]
                    yield from ((file, f"{node.name}::{one.name}") for one in inner if one.name.startswith("test_"))
                elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    yield file, node.name


test_functions.__test__ = False  # type: ignore[attr-defined]
