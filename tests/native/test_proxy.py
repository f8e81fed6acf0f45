"""The proxy's parser, comparison and rewriter under ASan and UBSan, against frames made to break them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.harness import NATIVE, attempt, build, run

SOURCES = [
    "proxy_packet.c", "proxy_flow.c", "proxy_compare.c", "proxy_queues.c", "proxy_epochs.c", "proxy_tcp.c",
    "proxy_ack.c", "proxy_datagram.c", "proxy_rewriter.c", "proxy_rewrite.c",
]  # fmt: skip
FRAMES = 120_000


def build_around(folder: Path, changed: Path | None = None) -> Path:
    """With ``changed`` instead of the source of that name."""
    sources = [changed if changed and name == changed.name else NATIVE / name for name in SOURCES]
    return build(folder, "proxy_harness.c", sources)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_around(tmp_path_factory.mktemp("proxy"))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("what", ["compare", "rewriter"])
def test_no_frame_leads_outside_memory_and_none_is_lost(program: Path, what: str, seed: int) -> None:
    figures = run(program, what, seed, FRAMES)
    assert min(figures.values()) > 1, figures  # each case was met, or this proves little


@pytest.mark.parametrize(
    ("what", "name", "step", "instead"),
    [
        ("compare", "proxy_packet.c", "header < 20 || total < header || !has_bytes(c, total)",
         "header < 20 || total < header"),
        ("compare", "proxy_packet.c", "c->end - c->at - 40 < pv_be16(h + 4)", "0"),
        ("compare", "proxy_packet.c", "header < PV_TCP_HEADER || !has_bytes(c, header)", "header < PV_TCP_HEADER"),
        ("compare", "proxy_packet.c", "if (!has_bytes(c, length))", "if (0)"),
        ("compare", "proxy_packet.c", "options[*at + 1] > size - *at", "0"),
        ("compare", "proxy_tcp.c", "pv_after(held->end, at->frontier) > 0)", "1)"),
        ("compare", "proxy_queues.c", "if (s->fresh == held)", "if (0)"),
        ("compare", "proxy_queues.c", "if (s->end == &held->next)", "if (0)"),
        ("compare", "proxy_compare.c", "c->held_bytes[side] + whole > c->limits.max_bytes", "0"),
        ("compare", "proxy_epochs.c", "pv_compare_send_out(c, pv_stream_take_off(primary, &primary->first));",
         "pv_compare_free_held(c, PV_PRIMARY, pv_stream_take_off(primary, &primary->first));"),
        ("rewriter", "proxy_rewrite.c", "(at + i - e->from) & 1 ? 0 : 8", "i & 1 ? 0 : 8"),
        ("rewriter", "proxy_rewrite.c", "uint32_t sum = (uint16_t)~", "uint32_t sum = (uint16_t)"),
        ("rewriter", "proxy_rewrite.c", "p->body_size < 8 + ip_size + 8", "p->body_size < 8"),
        ("rewriter", "proxy_rewrite.c", "kind == PV_TCP_OPTION_TIMESTAMPS && length == 10",
         "kind == PV_TCP_OPTION_TIMESTAMPS"),
    ],
)  # fmt: skip
def test_a_missing_check_is_found(tmp_path: Path, what: str, name: str, step: str, instead: str) -> None:
    """Or else the test above would prove nothing."""
    source = (NATIVE / name).read_text()
    assert step in source
    (tmp_path / name).write_text(source.replace(step, instead, 1))
    done = attempt(build_around(tmp_path, tmp_path / name), what, 1, FRAMES)
    assert done.returncode != 0
    assert any(word in done.stderr for word in ("Sanitizer", "runtime error", "_harness.c:")), done
