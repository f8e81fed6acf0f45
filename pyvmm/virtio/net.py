"""The network device (virtio 1.2, 5.1): configuration, control queue and link in Python, frames in the native pump.

A thread of the device's own runs ``native/net_pump.c``, which moves frames between the queues and the backend without
the interpreter. It comes back for what is not the data path: commands, a lost link, a broken ring, frames for filters.

The link. STATUS tells the driver whether there is one: it goes down when the tap is deleted or the peer hangs up, or by
:meth:`VirtioNet.set_link`. Frames sent over a link that is down are lost and counted, as with a cable pulled out.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable
from typing import Annotated, Any

from msgspec import Meta

from pyvmm.devices.state import DeviceState
from pyvmm.errors import HostError
from pyvmm.native import ffi, lib
from pyvmm.net.announcement import self_announcement
from pyvmm.net.backend import Backend
from pyvmm.net.filter import FilterChain, Frame
from pyvmm.net.mac import format_mac
from pyvmm.net.tap import HEADER_SIZE
from pyvmm.trace import trace_group
from pyvmm.virtio import net_control
from pyvmm.virtio import net_features as features
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.net_filtering import FilteredPath
from pyvmm.virtio.queue import PROBLEMS, NeedsReset, VirtQueue

T = trace_group("virtio")

RX, TX, CONTROL = 0, 1, 2
"""5.1.2, virtqueues."""
STATUS_LINK_UP, STATUS_ANNOUNCE = 1, 2
STALE_MAX = 4096
"""Frames from before the driver was ready that are thrown away; a tap keeps 1000."""
THREAD_DEADLINE = 5.0

_CONFIGURATION = struct.Struct("<6sHHH")  # 5.1.4: mac, status, max_virtqueue_pairs, mtu


class NetState(DeviceState):
    """``link_up``: what the driver was told last. ``guest_offloads``: feature bits in force (CTRL_GUEST_OFFLOADS)."""

    mac: Annotated[bytes, Meta(min_length=6, max_length=6)] = bytes(6)
    link_up: bool = True
    announce: bool = False
    guest_offloads: Annotated[int, Meta(ge=0)] = 0

    def problem(self) -> tuple[str, str] | None:
        """Only offloads that exist."""
        if self.guest_offloads & ~features.GUEST_OFFLOADS:
            return "guest_offloads", f"{self.guest_offloads:#x} are not all offloads"
        return None


class VirtioNet(VirtioDevice):
    """One card on ``backend``, which it owns from here on.

    ``report`` is told in one line what its user should know: that the link is lost, and why.
    """

    name = "virtio-net"
    device_id = 1
    queue_sizes = (256, 256, 64)
    state_type = NetState

    def __init__(
        self, memory_table: Any, backend: Backend, mac: bytes, report: Callable[[str], None] = lambda text: None
    ) -> None:
        super().__init__(memory_table)
        self.backend = backend
        self.mtu = backend.mtu
        self.features = features.PLAIN
        if backend.carries_header:
            self.features |= features.OFFLOADS
        if self.mtu is not None:
            self.features |= features.F_MTU
        self.power_on_mac = mac
        """What the card goes by until its driver says otherwise."""
        self._report = report
        self._link_wanted = True
        self._link_lost = False
        self._fresh = True  # the driver that starts next is no one's continuation
        self._chain = self.queues[CONTROL].new_chain()
        self._native: Any = None
        self._thread: threading.Thread | None = None
        self.filters = FilterChain(self._filters_changed)
        self._path: FilteredPath | None = None
        self._power_on()

    def _power_on(self) -> None:
        self.state = NetState(mac=self.power_on_mac, link_up=self.link_up)

    # -- configuration --------------------------------------------------------------------------

    def acceptable(self, features_: int) -> bool:
        """5.1.3.1."""
        return features.consistent(features_)

    def configuration(self) -> bytes:
        """5.1.4: mac, status, max_virtqueue_pairs, mtu."""
        s = self.state
        status = (STATUS_LINK_UP if s.link_up else 0) | (STATUS_ANNOUNCE if s.announce else 0)
        return _CONFIGURATION.pack(s.mac, status, 1, self.mtu or 0)

    def may(self, feature: int) -> bool:
        """Whether ``feature`` was negotiated."""
        return bool(self.negotiated & feature)

    # -- the link -------------------------------------------------------------------------------

    @property
    def link_up(self) -> bool:
        """Whether frames get through."""
        return self._link_wanted and not self._link_lost

    def set_link(self, up: bool) -> None:
        """Plug the cable in, or pull it out. One whose backend is gone stays down."""
        with self.lock:
            self._link_wanted = up
            if self._native is not None:
                lib.pv_net_set_link(self._native, self.link_up)
            self._tell_link()

    def announce(self) -> bool:
        """Ask the driver to send gratuitous packets (5.1.6.5.4), for the guest has moved; ``False``: it cannot."""
        with self.lock:
            if not (self.active and self.may(features.F_GUEST_ANNOUNCE)):
                return False
            self.state.announce = True
            self._configuration_changed()
            return True

    def arriving(self) -> None:
        """Frames for the guest wait in the backend from now on: so none is lost while it stands still."""
        self.claim()
        self.backend.announce(self_announcement(self.state.mac))

    def left(self) -> None:
        """The guest runs elsewhere."""
        with contextlib.suppress(HostError):
            self.backend.release()

    def claim(self) -> None:
        """The guest is ours. A tap that was deleted meanwhile is a lost link, and no reason to stop."""
        with contextlib.suppress(HostError):
            self.backend.claim()

    def moved(self) -> None:
        """Switches must learn where the guest is now.

        The host tells them at once, in the guest's name; the driver, if it can, tells its addresses, too.
        """
        with self.lock:
            if self.active:
                self.filters.emit(Frame(bytes(HEADER_SIZE), self_announcement(self.state.mac)))
        self.announce()

    def _tell_link(self) -> None:
        if self.state.link_up != self.link_up:
            self.state.link_up = self.link_up
            T.virtio_net_link.on and T.virtio_net_link(self.backend.name, self.link_up)
            self._configuration_changed()

    def _configuration_changed(self) -> None:
        if self.transport is not None:
            self.transport.configuration_changed()

    def _lose_link(self) -> None:
        error = self._native.link_error
        why = "the peer sent a length that no frame has" if error == lib.PV_NET_BAD_LENGTH else os.strerror(error)
        with self.lock:
            self._link_lost = True
            self._report(f"{self.backend.name}: {why}: the guest's network link is down")
            self._tell_link()

    # -- commands (net_control.Controlled) ------------------------------------------------------

    def serve_queue(self, queue: VirtQueue) -> bool:
        """The control queue; the others are the pump's."""
        chain = self._chain
        for _ in range(queue.size):
            if not queue.pop(chain):
                return queue.enable_kicks()
            if not chain.writable:
                raise NeedsReset(f"queue {queue.index}: a command without room for its answer")
            command = chain.read(0, net_control.COMMAND_MAX)
            answer = net_control.carry_out(self, command)
            T.virtio_net_control.on and T.virtio_net_control(self.backend.name, command[:2].hex(), answer)
            queue.push(chain, chain.write(0, bytes([answer])))
        return True

    def set_mac(self, mac: bytes) -> None:
        """The driver goes by another address from now on."""
        self.state.mac = mac
        T.virtio_net_mac.on and T.virtio_net_mac(self.backend.name, format_mac(mac))

    def announced(self) -> None:
        """The driver has sent its gratuitous packets."""
        self.state.announce = False

    def set_guest_offloads(self, wanted: int) -> bool:
        """What the driver copes with from now on: some of what was negotiated."""
        if wanted & ~(self.negotiated & features.GUEST_OFFLOADS):
            return False
        self.state.guest_offloads = wanted
        return self._pass_offloads_on()

    def _pass_offloads_on(self) -> bool:
        try:
            self.backend.set_offload(features.tap_offloads(self.state.guest_offloads))
        except HostError:
            return False  # the tap is gone; the pump will find out and say so
        return True

    # -- the pump -------------------------------------------------------------------------------

    def take_doorbells(self, doorbells: list[int], interrupt: Any) -> bool:
        """Start the device's thread; it waits for all three."""
        rx, tx = self.queues[RX].native, self.queues[TX].native
        native = lib.pv_net_new(rx, tx, interrupt)
        if native == ffi.NULL:
            raise HostError(f"{self.backend.name}: no network pump: {os.strerror(ffi.errno)}")
        self._native = native
        if lib.pv_net_add_doorbells(native, *doorbells):
            raise HostError(f"{self.backend.name}: cannot wait for doorbells: {os.strerror(ffi.errno)}")
        lib.pv_net_set_backend(
            native, lib.PV_NET_TAP if self.backend.carries_header else lib.PV_NET_STREAM, self.backend.fd
        )
        lib.pv_net_set_link(native, self.link_up)
        self._path = FilteredPath(native, self.filters)
        self._path.chain_changed()
        self._thread = threading.Thread(target=self._run, name=f"net {self.backend.name}", daemon=True)
        self._thread.start()
        return True

    def _run(self) -> None:
        assert self._path is not None
        lib.pv_net_be_prompt()
        try:
            while (event := lib.pv_net_run(self._native)) != lib.PV_NET_STOPPED:
                if event == lib.PV_NET_FRAMES:
                    event = self._path.move()
                if event == lib.PV_NET_CONTROL:
                    self._look_at_control()
                elif event == lib.PV_NET_LINK_LOST:
                    self._lose_link()
                elif event == lib.PV_NET_BROKEN:
                    self._break()
        except BaseException:
            with self.lock:
                self.fail("the network pump came to an end")  # the guest must not wait for it
            raise

    def _look_at_control(self) -> None:
        with self.lock:
            while self.serve(CONTROL):
                pass
            if self.active:
                self._tell_link()  # a state that was loaded may have said otherwise

    def _break(self) -> None:
        queue, result = self._native.broken_queue, self._native.broken_result
        with self.lock:
            if self.queues[queue].native.broken:  # else the driver has reset the device meanwhile
                self.fail(f"queue {queue}: {PROBLEMS.get(result, 'a receive buffer that is none')}")

    def _filters_changed(self) -> None:
        if self._path is not None:
            self._path.chain_changed()

    def activated(self) -> None:
        """DRIVER_OK, or a state was loaded that had it."""
        if self._fresh:
            self.state.guest_offloads = self.negotiated & features.GUEST_OFFLOADS
        self._pass_offloads_on()
        if self._fresh and self._native is not None:
            # What came while nobody listened is stale, and perhaps larger than this driver has room for.
            lib.pv_net_discard(self._native, STALE_MAX)
        self._fresh = False

    def resume_io(self) -> None:
        """Let the pump go."""
        if self._native is not None:
            mtu = self.mtu if self.mtu is not None and self.may(features.F_MTU) else 0
            lib.pv_net_configure(self._native, self.negotiated & 0xFFFFFFFF, mtu)
            lib.pv_net_allow(self._native, 1)

    def suspend_io(self) -> None:
        """Have the pump keep off."""
        if self._native is not None:
            lib.pv_net_allow(self._native, 0)

    def reset(self) -> None:
        """Back to power-on; the link stays as it is, and so do filters."""
        super().reset()
        self._power_on()
        self._fresh = True

    def decode(self, section: str, data: object) -> Callable[[], None]:
        """As any device; and what comes in meanwhile is for the driver that goes on."""
        apply = super().decode(section, data)

        def apply_and_go_on() -> None:
            apply()
            self._fresh = False

        return apply_and_go_on

    def close(self) -> None:
        """End the thread, then close the backend."""
        if self._thread is not None:
            lib.pv_net_stop(self._native)
            self._thread.join(THREAD_DEADLINE)
            if self._thread.is_alive():  # a filter keeps it: what it uses stays
                raise HostError(f"{self.backend.name}: the network pump does not end")
            self._thread = None
        if self._native is not None:
            self._path = None
            native, self._native = self._native, None
            lib.pv_net_free(native)
        self.backend.close()

    def statistics(self) -> dict[str, int]:
        """Frames and bytes (without their headers) each way, and what was dropped, by reason."""
        if self._native is None:
            return {}
        counters = self._native.counters
        return {name: int(getattr(counters, name)) for name in COUNTERS}


COUNTERS: tuple[str, ...] = tuple(name for name, _ in ffi.typeof("struct pv_net_counters").fields)
"""The names in :meth:`VirtioNet.statistics`."""
