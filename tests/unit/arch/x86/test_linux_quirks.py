"""What is added to Linux's command line, on which host, and how to get rid of it."""

from __future__ import annotations

import re

import pytest

from pyvmm.arch.x86.linux_quirks import ADDITIONS, linux_additions, split_removals

ODD = frozenset({"emulated-cpl0"})


def names(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words}


def test_a_plain_host_gets_only_what_every_host_gets() -> None:
    base = linux_additions(frozenset(), [], base=True, cards=False)
    assert {"console", "reboot", "panic"} <= names(base)
    assert not {"clearcpuid", "rodata", "initcall_blacklist"} & names(base)
    assert linux_additions(frozenset(), [], base=False, cards=False) == []


def test_an_odd_host_gets_its_own_on_top() -> None:
    base, both = (linux_additions(quirks, [], base=True, cards=False) for quirks in (frozenset(), ODD))
    assert both[: len(base)] == base
    assert both[len(base) :] == linux_additions(ODD, [], base=False, cards=False)
    assert {"clearcpuid", "rodata", "initcall_blacklist"} <= names(both)


def test_the_kernel_keeps_saving_vector_registers() -> None:
    # User code uses AVX on such hosts whatever the guest's kernel is told: tests/linux/test_vector_registers.py.
    words = linux_additions(ODD, [], base=True, cards=False)
    (masked,) = (word.partition("=")[2].split(",") for word in words if word.startswith("clearcpuid="))
    assert not {"xsave", "avx", "avx2", "avx512f"} & set(masked) and "noxsave" not in words


@pytest.mark.parametrize("addition", ADDITIONS, ids=lambda a: a.text.partition("=")[0])
def test_each_can_be_removed_by_name_and_says_why_it_is_there(addition: object) -> None:
    text = addition.text  # type: ignore[attr-defined]
    name = text.partition("=")[0]
    kept, removed = split_removals([f"-{name}", "loglevel=7"])
    assert (kept, removed) == (["loglevel=7"], [name])
    assert linux_additions(ODD, removed, base=True, cards=False) == [
        a.text for a in ADDITIONS if not a.text.startswith(name)
    ]
    assert addition.reason and not re.search(r"\s", text)  # type: ignore[attr-defined]


def test_a_machine_with_a_network_card_keeps_all_of_the_network() -> None:
    without, with_card = (linux_additions(ODD, [], base=True, cards=cards) for cards in (False, True))
    assert set(without) - set(with_card) == {"ipv6.disable=1"}


def test_no_option_is_given_twice_and_all_fit() -> None:
    words = linux_additions(ODD, [], base=True, cards=False)
    assert len(names(words)) == len(words)
    # COMMAND_LINE_SIZE is 2048; most of it is the user's.
    assert len(" ".join(words)) < 600


def test_words_that_only_look_like_removals_are_the_guests_own() -> None:
    words = ["init=/x", "-foo", "-quiet", "--", "-quiet", "-v"]
    assert split_removals(words) == (["init=/x", "-foo", "--", "-quiet", "-v"], ["quiet"])
