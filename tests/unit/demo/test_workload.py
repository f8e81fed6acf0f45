from __future__ import annotations

import pytest

from pyvmm.demo.workload import Exchange, gaps


def exchange(client: int, began: float, took: float) -> Exchange:
    return Exchange(client, 0, began, began + took)


def test_the_gap_is_the_longest_answer_round_the_failure_less_the_usual() -> None:
    done = [exchange(1, 0.1 * i, 0.010) for i in range(10)]
    done += [exchange(1, 0.995, 0.310), exchange(1, 1.4, 0.012), exchange(1, 5.0, 3.0)]  # the last is no failure's
    assert [round(gap, 3) for gap in gaps(done, 1.0, 2.0)] == [0.3]


def test_each_client_has_its_own_and_one_without_an_answer_has_waited_all_the_time() -> None:
    done = [exchange(2, 0.5, 0.1), exchange(1, 0.5, 0.1), exchange(2, 0.9, 0.4)]
    one, two = gaps(done, 1.0, 3.0)
    assert (round(one, 3), round(two, 3)) == (1.9, 0.3)


def test_a_failure_that_cost_nothing_is_no_gap() -> None:
    assert gaps([exchange(1, 0.1, 0.2), exchange(1, 0.9, 0.2)], 1.0, 2.0) == pytest.approx([0.0])
    assert gaps([], 1.0, 2.0) == []
