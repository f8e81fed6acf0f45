"""What a scraper asks for: a VM's protection as Prometheus text, over HTTP at ``--metrics HOST:PORT``.

Names begin with ``pyvmm_colo_``; times are seconds, sizes bytes, as Prometheus wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pyvmm.colo.session import ColoSession
from pyvmm.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

END_DEADLINE = 5.0
BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class _Collector:
    def __init__(self, session: ColoSession) -> None:
        self._session = session

    def collect(self) -> Iterator[Metric]:
        """Called by the library for each scrape, on its thread."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        session, counters = self._session, self._session.counters
        role = GaugeMetricFamily("pyvmm_colo_role", "What this side is", labels=["role", "mode", "pair"])
        role.add_metric([session.role, session.mode, session.pair], 1)
        yield role
        yield GaugeMetricFamily("pyvmm_colo_term", "How often the pair has changed hands", value=session.term)
        yield GaugeMetricFamily("pyvmm_colo_epoch", "Checkpoints of this pair", value=session.epoch)
        yield CounterMetricFamily("pyvmm_colo_checkpoints", "Checkpoints made", value=counters.checkpoints)
        yield CounterMetricFamily("pyvmm_colo_bytes", "Bytes of checkpoints", value=counters.bytes)
        reasons = CounterMetricFamily("pyvmm_colo_reasons", "Why checkpoints were made", labels=["reason"])
        for reason, count in list(counters.reasons.items()):
            reasons.add_metric([reason], count)
        yield reasons
        yield CounterMetricFamily("pyvmm_colo_failovers", "Times this side became the guest's only one",
                                  value=counters.failovers)  # fmt: skip
        times = list(counters.times)
        for name, text, values in (
            ("pause", "The guest stood still", [one.pause for one in times]),
            ("received", "Request to vmstate-received", [one.received for one in times]),
        ):
            yield HistogramMetricFamily(f"pyvmm_colo_{name}_seconds", f"{text}; of the last {len(times)} checkpoints",
                                        buckets=_buckets(values), sum_value=sum(values))  # fmt: skip
        if session.heartbeat is not None:
            silence = session.heartbeat.counts.longest_silence
            yield GaugeMetricFamily("pyvmm_colo_longest_silence_seconds", "Of the heartbeat", value=silence)


def _buckets(values: Sequence[float]) -> list[tuple[str, float]]:
    counted = [(str(bound), float(sum(value <= bound for value in values))) for bound in BOUNDS]
    return [*counted, ("+Inf", float(len(values)))]


def serve_metrics(address: str, session: ColoSession) -> Callable[[], None]:
    """Answer scrapers at ``HOST:PORT``; what ends it. ConfigError: that cannot be."""
    from prometheus_client import CollectorRegistry, start_http_server

    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--metrics {address!r}: has to be HOST:PORT")
    registry = CollectorRegistry()
    registry.register(_Collector(session))
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise ConfigError(f"--metrics {address}: {error.strerror or error}") from None

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join(END_DEADLINE)

    return end
