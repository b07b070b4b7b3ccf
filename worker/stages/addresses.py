"""Which addresses may be connected to, and which spellings of a host are addresses in disguise.

An image's URL is written by a stranger. The worker stands inside a private network, next to services that trust
whoever can reach them (metadata services, admin ports, databases), so only addresses of the public internet are
connected to, judged by the number itself and never by the name (server-side request forgery, CWE-918).

The lists are IANA's IPv4 and IPv6 Special-Purpose Address Registries, written out because `ipaddress` changed its
mind between Python versions (6to4, 2001::/23, 192.0.0.0/24); what `ipaddress` calls not global is refused as well.
"""

from __future__ import annotations

import re
import socket
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address


class Reach(Enum):
    """How far an address reaches."""

    PUBLIC = "public"
    """On the public internet: allowed."""
    INTERNAL = "internal"
    """Loopback, private, link-local, shared, documentation, embedded IPv4: allowed by ALLOW_PRIVATE_ADDRESSES only."""
    NEVER = "never"
    """Metadata services, multicast, broadcast, unspecified, reserved: no image ever lies there."""


class DisguisedAddressError(ValueError):
    """The host is an IPv4 address in a form no honest URL has: 2130706433, 0x7f.1, 0177.0.0.1, 127.1, 127.0.0.1."""


def _v4(*networks: str) -> tuple[IPv4Network, ...]:
    return tuple(IPv4Network(network) for network in networks)


def _v6(*networks: str) -> tuple[IPv6Network, ...]:
    return tuple(IPv6Network(network) for network in networks)


# Credentials of the machine are handed out here to whoever asks. Several lie in ranges that would be allowed otherwise
# (168.63.129.16 is a public number), and no setting opens them.
_METADATA_V4 = _v4(
    "169.254.169.0/24",  # AWS, Google, Azure, Oracle, OpenStack, DigitalOcean
    "169.254.170.0/24",  # AWS ECS tasks, EKS pod identity
    "169.254.0.23/32",  # Tencent
    "169.254.42.42/32",  # Scaleway
    "100.100.100.200/32",  # Alibaba
    "168.63.129.16/32",  # Azure WireServer
    "192.0.0.192/32",  # Oracle, classic
)
_METADATA_V6 = _v6(
    "fd00:ec2::/32",  # AWS
    "fd20:ce::254/128",  # Google
    "fd00:c1::a9fe:a9fe/128",  # Oracle
    "fd00:42::42/128",  # Scaleway
)
_NEVER_V4 = _v4("0.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4")
_NEVER_V6 = _v6("::/128", "ff00::/8")

_INTERNAL_V4 = _v4(
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
)
_GLOBAL_UNICAST_V6 = IPv6Network("2000::/3")
_INTERNAL_V6 = _v6("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")

_MAPPED = IPv6Network("::ffff:0:0/96")
_TRANSLATED = IPv6Network("::ffff:0:0:0/96")
_COMPATIBLE = IPv6Network("::/96")
_NAT64 = IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = IPv6Network("64:ff9b:1::/48")
_SIX_TO_FOUR = IPv6Network("2002::/16")
_TEREDO = IPv6Network("2001::/32")
_LOOPBACK_V6 = IPv6Address("::1")


def reach(address: Address) -> Reach:
    """Judge one address by its number."""
    if isinstance(address, IPv4Address):
        return _reach_v4(address)
    return _reach_v6(address)


def allowed(address: Address, *, allow_private: bool) -> bool:
    """Whether a connection may be made to this address under FETCH__ALLOW_PRIVATE_ADDRESSES."""
    found = reach(address)
    return found is Reach.PUBLIC or (found is Reach.INTERNAL and allow_private)


def _reach_v4(address: IPv4Address) -> Reach:
    if any(address in network for network in (*_METADATA_V4, *_NEVER_V4)):
        return Reach.NEVER
    if any(address in network for network in _INTERNAL_V4) or not address.is_global:
        return Reach.INTERNAL
    return Reach.PUBLIC


def _reach_v6(address: IPv6Address) -> Reach:
    if any(address in network for network in (*_METADATA_V6, *_NEVER_V6)):
        return Reach.NEVER
    inner = [_reach_v4(embedded) for embedded in _embedded(address)]
    if Reach.NEVER in inner:
        return Reach.NEVER
    if address in _NAT64:
        # On IPv6-only networks DNS64 gives every IPv4 host this form: it is as public as the address inside.
        return inner[0]
    if inner or address not in _GLOBAL_UNICAST_V6 or not address.is_global:
        return Reach.INTERNAL
    if any(address in network for network in _INTERNAL_V6):
        return Reach.INTERNAL
    return Reach.PUBLIC


def _embedded(address: IPv6Address) -> list[IPv4Address]:
    """The IPv4 addresses that a gateway or the kernel would reach through this one."""
    bits = int(address)
    low = IPv4Address(bits & 0xFFFFFFFF)
    if address in _COMPATIBLE:
        return [] if address == _LOOPBACK_V6 else [low]
    if any(address in network for network in (_MAPPED, _TRANSLATED, _NAT64, _NAT64_LOCAL)):
        return [low]
    if address in _SIX_TO_FOUR:
        return [IPv4Address((bits >> 80) & 0xFFFFFFFF)]
    if address in _TEREDO:  # RFC 4380: server, and the client's address with every bit turned
        return [IPv4Address((bits >> 64) & 0xFFFFFFFF), IPv4Address(~bits & 0xFFFFFFFF)]
    return []


def literal(host: str) -> Address | None:
    """The address a host spells, None for a name.

    Args:
        host: ASCII, without brackets and zone.

    Raises:
        DisguisedAddressError: the last label is a number (what `inet_aton` and browsers read as IPv4), but the whole is
            not four plain decimal bytes. `disguised` reads those.
    """
    if ":" in host:
        try:
            return ip_address(host)
        except ValueError as error:
            raise DisguisedAddressError("not an IPv6 address") from error
    if not re.fullmatch(r"[0-9]+|0[xX][0-9a-fA-F]*", host.removesuffix(".").rpartition(".")[2]):
        return None
    try:
        return IPv4Address(host)
    except ValueError as error:
        raise DisguisedAddressError("an IPv4 address in a numeric form that is not four decimal bytes") from error


def disguised(host: str) -> IPv4Address | None:
    """What the C library makes of a disguised IPv4 address; None where even that is none."""
    try:
        return IPv4Address(socket.inet_aton(host.removesuffix(".")))
    except (OSError, ValueError):
        return None
