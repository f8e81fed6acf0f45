"""``--object colo-compare``."""

from __future__ import annotations

import pytest

from pyvmm.cli.colo_objects import compare_tunables_of
from pyvmm.errors import ConfigError
from pyvmm.net.compare import CompareTunables, Policy


def test_nothing_said_is_qemus_defaults() -> None:
    assert compare_tunables_of([]) == CompareTunables()
    found = compare_tunables_of(["colo-compare,id=comp0"])
    assert (found.compare_timeout, found.expired_scan_cycle, found.max_queue_size) == (3000, 1000, 1024)


def test_what_is_said_counts() -> None:
    found = compare_tunables_of(["colo-compare,id=c,compare_timeout=200,expired_scan_cycle=50,udp=release"])
    assert (found.compare_timeout, found.expired_scan_cycle) == (200, 50)
    assert found.policy == {"udp": Policy.RELEASE}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("filter-mirror,id=m", "--colo puts it in its place"),
        ("throttle-group", "there is colo-compare"),
        ("colo-compare,primary_in=a", "unknown 'primary_in'"),
        ("colo-compare,udp=drop", "write compare, release, checkpoint"),
        ("colo-compare,compare_timeout=0", "compare_timeout 0 is out of range"),
        ("colo-compare,max_queue_size=many", "--object max_queue_size"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        compare_tunables_of([text])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
