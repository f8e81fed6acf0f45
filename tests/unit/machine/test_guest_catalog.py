"""The guest catalog: what it reads, what it refuses and how it says so, and the comparison of output."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.machine.guest_catalog import (
    AnyOrder,
    ExpectedLine,
    GuestEntry,
    Regex,
    describe_mismatch,
    find_guest,
    load_catalog,
)

REAL_CATALOG = Path(__file__).parents[3] / "guests" / "guests.toml"

GOOD = """
[one]
file = "one.elf"
memory = "16M"
timeout = 2.5
teaches = "something"
expected = ["a", { regex = "b+" }, { any_order = ["c", "d"] }]
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "guests.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_table_becomes_an_entry_with_defaults(tmp_path: Path) -> None:
    assert load_catalog(write(tmp_path, GOOD)) == {
        "one": GuestEntry(
            name="one",
            image=tmp_path / "one" / "one.elf",
            memory="16M",
            memory_bytes=16 << 20,
            cpus=1,
            timeout=2.5,
            append="",
            status=0,
            expected=("a", Regex("b+"), AnyOrder(("c", "d"))),
            teaches="something",
        )
    }


def test_a_variant_names_another_folder(tmp_path: Path) -> None:
    variant = GOOD.replace("[one]", "[one-more]") + 'folder = "one"\ncpus = 4\nappend = "x=1"\nstatus = 3\n'
    catalog = load_catalog(write(tmp_path, GOOD + variant))
    assert list(catalog) == ["one", "one-more"]
    assert catalog["one-more"].image == catalog["one"].image
    assert (catalog["one-more"].cpus, catalog["one-more"].append, catalog["one-more"].status) == (4, "x=1", 3)
    assert [entry.is_variant for entry in catalog.values()] == [False, True]


def test_a_relative_path_gives_absolute_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    assert load_catalog(Path("guests.toml"))["one"].image == tmp_path / "one" / "one.elf"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (('file = "one.elf"', ""), "file"),
        (('"one.elf"', '"../one.elf"'), "$.file"),
        (('"one.elf"', '"/bin/sh"'), "$.file"),
        (('"one.elf"', '"one.elf\\n"'), "$.file"),
        (('"16M"', "16"), "$.memory"),
        (('"16M"', '"16X"'), "memory '16X'"),
        (('"16M"', '"4095"'), "memory"),
        (('"16M"', '"9999T"'), "memory"),
        (("2.5", '"2.5"'), "$.timeout"),
        (("2.5", "0"), "$.timeout"),
        (("2.5", "-1"), "$.timeout"),
        (("2.5", "inf"), "$.timeout"),
        (("2.5", "nan"), "$.timeout"),
        (("timeout", "time_out"), "time"),
        (('"something"', '""'), "$.teaches"),
        (('["a",', '[7, "a",'), "expected[0]"),
        (('{ regex = "b+" }', '{ regex = "b(" }'), "expected[1]"),
        (('{ regex = "b+" }', '{ regex = "a{99999999999999999999}" }'), "expected[1]"),
        (('{ regex = "b+" }', '{ regex = "b", flags = 1 }'), "expected[1]"),
        (('{ regex = "b+" }', "{ }"), "expected[1]"),
        (('["c", "d"]', "[]"), "expected[2]"),
        (('["c", "d"]', '[{ regex = "c" }]'), "expected[2]"),
        (('any_order = ["c", "d"]', 'any_order = ["c"], regex = "c"'), "expected[2]"),
        (("[one]", "[One]"), "'One'"),
        (("[one]", '["on\\ne"]'), "'on\\ne'"),
        (("timeout = 2.5", 'timeout = 2.5\nfolder = ".."'), "folder"),
        (("timeout = 2.5", 'timeout = 2.5\nfolder = "a/b"'), "folder"),
        (("timeout = 2.5", "timeout = 2.5\ncpus = 0"), "$.cpus"),
        (("timeout = 2.5", "timeout = 2.5\ncpus = 65"), "$.cpus"),
        (("timeout = 2.5", "timeout = 2.5\nstatus = 256"), "$.status"),
        (("timeout = 2.5", 'timeout = 2.5\nappend = "a\\nb"'), "$.append"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, change: tuple[str, str], named: str) -> None:
    assert GOOD.count(change[0]) == 1
    path = write(tmp_path, GOOD.replace(*change))
    with pytest.raises(ConfigError) as caught:
        load_catalog(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: [")
    assert named in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "[one",
        "one = 1\none = 2",
        b"\xff\xfe",
        "a = " + "[" * 20000,
        "a = " + "9" * 5000,
        "#" * ((1 << 20) + 1),
        "one = 1",
        "[[one]]",
        "[one]\nexpected = []",
    ],
)
def test_what_is_no_catalog_is_refused_by_name(tmp_path: Path, text: str | bytes) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match="^" + re.escape(str(path))):
        load_catalog(path)


def test_a_missing_or_unreadable_catalog_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="^" + re.escape(str(path))):
            load_catalog(path)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.just("16M"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["regex", "any_order", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = st.sampled_from(
    ["file", "memory", "timeout", "teaches", "expected", "folder", "cpus", "append", "status", "x"]
)


def toml_value(value: object) -> str:
    """``value`` as a TOML literal (None has none, so it becomes a date)."""
    match value:
        case None:
            return "1979-05-27"
        case bool():
            return str(value).lower()
        case str():
            return '"' + "".join(f"\\U{ord(c):08x}" for c in value) + '"'
        case list():
            return "[" + ", ".join(map(toml_value, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{k} = {toml_value(v)}" for k, v in value.items()) + "}"
        case _:
            return repr(value)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(fields, json_like, min_size=1, max_size=3))
def test_any_values_load_or_are_refused(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    good: dict[str, Any] = {"file": "a.elf", "memory": "16M", "timeout": 1, "teaches": "t", "expected": ["a"]}
    text = "[one]\n" + "".join(f"{k} = {toml_value(v)}\n" for k, v in (good | changes).items())
    text = text.replace("\\U0000d", "\\U0000e")  # a lone surrogate is no TOML; keep to the interesting part
    path = write(tmp_path_factory.mktemp("catalog"), text)
    try:
        entry = load_catalog(path)["one"]
    except ConfigError as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
    else:
        assert "x" not in changes
        assert 1 <= entry.cpus <= 64
        assert 0 < entry.timeout <= 3600
        assert entry.image.parent.parent == path.parent
        describe_mismatch(entry.expected, "a\n")


# -- find_guest


def test_a_folder_finds_its_built_image(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "one.elf").touch()
    assert find_guest(tmp_path / "one").image == tmp_path / "one" / "one.elf"
    assert find_guest(tmp_path / "one" / ".." / "one").name == "one"


def test_an_image_that_is_not_built_says_how_to_build_it(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    (tmp_path / "one").mkdir()
    with pytest.raises(ConfigError, match=r"one\.elf: not built: run make guests$"):
        find_guest(tmp_path / "one")


def test_a_folder_that_is_no_guest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    with pytest.raises(ConfigError, match=r"two: a folder, and no guests\.toml"):
        find_guest(tmp_path / "two")
    write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"guests\.toml: has no guest 'two'$"):
        find_guest(tmp_path / "two")


# -- describe_mismatch

EXPECTED: tuple[ExpectedLine, ...] = ("a", Regex("[0-9]+ us"), AnyOrder(("c", "d", "d")), "end")


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("a\n12 us\nd\nc\nd\nend\n", None),
        ("a\r\n12 us\r\nd\r\nd\r\nc\r\nend\r\n", None),
        ("a\n12 us\nd\nc\nd\nend", None),
        ("", "ends after 0 lines, expected next: 'a'"),
        ("b\n", "line 1: expected 'a', got 'b'"),
        ("a \n", "line 1: expected 'a', got 'a '"),
        ("a\n12 us late\n", "line 2: expected a line like '[0-9]+ us', got '12 us late'"),
        ("a\n1 us\nc\nc\nd\nend\n", "line 3: expected in any order ['c', 'd', 'd'], got ['c', 'c', 'd']"),
        ("a\n1 us\nc\nd\n", "ends after 4 lines"),
        ("a\n1 us\nd\nd\nc\nend\n\n", "line 7: expected the end, got ''"),
        ("a\n1 us\nd\nd\nc\nend\nmore\n", "line 7: expected the end, got 'more'"),
    ],
)
def test_the_first_difference_is_described(output: str, says: str | None) -> None:
    found = describe_mismatch(EXPECTED, output)
    assert found == says if says is None else (found is not None and says in found)


words = st.text(alphabet="abc .", min_size=1, max_size=6)
items = words | st.builds(AnyOrder, st.lists(words, min_size=1, max_size=4).map(tuple))


@settings(max_examples=150, deadline=None)
@given(expected=st.lists(items, min_size=1, max_size=6).map(tuple), seed=st.integers(), data=st.data())
def test_right_output_passes_and_any_changed_line_does_not(
    expected: tuple[ExpectedLine, ...], seed: int, data: st.DataObject
) -> None:
    shuffle = random.Random(seed).shuffle
    lines: list[str] = []
    for item in expected:
        group = list(item.any_order) if isinstance(item, AnyOrder) else [str(item)]
        shuffle(group)
        lines += group
    assert describe_mismatch(expected, "".join(f"{line}\n" for line in lines)) is None
    at = data.draw(st.integers(0, len(lines) - 1))
    changed = [*lines[:at], lines[at] + "!", *lines[at + 1 :]]
    dropped = lines[:at] + lines[at + 1 :]
    doubled = [*lines, "!"]
    for wrong in (changed, dropped, doubled):
        assert describe_mismatch(expected, "".join(f"{line}\n" for line in wrong)) is not None


# -- the catalog that is shipped


def test_every_guest_folder_is_in_the_shipped_catalog() -> None:
    catalog = load_catalog(REAL_CATALOG)
    elsewhere = {"lib", "build", "linux", "kut"}  # kut has a unittests.cfg of its own
    folders = {p.name for p in REAL_CATALOG.parent.iterdir() if p.is_dir()} - elsewhere
    assert folders == {entry.image.parent.name for entry in catalog.values()}
    assert folders <= set(catalog), "each folder has an entry of its own name, or `pyvmm run` cannot find it"
