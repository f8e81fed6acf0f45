"""JUnit XML, as Jenkins, GitLab and others read it: a suite per image, a case per verdict and one for its end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyvmm.testing.result import Result

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

# XML 1.0, section 2.2: the characters there are. Not even an escape may name the others.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_OUTPUT_MAX = 1 << 18


def junit_document(results: Sequence[Result]) -> bytes:
    """The whole document in UTF-8."""
    from xml.etree import ElementTree

    root = ElementTree.Element("testsuites", name="pyvmm test")
    for result in results:
        root.append(_suite(result))
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    root.set("time", f"{sum(result.seconds for result in results):.3f}")
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _suite(result: Result) -> Element:
    from xml.etree.ElementTree import Element, SubElement

    name = _clean(result.name)
    suite = Element("testsuite", name=name, time=f"{result.seconds:.3f}")
    for case in result.report.cases:
        element = SubElement(suite, "testcase", classname=name, name=_clean(case.name))
        if case.bad:
            SubElement(element, "failure", message=case.verdict)
        elif case.verdict != "PASS":
            SubElement(element, "skipped", message={"SKIP": "skipped"}.get(case.verdict, "failed as expected"))
    # How the image ended is a case of its own: it may fail though every verdict passed.
    end = SubElement(suite, "testcase", classname=name, name="exit status", time=f"{result.seconds:.3f}")
    if result.outcome == "skip":
        SubElement(end, "skipped", message=_clean(result.reason))
    elif result.failed:
        kind = "failure" if result.outcome == "fail" else "error"
        SubElement(end, kind, message=_clean(result.reason))
    output = result.output[-_OUTPUT_MAX:].decode(errors="replace")
    text = "".join(f"note: {note}\n" for note in result.notes) + output
    if text:
        SubElement(suite, "system-out").text = _clean(text)
    suite.set("tests", str(len(suite.findall("testcase"))))
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))
    return suite


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
