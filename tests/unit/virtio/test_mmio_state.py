"""The transport under any access, and its state saved and loaded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import SectionError
from pyvmm.virtio import mmio
from pyvmm.virtio.mmio import WINDOW
from pyvmm.virtio.queue import F_EVENT_IDX
from tests.unit.virtio.fake_device import Bench
from tests.unit.virtio.fake_driver import DATA_REGION, REGIONS, Buffer, ram

OFFSETS = st.one_of(
    st.sampled_from([v for k, v in vars(mmio).items() if k.isupper() and isinstance(v, int) and v < WINDOW]),
    st.integers(0, WINDOW - 1),
)
VALUES = st.one_of(st.integers(0, 17), st.sampled_from([0x10000, 0x12000, 0x13000, 0x40000, 0xFFFFFFFF]),
                   st.sampled_from([1 << n for n in range(32)]), st.integers(0, 0xFFFFFFFF))  # fmt: skip
ACCESSES = st.lists(st.tuples(OFFSETS, st.sampled_from([1, 2, 4, 8]), VALUES, st.booleans()), max_size=40)


@settings(max_examples=80, deadline=None)
@given(ready=st.booleans(), accesses=ACCESSES)
def test_no_access_raises_and_any_state_survives_saving(
    ready: bool, accesses: list[tuple[int, int, int, bool]]
) -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        if ready:
            driver = bench.bring_up(memory)
            driver.offer([Buffer(DATA_REGION[0], 4, True)])
        for offset, size, value, is_write in accesses:
            if is_write:
                bench.bus.write(offset, size, value)
            else:
                assert 0 <= bench.bus.read(offset, size) < 1 << 8 * size
            for index in bench.rung[:4]:
                bench.transport.serve(index)
            bench.rung.clear()
        saved = bench.transport.save()
        other = Bench(memory)
        other.transport.load(saved)
        assert other.transport.save() == saved == bench.transport.save()
        assert other.signal.pulses() == bool(saved["interrupt_status"])
        assert other.device.active == bench.device.active
        for offset in range(0, 0x120, 4):
            assert other.get(offset) == bench.get(offset)
        other.transport.reset()
        assert other.transport.save() == Bench(memory).transport.save()


def test_a_loaded_device_goes_on_where_the_saved_one_was() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        driver = bench.bring_up(memory)
        for _ in range(3):
            driver.offer([Buffer(DATA_REGION[0], 1, True)])
            bench.transport.serve(0)
        driver.collect()
        driver.offer([Buffer(DATA_REGION[0], 1, True)])  # and its doorbell is lost with the descriptor it was in
        other = Bench(memory)
        other.transport.load(bench.transport.save())
        other.transport.kick()
        assert sorted(other.rung) == [0, 1]
        other.serve()
        assert len(driver.collect()) == 1


def test_chains_that_are_out_cannot_be_saved() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        driver = bench.bring_up(memory)
        driver.offer([Buffer(DATA_REGION[0], 1, True)])
        assert bench.device.queues[0].pop(bench.device.queues[0].new_chain())
        with pytest.raises(ValueError, match="1 chains are out"):
            bench.transport.save()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("status", {"status": 256}),
        ("status", {"status": 4}),
        ("driver_features", {"driver_features": 1 << 64}),
        ("driver_features", {"driver_features": F_EVENT_IDX}),
        ("queues", {"queues": []}),
        ("queues", {"queues": [{}, {}]}),
        ("queues[0]", {"first": {"size": 7}}),
        ("queues[0]", {"first": {"size": 16}}),
        ("queues[0]", {"first": {"next_available": 3}}),
        ("queues[0]", {"first": {"device_area": 0x20000}}),
        ("queues[0]", {"first": {"device_area": 1 << 64}}),
        ("queues[0]", {"first": {"ready": False, "notified": 1}}),
        ("queues[0]", {"status": 3}),
        ("queues", {"first": {"extra": 1}}),
        ("color", {"color": 1}),
        ("color", {"device": {"color": 1}}),
        ("(state)", {"device": 7}),
    ],
)
def test_bad_state_is_refused_and_nothing_of_it_applied(field: str, change: dict[str, Any]) -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        bench.bring_up(memory)
        good = bench.transport.save()
        bad = {**good, **{k: v for k, v in change.items() if k != "first"}}
        if "first" in change:
            bad["queues"] = [{**good["queues"][0], **change["first"]}, good["queues"][1]]
        with pytest.raises(SectionError) as caught:
            bench.transport.load(bad)
        assert caught.value.field == field
        assert bench.transport.save() == good and bench.device.active


@pytest.mark.parametrize("missing", ["queues", "device", "status"])
def test_state_that_lacks_a_field_is_refused(missing: str) -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        state = bench.transport.save()
        del state[missing]
        with pytest.raises(SectionError, match=f"{missing}: missing"):
            bench.transport.load(state)
        with pytest.raises(SectionError, match="expected a mapping"):
            bench.transport.load([])  # type: ignore[arg-type]
