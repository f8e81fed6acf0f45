"""``trace-events`` files: QEMU's format, and everything that is not it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.trace.parser import parse_declaration, parse_trace_events


@pytest.mark.parametrize(
    ("line", "args", "values", "text"),
    [
        ('a(void) "nothing"', (), (), "nothing"),
        ('a() "100%%"', (), (), "100%"),
        ('a(int x) "x=%d"', (("int", "x"),), (-3,), "x=-3"),
        ('a(uint64_t gpa) "0x%" PRIx64', (("uint64_t", "gpa"),), (255,), "0xff"),
        ('a(uint64_t gpa) "0x%016" PRIx64 " end"', (("uint64_t", "gpa"),), (255,), "0x00000000000000ff end"),
        ('a(int64_t d, long long n) "%" PRId64 "/%lld"', (("int64_t", "d"), ("long long", "n")), (-1, 2), "-1/2"),
        ('a(const char *s, void *p) "%s %p"', (("const char *", "s"), ("void *", "p")), ("x", 16), "x 0x10"),
        ('a(char **v, size_t n) "%-4s|%#zx"', (("char * *", "v"), ("size_t", "n")), ("b", 10), "b   |0xa"),
        (r'a(int c) "say \"%c\" \\"', (("int", "c"),), (65,), 'say "A" \\'),
        ('a(uintptr_t p) "%" PRIxPTR', (("uintptr_t", "p"),), (17,), "11"),
        ('a(uint8_t v) "%02hhx%%"', (("uint8_t", "v"),), (7,), "07%"),
    ],
)
def test_declarations(line: str, args: tuple[tuple[str, str], ...], values: tuple[object, ...], text: str) -> None:
    declaration = parse_declaration(line, "here")
    assert declaration.args == args
    assert declaration.format % values == text
    assert len(declaration.conversions) == len(args)


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        'a(int x "x=%d"',
        'a(int) "%d"',
        'a(x) "%d"',
        'a(int x) "no conversion"',
        'a(int x) "%d %d"',
        'a(int x, int x) "%d %d"',
        'a(int x) "%y"',
        'a(int x) "%*d"',
        'a(int x) "%"',
        'a(int x) "%d" PRIz64',
        'a(int x) "%d" trailing',
        'a(int x) "unterminated %d',
        'A(int x) "%d"',
        '1a(int x) "%d"',
        'a(int x) %d',
    ],
)
def test_what_is_not_a_declaration_is_refused_with_its_place(line: str) -> None:
    with pytest.raises(ConfigError, match="folder/trace-events:7"):
        parse_declaration(line, "folder/trace-events:7")


def test_files_skip_comments_and_refuse_repeats(tmp_path: Path) -> None:
    path = tmp_path / "trace-events"
    path.write_text('# a comment\n\n   \nfirst(void) "1"\nsecond(int x) "%d"\n')
    assert [d.name for d in parse_trace_events(path)] == ["first", "second"]
    path.write_text('first(void) "1"\nfirst(void) "2"\n')
    with pytest.raises(ConfigError, match=r"trace-events:2: .*first.* twice"):
        parse_trace_events(path)


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from('ab(),* "%dxsPRI64\\z#'), max_size=60))
def test_any_line_is_a_usable_declaration_or_refused(line: str) -> None:
    try:
        declaration = parse_declaration(f'e(int x, const char *y) "{line}', "fuzz")
    except ConfigError:
        return
    values = [{"s": "text", "c": 65}.get(kind, 1) for kind in declaration.conversions]
    assert isinstance(declaration.format % tuple(values), str)
