"""A guest's memory, copied while it runs, with few pages left for when it stands still. Chapter 9."""

from typing import Any


def migrate(source: Any) -> dict[int, bytes]:
    """All pages of ``source`` by number, as they are when it stands still.

    ``source.dirty()``: pages written since this was asked last (at first: all); ``source.read(page)``: a page as it is
    now, the guest going on meanwhile; ``source.stop()``: from here on the guest stands still, and that is to be short.
    """
    return {page: source.read(page) for page in source.dirty()}
