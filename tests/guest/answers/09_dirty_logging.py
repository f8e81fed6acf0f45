"""Rounds, until little is left."""

from typing import Any


def migrate(source: Any) -> dict[int, bytes]:
    copy: dict[int, bytes] = {}
    pages = source.dirty()
    for _ in range(10):
        for page in pages:
            copy[page] = source.read(page)
        pages = source.dirty()
        if len(pages) <= 4:
            break
    source.stop()
    for page in pages | source.dirty():
        copy[page] = source.read(page)
    return copy


def _at_rest(source: Any) -> dict[int, bytes]:
    source.stop()
    return {page: source.read(page) for page in source.dirty()}


def _once(source: Any) -> dict[int, bytes]:
    copy = {page: source.read(page) for page in source.dirty()}
    source.stop()
    return copy


WRONG = {"all of it while it stands still": _at_rest, "one round": _once}
