"""Test images' output and status, and what becomes of them: verdicts, TAP, JUnit."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.testing.junit import junit_document
from pyvmm.testing.report import CASES_MAX, Case, Report, Summary, parse_report
from pyvmm.testing.result import Result, judge
from pyvmm.testing.tap import tap_lines

OUTPUT = b"""enabling apic
PASS: apic: self ipi: normal
FAIL: apic: tsc deadline\r
XFAIL: msr: known bug
XPASS: msr: fixed meanwhile
SKIP: vmx: (no support)
 PASS not a verdict
SUMMARY: 5 tests, 2 unexpected failures, 1 expected failures, 1 skipped
"""


def test_every_kind_of_line() -> None:
    report = parse_report(OUTPUT)
    assert report.cases == (
        Case("PASS", "apic: self ipi: normal"),
        Case("FAIL", "apic: tsc deadline"),
        Case("XFAIL", "msr: known bug"),
        Case("XPASS", "msr: fixed meanwhile"),
        Case("SKIP", "vmx: (no support)"),
    )
    assert report.summary == Summary(5, 2, 1, 1)
    assert report.failed


def test_cases_have_a_limit() -> None:
    report = parse_report(b"PASS: x\n" * (CASES_MAX + 5))
    assert (len(report.cases), report.truncated) == (CASES_MAX, True)


# Lines that almost are what is looked for find more than noise alone.
LINES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.tuples(
            st.sampled_from([b"PASS: ", b"FAIL: ", b"SKIP: ", b"XPASS: ", b"XFAIL: ", b"SUMMARY: 3 tests"]),
            st.binary(max_size=30),
        ).map(b"".join),
    ),
    max_size=12,
).map(b"\n".join)


@settings(max_examples=150, deadline=None)
@given(LINES, st.sampled_from(["debug-exit", "halt", "timeout", "triple-fault"]), st.integers(0, 200), st.text())
def test_nothing_an_image_says_breaks_a_report(output: bytes, kind: str, value: int, name: str) -> None:
    results = [judge(name, kind, value if kind == "debug-exit" else None, "because\x00 \udcff", output, 0.5)] * 2
    assert results[0].failed or value in (0, 77)
    lines = list(tap_lines(results))
    assert_is_tap(lines, results)
    root = ElementTree.fromstring(junit_document(results))
    for suite in root:
        assert int(suite.get("tests", "")) == len(suite.findall("testcase")) == len(results[0].report.cases) + 1
        bad = len(suite.findall("testcase/failure")) + len(suite.findall("testcase/error"))
        assert (bad > 0) == results[0].failed


def assert_is_tap(lines: list[str], results: list[Result]) -> None:
    """As the specification's grammar has it, at both levels."""
    assert lines[0] == "TAP version 14"
    assert lines[-1] == f"1..{len(results)}"
    points, inner = 0, 0
    for line in lines[1:-1]:
        assert "\n" not in line and line.isprintable(), line
        if line.startswith("    "):
            if line.startswith("    1.."):
                assert line == f"    1..{inner}"
                inner = 0
            else:
                inner += 1
                assert re.fullmatch(rf"    (not )?ok {inner} - (?:[^#\\]|\\[#\\])*( # (SKIP|TODO).*)?", line), line
        elif not line.startswith("# "):
            points += 1
            assert re.fullmatch(rf"(not )?ok {points} - (?:[^#\\]|\\[#\\])*( # SKIP .*)?", line), line
            assert line.startswith("not ok") == results[points - 1].failed
    assert points == len(results)


@pytest.mark.parametrize(
    ("kind", "value", "output", "outcome", "words"),
    [
        ("debug-exit", 0, b"PASS: a\nSUMMARY: 1 tests\n", "pass", ""),
        ("debug-exit", 0, b"", "pass", ""),  # an image that says nothing but its status
        ("debug-exit", 0, b"FAIL: a\n", "fail", "unexpected failures"),
        ("debug-exit", 0, b"SUMMARY: 3 tests, 1 unexpected failures\n", "fail", "SUMMARY"),
        ("debug-exit", 0, b"XFAIL: a\n", "pass", ""),
        ("debug-exit", 1, b"FAIL: a\nPASS: b\n", "fail", "1 unexpected"),
        ("debug-exit", 1, b"PASS: a\n", "fail", "status 1"),
        ("debug-exit", 77, b"SKIP: a\n", "skip", "skipped"),
        ("debug-exit", 77, b"FAIL: a\n", "fail", "unexpected"),
        ("debug-exit", 124, b"", "timeout", "124"),
        ("debug-exit", 127, b"", "fail", "aborted"),
        ("debug-exit", 128, b"", "fail", "aborted"),
        ("halt", None, b"PASS: a\nSUMMARY: 1 tests\n", "fail", "without an exit status"),
        ("triple-fault", None, b"PASS: a\n", "fail", "without an exit status"),
        ("timeout", None, b"PASS: a\n", "timeout", ""),
    ],
)
def test_the_verdict_on_an_image(kind: str, value: int | None, output: bytes, outcome: str, words: str) -> None:
    result = judge("image", kind, value, "", output, 1.0)
    assert result.outcome == outcome
    assert words in result.reason


def test_tap_of_nothing() -> None:
    assert list(tap_lines([])) == ["TAP version 14", "1..0 # SKIP nothing was to be run"]


def test_junit_counts_and_cleans() -> None:
    report = Report((Case("FAIL", "a\x1b[31m<&\ufffe"), Case("SKIP", "b"), Case("XFAIL", "c")), None)
    document = junit_document([Result("x", "fail", "status 1", 1.5, report, b"out\x00put ]]>\xff", ("a note",))])
    root = ElementTree.fromstring(document)
    assert {name: root.get(name) for name in ("tests", "failures", "errors", "skipped", "time")} == {
        "tests": "4", "failures": "2", "errors": "0", "skipped": "2", "time": "1.500",
    }  # fmt: skip
    assert root[0][0].get("name") == "a\ufffd[31m<&\ufffd"
    assert root[0].findtext("system-out") == "note: a note\nout\ufffdput ]]>\ufffd"
