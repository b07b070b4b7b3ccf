"""Addresses are judged by number, against a second reading of IANA's registries."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.stages.addresses import DisguisedAddressError, Reach, allowed, disguised, literal, reach

# Globally reachable = False (or multicast, or reserved) in the IANA IPv4 Special-Purpose Address Registry.
NOT_PUBLIC_V4 = [
    "0.0.0.0/8",
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
    "224.0.0.0/4",
    "240.0.0.0/4",
    "168.63.129.16/32",
]
EDGES = [int(end) for net in map(ip_network, NOT_PUBLIC_V4) for end in (net[0], net[-1])]
NEAR_EDGES = [value for edge in EDGES for value in (edge - 1, edge, edge + 1) if 0 <= value < 2**32]

v4 = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from(NEAR_EDGES)).map(IPv4Address)


def public_by_the_book(address: IPv4Address) -> bool:
    return not any(
        int(ip_network(net)[0]) <= int(address) <= int(ip_network(net)[-1])  # not `in`: a second way of asking
        for net in NOT_PUBLIC_V4
    )


@given(v4)
def test_ipv4_is_public_exactly_where_the_registry_says_so(address: IPv4Address) -> None:
    assert (reach(address) is Reach.PUBLIC) == public_by_the_book(address)


@pytest.mark.parametrize("value", NEAR_EDGES)
def test_the_borders_of_every_range(value: int) -> None:
    assert (reach(IPv4Address(value)) is Reach.PUBLIC) == public_by_the_book(IPv4Address(value))


def embeddings(address: IPv4Address) -> dict[str, IPv6Address]:
    low = int(address)
    return {
        "mapped": IPv6Address(int(IPv6Address("::ffff:0:0")) | low),
        "translated": IPv6Address(int(IPv6Address("::ffff:0:0:0")) | low),
        "compatible": IPv6Address(low),
        "nat64": IPv6Address(int(IPv6Address("64:ff9b::")) | low),
        "nat64_local": IPv6Address(int(IPv6Address("64:ff9b:1::")) | low),
        "6to4": IPv6Address((0x2002 << 112) | (low << 80) | 1),
        "teredo_client": IPv6Address((0x20010000 << 96) | (0x08080808 << 64) | (low ^ 0xFFFFFFFF)),
        "teredo_server": IPv6Address((0x20010000 << 96) | (low << 64) | (0x08080808 ^ 0xFFFFFFFF)),
    }


@given(v4)
def test_an_ipv6_address_is_never_more_public_than_the_ipv4_address_inside(address: IPv4Address) -> None:
    order = [Reach.NEVER, Reach.INTERNAL, Reach.PUBLIC]
    for name, outer in embeddings(address).items():
        if name == "compatible" and int(address) in (0, 1):
            continue  # :: and ::1 are what they are
        assert order.index(reach(outer)) <= order.index(reach(address)), name
        if name == "nat64":
            assert reach(outer) is reach(address)
        else:
            assert reach(outer) is not Reach.PUBLIC, name


@given(st.integers(0, 2**128 - 1).map(IPv6Address))
def test_public_ipv6_is_global_unicast(address: IPv6Address) -> None:
    if reach(address) is Reach.PUBLIC and address not in IPv6Network("64:ff9b::/96"):
        assert address.is_global
        assert int(address) >> 125 == 1  # 2000::/3
        assert not (address.is_multicast or address.is_private or address.is_loopback or address.is_link_local)


@given(st.one_of(v4, st.integers(0, 2**128 - 1).map(IPv6Address)))
def test_the_setting_only_adds(address: IPv4Address | IPv6Address) -> None:
    if allowed(address, allow_private=False):
        assert allowed(address, allow_private=True)
    if reach(address) is Reach.NEVER:
        assert not allowed(address, allow_private=True)


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1",
        "127.8.8.8",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.1.1",
        "100.64.0.1",
        "198.18.0.1",
        "192.0.2.1",
        "::1",
        "fe80::1",
        "fe80::1%2",
        "fc00::1",
        "fd12::1",
        "fec0::1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "::127.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::8.8.8.8",
        "2002:7f00:1::1",
        "2001:db8::1",
        "3fff::1",
        "5f00::1",
        "100::1",
        "4000::1",
        "2001:1::1",
        "2001:20::1",
    ],
)
def test_internal_addresses_need_the_setting(text: str) -> None:
    assert not allowed(ip_address(text), allow_private=False)
    assert allowed(ip_address(text), allow_private=True)


@pytest.mark.parametrize(
    "text",
    [
        "169.254.169.254",
        "169.254.170.2",
        "169.254.170.23",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd20:ce::254",
        "::ffff:169.254.169.254",
        "64:ff9b::169.254.169.254",
        "2002:a9fe:a9fe::1",
        "::ffff:0:a9fe:a9fe",
        "64:ff9b:1::a9fe:a9fe",
        "0.0.0.0",
        "0.1.2.3",
        "::",
        "224.0.0.1",
        "239.255.255.250",
        "ff02::1",
        "ff0e::1",
        "255.255.255.255",
        "240.0.0.1",
        "::ffff:0.0.0.0",
    ],
)
def test_metadata_multicast_and_unspecified_are_never_reached(text: str) -> None:
    assert not allowed(ip_address(text), allow_private=True)


@pytest.mark.parametrize(
    "text", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::1", "64:ff9b::8.8.8.8"]
)
def test_the_public_internet_is_allowed(text: str) -> None:
    assert allowed(ip_address(text), allow_private=False)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("2130706433", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("127.0.0.1.", "127.0.0.1"),
        ("0", "0.0.0.0"),
        ("1.2.3.4.5", None),
        ("256.1.1.1", None),
        ("example.0x", None),
    ],
)
def test_numeric_tricks_are_seen(text: str, meant: str | None) -> None:
    with pytest.raises(DisguisedAddressError):
        literal(text)
    assert disguised(text) == (None if meant is None else IPv4Address(meant))


@given(v4)
def test_every_spelling_of_an_ipv4_address_is_either_plain_or_seen_through(address: IPv4Address) -> None:
    value = int(address)
    a, b, c, d = address.packed
    assert literal(str(address)) == address
    for spelling in (str(value), hex(value), f"0{value:o}", f"{a}.{value & 0xFFFFFF}", f"{hex(a)}.{b}.{c}.{d}"):
        if spelling == str(address):
            continue
        try:
            found = literal(spelling)
        except DisguisedAddressError:
            found = disguised(spelling)
        assert found == address, spelling


@pytest.mark.parametrize("host", ["example.org", "localhost", "a.b.c", "1.example", "0x7f.example", "example.1a"])
def test_names_are_not_addresses(host: str) -> None:
    assert literal(host) is None
