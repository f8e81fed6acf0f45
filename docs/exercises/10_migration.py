"""Whether a migration may stop the guest now. Chapter 10."""


def may_stop(pages: int, line: int, downtime_limit: int) -> bool:
    """``pages`` are left, the line takes ``line`` bytes a second, the guest may stand still ``downtime_limit`` ms."""
    return True
