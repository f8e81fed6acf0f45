"""Network address translation for a network: its guests reach what the host reaches, in the host's name.

Each network has an nftables table of its own, ``pyvmm-NAME``; no other table is read, changed or relied on. It goes as
a whole, so nothing of it can stay. What it does, in nft's words::

    table ip pyvmm-demo {
        chain leave   { type nat hook postrouting priority srcnat;
                        ip saddr 10.91.0.0/24 oifname != "pvm-demo" masquerade }
        chain forward { type filter hook forward priority filter;
                        iifname "eth0" ct state != established,related drop              # (1)
                        oifname "pvm-demo" iifname != "pvm-demo" ct state != established,related drop }
    }

Linux forwards a packet if the device it came in by forwards. That is switched on for the bridge, where it goes with
the bridge, and for the device of the default route. If that one did not forward before, rule (1) lets only answers
pass, so that the host is no more of a router than it was; and the table's comment remembers to switch it off with the
last network that needs it.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from typing import Any

import msgspec

from pyvmm.errors import HostError
from pyvmm.net.links import read_option, set_option

# <linux/netfilter/nf_tables.h>, <linux/netfilter_ipv4.h>, <linux/netfilter/nf_conntrack_common.h>
_NF_INET_FORWARD, _NF_INET_POST_ROUTING = 2, 4
_PRIORITY_FILTER, _PRIORITY_SRCNAT = 0, 100
_NF_DROP, _NF_ACCEPT = 0, 1
_EQ, _NEQ = 0, 1
_META_IIFNAME, _META_OIFNAME = 6, 7
_CT_STATE = 0
_CT_ESTABLISHED, _CT_RELATED = 1 << 1, 1 << 2
_NETWORK_HEADER, _SOURCE_ADDRESS = 1, 12
_REGISTER = 1
_BATCH_BEGIN, _BATCH_END, _SUBSYSTEM = 0x10, 0x11, 10  # <linux/netfilter/nfnetlink.h>
_REQUEST, _ACK, _CREATE = 0x1, 0x4, 0x400  # <linux/netlink.h>


class Uplink(msgspec.Struct, frozen=True):
    """The device to the outside, and whether it forwarded before pyvmm came; kept as the table's comment."""

    device: str
    forwarded: bool


def table_name(network: str) -> str:
    """The table that ``network`` has for itself."""
    return f"pyvmm-{network}"


def set_up(network: str, bridge: str, cidr: IPv4Network, device: str) -> None:
    """Translate what comes from ``cidr`` behind ``bridge``; ``device`` leads outside. HostError.

    A table that is there is replaced, in one transaction.
    """
    with _nftables() as nft:
        tables = _read_tables(nft)
        before = tables.get(table_name(network))
        uplink = _known(tables, device) or Uplink(device, bool(read_option("ipv4", device, "forwarding")))
        _commit(nft, [
            *_removal(table_name(network), tables),
            *_table(table_name(network), bridge, cidr, uplink),
        ])  # fmt: skip
        tables[table_name(network)] = uplink
    set_option("ipv4", bridge, "forwarding", True)
    set_option("ipv4", device, "forwarding", True)
    _give_back(before, tables)


def take_down_if_there(network: str) -> bool:
    """Remove the table, and switch forwarding off again if that was ours and nobody else needs it.

    False: there was none, or no nftables at all.
    """
    if missing() is not None:
        return False
    with _nftables() as nft:
        tables = _read_tables(nft)
        there = table_name(network) in tables
        _commit(nft, list(_removal(table_name(network), tables)))
        uplink = tables.pop(table_name(network), None)
    _give_back(uplink, tables)
    return there


def uplink_of(network: str) -> str | None:
    """The device that ``network`` leaves by; ``None``: it is not translated, or this user may not know."""
    try:
        with _nftables() as nft:
            found = _read_tables(nft).get(table_name(network))
    except HostError:
        return None
    return found.device if found is not None else None


def missing() -> str | None:
    """What this host lacks for translation, or ``None``."""
    try:
        with _nftables() as nft:
            _read_tables(nft)
    except HostError as error:
        return str(error)
    return None


def _known(tables: dict[str, Uplink | None], device: str) -> Uplink | None:
    """What another network wrote down about ``device`` before any of them changed it."""
    return next((u for u in tables.values() if u is not None and u.device == device), None)


def _give_back(uplink: Uplink | None, tables: dict[str, Uplink | None]) -> None:
    """Let ``uplink`` be as it was, unless one of ``tables`` still needs it."""
    if uplink is not None and not uplink.forwarded and _known(tables, uplink.device) is None:
        set_option("ipv4", uplink.device, "forwarding", False)


@contextmanager
def _nftables() -> Iterator[Any]:
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.nftables.main import NFTables

    try:
        with NFTables(nfgen_family=2) as nft:
            yield nft
    except (NetlinkError, OSError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno or 0
        if code in (errno.EPERM, errno.EACCES):
            remedy = "it needs CAP_NET_ADMIN; run as root"
        elif code in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOENT):
            remedy = "the kernel lacks nf_tables, nft_masq or nft_ct; load them, or go without --nat"
        else:
            remedy = "go without --nat"
        raise HostError(f"nftables: {os.strerror(code)}: {remedy}") from None


def _read_tables(nft: Any) -> dict[str, Uplink | None]:
    """pyvmm's tables -> what their comments say."""
    found: dict[str, Uplink | None] = {}
    for message in nft.get_tables():
        name = message.get_attr("NFTA_TABLE_NAME")
        if name.startswith("pyvmm-"):
            try:
                found[name] = msgspec.json.decode(message.get_attr("NFTA_TABLE_USERDATA") or "", type=Uplink)
            except msgspec.DecodeError:
                found[name] = None
    return found


def _commit(nft: Any, messages: list[Any]) -> None:
    """All of ``messages`` or none (nfnetlink's batch)."""
    if messages:
        nft.nlm_request_batch([_bound(_BATCH_BEGIN), *messages, _bound(_BATCH_END)])


def _bound(kind: int) -> Any:
    from pyroute2.netlink.nfnetlink import nfgen_msg

    message = nfgen_msg()
    message["res_id"] = _SUBSYSTEM
    message["header"]["type"], message["header"]["flags"] = kind, _REQUEST
    return message


def _message(maker: Any, kind: int, flags: int, **attributes: Any) -> Any:
    message = maker()
    message["attrs"] = [(maker.name2nla(name), value) for name, value in attributes.items()]
    message["header"]["type"], message["header"]["flags"] = _SUBSYSTEM << 8 | kind, _REQUEST | _ACK | flags
    message["nfgen_family"] = 2
    return message


def _removal(name: str, tables: dict[str, Uplink | None]) -> Iterator[Any]:
    from pyroute2.netlink.nfnetlink.nftsocket import NFT_MSG_DELTABLE, nft_table_msg

    if name in tables:
        yield _message(nft_table_msg, NFT_MSG_DELTABLE, 0, name=name)


def _table(name: str, bridge: str, cidr: IPv4Network, uplink: Uplink) -> Iterator[Any]:
    from pyroute2.netlink.nfnetlink.nftsocket import (
        NFT_MSG_NEWCHAIN,
        NFT_MSG_NEWRULE,
        NFT_MSG_NEWTABLE,
        nft_chain_msg,
        nft_rule_msg,
        nft_table_msg,
    )
    from pyroute2.nftables.expressions import masq, verdict

    def chain(chain_name: str, kind: str, hook: int, priority: int) -> Any:
        at = {"attrs": [("NFTA_HOOK_HOOKNUM", hook), ("NFTA_HOOK_PRIORITY", priority)]}
        return _message(nft_chain_msg, NFT_MSG_NEWCHAIN, _CREATE, table=name, name=chain_name, hook=at,
                        policy=_NF_ACCEPT, type=kind)  # fmt: skip

    def rule(chain_name: str, *parts: list[Any]) -> Any:
        return _message(nft_rule_msg, NFT_MSG_NEWRULE, _CREATE | 0x800, table=name, chain=chain_name,
                        expressions=[expression for part in parts for expression in part])  # fmt: skip

    drop = verdict(code=_NF_DROP)
    yield _message(nft_table_msg, NFT_MSG_NEWTABLE, _CREATE, name=name,
                   userdata=msgspec.json.encode(uplink).decode())  # fmt: skip
    yield chain("leave", "nat", _NF_INET_POST_ROUTING, _PRIORITY_SRCNAT)
    yield rule("leave", _source_in(cidr), _device(_META_OIFNAME, _NEQ, bridge), masq())
    yield chain("forward", "filter", _NF_INET_FORWARD, _PRIORITY_FILTER)
    if not uplink.forwarded:
        yield rule("forward", _device(_META_IIFNAME, _EQ, uplink.device), _no_answer(), drop)
    inward = _device(_META_OIFNAME, _EQ, bridge), _device(_META_IIFNAME, _NEQ, bridge)
    yield rule("forward", *inward, _no_answer(), drop)


def _compare(operation: int, value: bytes) -> Any:
    from pyroute2.nftables.expressions import genex

    return genex("cmp", {"sreg": _REGISTER, "op": operation, "data": _value(value)})


def _value(data: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", data)]}


def _masked(mask: bytes) -> Any:
    from pyroute2.nftables.expressions import genex

    return genex("bitwise", {"sreg": _REGISTER, "dreg": _REGISTER, "len": len(mask), "mask": _value(mask),
                             "xor": _value(bytes(len(mask)))})  # fmt: skip


def _source_in(cidr: IPv4Network) -> list[Any]:
    """``ip saddr CIDR``"""
    from pyroute2.nftables.expressions import genex

    load = genex("payload", {"dreg": _REGISTER, "base": _NETWORK_HEADER, "offset": _SOURCE_ADDRESS, "len": 4})
    return [load, _masked(cidr.netmask.packed), _compare(_EQ, cidr.network_address.packed)]


def _device(key: int, operation: int, name: str) -> list[Any]:
    """``iifname NAME`` and its like: all 16 bytes are compared."""
    from pyroute2.nftables.expressions import genex

    return [genex("meta", {"key": key, "dreg": _REGISTER}), _compare(operation, name.encode().ljust(16, b"\0"))]


def _no_answer() -> list[Any]:
    """``ct state != established,related``"""
    from pyroute2.nftables.expressions import genex

    # The state is a number in the host's byte order.
    bits = struct.pack("=I", _CT_ESTABLISHED | _CT_RELATED)
    return [genex("ct", {"key": _CT_STATE, "dreg": _REGISTER}), _masked(bits), _compare(_EQ, bytes(4))]
