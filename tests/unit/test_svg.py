from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.svg import Scale, decade_scale, element, rows_for


def test_an_element_is_escaped_and_numbers_are_short() -> None:
    made = element("text", "<b/>", x=1.0, y=2.3456, class_="a", stroke_width=2, text='<&"')
    assert made == '<text x="1" y="2.35" class="a" stroke-width="2">&lt;&amp;&quot;<b/></text>'
    assert element("path", d='"><script>') == '<path d="&quot;&gt;&lt;script&gt;"/>'


def test_scales() -> None:
    line = Scale(0, 10, 100, 200)
    assert [line(value) for value in (-5, 0, 5, 10, 11)] == [100, 100, 150, 200, 200]
    log = Scale(0.1, 1000, 400, 0, logarithmic=True)
    assert [log(value) for value in (0.01, 0.1, 1, 10, 1000)] == [400, 400, 300, 200, 0]
    assert log.ticks() == pytest.approx([0.1, 1, 10, 100, 1000])


@given(low=st.floats(0, 1e4), width=st.floats(0.01, 1e5))
def test_ticks_are_round_inside_and_neither_few_nor_many(low: float, width: float) -> None:
    scale = Scale(low, low + width, 0, 1000)
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 10
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in ticks)
    assert ticks == sorted(set(ticks))


@given(st.lists(st.floats(0.001, 1e6)))
def test_a_decade_scale_has_room_for_all(values: list[float]) -> None:
    scale = decade_scale(values, 100, 0, 0.1, 10)
    assert scale.high >= 10
    assert all(value <= scale.high * (1 + 1e-9) for value in values)


@given(st.lists(st.tuples(st.floats(0, 1000), st.text("abc", max_size=30)), max_size=20))
def test_labels_in_a_row_do_not_overlap(labels: list[tuple[float, str]]) -> None:
    labels.sort()
    placed = [
        (row, begin, begin + len(text) * 6)
        for (x, text), row in zip(labels, rows_for(labels, 6, 1000), strict=True)
        if (begin := min(x, 1000 - len(text) * 6 - 8)) is not None
    ]
    for i, (row, begin, _) in enumerate(placed):
        assert all(begin >= end for other, _, end in placed[:i] if other == row)
