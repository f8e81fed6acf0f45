"""Bytes that the line takes in that time."""


def may_stop(pages: int, line: int, downtime_limit: int) -> bool:
    return pages * 4096 * 1000 <= line * downtime_limit


WRONG = {"seconds for milliseconds": lambda pages, line, limit: pages * 4096 <= line * limit}
