"""Buckets of pages: every page is in one, and counts where it was written."""

from __future__ import annotations

import contextlib

import pytest

from pyvmm.machine.dirty_heat import BUCKETS, add_counts, bucket_pages
from pyvmm.machine.dirty_tracker import PageSet
from pyvmm.memory.guest_memory import PAGE_SIZE, Region


@pytest.mark.parametrize("pages", [1, 63, 64, 65, 8192, 16384, 16385, 786432, 1 << 24])
def test_there_are_no_more_buckets_than_told(pages: int) -> None:
    bucket = bucket_pages(pages * PAGE_SIZE)
    assert bucket % 64 == 0
    assert -(-pages // bucket) <= BUCKETS
    assert bucket == 64 or -(-pages // (bucket // 2)) > BUCKETS


@pytest.mark.parametrize("pages", [1, 65, 8192, 40000])
def test_each_page_counts_in_its_bucket(pages: int) -> None:
    with contextlib.closing(Region(0, pages * PAGE_SIZE)) as region:
        bitmap, bucket = region.dirty, bucket_pages(region.size)
        written = sorted({0, pages // 2, pages - 1, pages // 3})
        for page in written:
            bitmap.mark(page, page + 1)
        counts = [1] * -(-pages // bucket)
        add_counts(PageSet(region, bitmap.native, len(written)), bucket, counts)
        assert counts == [1 + sum(page // bucket == i for page in written) for i in range(len(counts))]
