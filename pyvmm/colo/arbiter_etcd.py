"""The arbiter in etcd: one transaction of its v3 API, spoken as JSON over HTTP (etcd's gRPC gateway).

https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/: keys and values are base64; a transaction compares, then puts. It
goes through a majority of etcd's members or fails; reads are linearizable unless asked otherwise.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import time
from typing import Any

import msgspec

from pyvmm.colo.arbiter import REGISTER_MAX, ArbiterAway, Register, decode_register
from pyvmm.errors import ConfigError, HostError

PREFIX = "pyvmm/colo/"
ANSWER_MAX = 64 << 10
ONE_TRY = 0.5
"""Seconds for one member; then the next is asked."""


class EtcdArbiter:
    """``endpoints``: ``HOST:PORT,...``, the members of one etcd cluster; any of them answers for all."""

    def __init__(self, endpoints: str) -> None:
        self._members: list[tuple[str, int]] = []
        for text in endpoints.split(","):
            host, colon, port = text.rpartition(":")
            if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ConfigError(f"--arbiter etcd:{endpoints}: {text!r} has to be HOST:PORT")
            self._members.append((host.strip("[]"), int(port)))

    def read(self, pair: str, seconds: float) -> Register | None:
        """See Arbiter."""
        answer = self._call("/v3/kv/range", {"key": _base64(PREFIX + pair)}, seconds)
        stored = answer.get("kvs", [])
        return self._register(stored[0], pair) if stored else None

    def compare_and_swap(self, pair: str, old: Register | None, new: Register, seconds: float) -> bool:
        """See Arbiter."""
        key = _base64(PREFIX + pair)
        compare: dict[str, Any] = {"key": key, "target": "VERSION", "result": "EQUAL", "version": "0"}
        if old is not None:
            value = _base64(msgspec.json.encode(old))
            compare = {"key": key, "target": "VALUE", "result": "EQUAL", "value": value}
        put = {"requestPut": {"key": key, "value": _base64(msgspec.json.encode(new))}}
        answer = self._call("/v3/kv/txn", {"compare": [compare], "success": [put]}, seconds)
        return answer.get("succeeded") is True

    def _register(self, entry: Any, pair: str) -> Register:
        try:
            stored = base64.b64decode(entry["value"], validate=True)
        except (TypeError, KeyError, ValueError, binascii.Error):
            raise HostError(f"etcd: what it says of {pair} has no value") from None
        return decode_register(stored[: REGISTER_MAX + 1], f"etcd's {PREFIX}{pair}")

    def _call(self, path: str, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """POST to one member after the other until one answers. ArbiterAway: none did in time.

        A member that fails halfway may have carried the transaction out; the next one's answer then is that the
        register is not what it was, and Ownership looks whether it is what it wanted.
        """
        until = time.monotonic() + seconds
        why = "no time"
        for host, port in self._members:
            left = until - time.monotonic()
            if left <= 0:
                break
            connection = http.client.HTTPConnection(host, port, timeout=min(left, ONE_TRY))
            try:
                connection.request("POST", path, msgspec.json.encode(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                text = response.read(ANSWER_MAX)
                if response.status == 200:
                    answer: dict[str, Any] = msgspec.json.decode(text, type=dict[str, Any])
                    return answer
                why = f"{host}:{port} answers {response.status}: {text[:200].decode(errors='replace').strip()}"
            except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
                why = f"{host}:{port}: {error or type(error).__name__}"
            finally:
                connection.close()
        raise ArbiterAway(f"etcd does not answer ({why}); is it running?")


def _base64(data: str | bytes) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()
