"""URLs are read strictly; what is refused is refused before anything is resolved."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import Code, ConfigurationError, ItemError
from worker.stages.addresses import DisguisedAddressError, literal
from worker.stages.fetch_urls import AllowedHosts, HttpUrl, follow, parse_http, parse_object

TRICKS = [
    "http://2130706433/",
    "http://0x7f.1/",
    "http://0x7f000001/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://127.0.0.1./",
    "http://1.2.3.4.5/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://１２７.0.0.1/",
    "http://127。0。0。1/",
    "http://①②⑦.0.0.1/",
    "http://①⑦②.16.0.1/",
]
MALFORMED = [
    "",
    "example.org/a.png",
    "//example.org/a.png",
    " http://example.org/",
    "http:/example.org/",
    "http:example.org",
    "http://",
    "http:///a.png",
    "http://?a",
    "http://user@example.org/",
    "http://user:secret@example.org/",
    "http://@example.org/",
    "http://example.org@127.0.0.1/",
    "http://example.org\\@127.0.0.1/",
    "http://127.0.0.1\\.example.org/",
    "http://127%2e0%2e0%2e1/",
    "http://%31%32%37.0.0.1/",
    "http://exa%6dple.org/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[::1",
    "http://[::1]x/",
    "http://[v1.x]/",
    "http://[]/",
    "http://[127.0.0.1]/",
    "http://::1/",
    "http://example.org:0/",
    "http://example.org:65536/",
    "http://example.org:-1/",
    "http://example.org:٨٠/",
    "http://example.org:80:80/",
    "http://example..org/",
    "http://.example.org/",
    "http://example.org../",
    "http://-example.org/",
    "http://exa mple.org/",
    "http://" + "a" * 64 + ".org/",
    "http://" + "a." * 127 + "org/",
    "http://" + "ü" * 300 + "/",
    "http://xn--\u0430.org/",
    "http://example.org/a\r\nHost: evil/",
    "http://example.org/a\tb",
    "http://example.org/\x00",
    "http://example.org/\ud800",
    "http://example.org/" + "a" * 20_000,
]
OTHER_SCHEMES = ["ftp://example.org/a", "gopher://127.0.0.1:6379/_", "data:image/png;base64,AAAA", "javascript:alert(1)"]


def code_of(error: pytest.ExceptionInfo[ItemError]) -> Code:
    assert "\n" not in error.value.message
    return error.value.code


@pytest.mark.parametrize("url", TRICKS + MALFORMED + OTHER_SCHEMES)
def test_refused(url: str) -> None:
    with pytest.raises(ItemError) as error:
        parse_http(url, allow_disguised=False)
    assert code_of(error) is Code.FETCH_DENIED
    assert "secret" not in error.value.message


@pytest.mark.parametrize("url", MALFORMED + OTHER_SCHEMES)
def test_the_setting_for_private_addresses_does_not_open_malformed_urls(url: str) -> None:
    with pytest.raises(ItemError) as error:
        parse_http(url, allow_disguised=True)
    assert code_of(error) is Code.FETCH_DENIED


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://example.org", HttpUrl("http", "example.org", 80, "/")),
        ("HTTPS://EXAMPLE.org./A.png?X=1&y=%20#frag", HttpUrl("https", "example.org", 443, "/A.png?X=1&y=%20")),
        ("https://example.org:8443/", HttpUrl("https", "example.org", 8443, "/")),
        ("https://example.org:/", HttpUrl("https", "example.org", 443, "/")),
        ("https://example.org?x=1", HttpUrl("https", "example.org", 443, "/?x=1")),
        ("https://example.org#x", HttpUrl("https", "example.org", 443, "/")),
        ("https://bücher.example/ü b.png", HttpUrl("https", "xn--bcher-kva.example", 443, "/%C3%BC%20b.png")),
        ("https://ｅｘａｍｐｌｅ.org/", HttpUrl("https", "example.org", 443, "/")),
        ("https://my_bucket.s3.example/", HttpUrl("https", "my_bucket.s3.example", 443, "/")),
        ("http://93.184.216.34/", HttpUrl("http", "93.184.216.34", 80, "/")),
        ("http://[2606:4700:0::1111]:81/", HttpUrl("http", "2606:4700::1111", 81, "/")),
        ("http://example.org/a@b:c", HttpUrl("http", "example.org", 80, "/a@b:c")),
        ("http://example.org/a'b\"c\\d", HttpUrl("http", "example.org", 80, "/a'b%22c%5Cd")),
    ],
)
def test_read(url: str, expected: HttpUrl) -> None:
    assert parse_http(url, allow_disguised=False) == expected


@pytest.mark.parametrize(("url", "host"), [("http://0x7f.1/", "127.0.0.1"), ("http://127.1/", "127.0.0.1")])
def test_with_the_setting_disguised_addresses_become_what_they_stand_for(url: str, host: str) -> None:
    assert parse_http(url, allow_disguised=True).host == host


@given(st.text(max_size=60), st.booleans())
def test_any_text_is_read_or_denied(rest: str, allow: bool) -> None:
    """Whatever comes out as a host is plain ASCII and a name, or an address that `ipaddress` agrees on."""
    try:
        url = parse_http(f"http://{rest}", allow_disguised=allow)
    except ItemError as error:
        assert error.code is Code.FETCH_DENIED
        return
    assert url.host.isascii() and url.target.isascii() and url.target.startswith("/")
    assert not set(url.host) & set("@/\\?#%[] ")
    assert 0 < url.port < 65_536
    try:
        address = literal(url.host)
    except DisguisedAddressError:
        pytest.fail(f"{url.host} is still disguised")
    if address is not None:
        assert str(ip_address(url.host)) == url.host
    assert parse_http(str(url), allow_disguised=allow) == url  # what is sent is what was judged


@given(st.text(alphabet="0123456789.xXabcdef１２７。:[]%", min_size=1, max_size=20))
def test_numeric_hosts(host: str) -> None:
    try:
        url = parse_http(f"http://{host}/", allow_disguised=False)
    except ItemError:
        return
    if url.host.replace(".", "").isdigit():
        assert url.host in host  # only four plain decimal bytes get through as an address


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        (b"/b.png", "http://example.org/b.png"),
        (b"b.png", "http://example.org/dir/b.png"),
        (b"//cdn.example.org/b", "http://cdn.example.org/b"),
        (b"https://other.example/x?y", "https://other.example/x?y"),
        (b"/caf\xc3\xa9", "http://example.org/caf%C3%A9"),
        (b"/caf\xe9", "http://example.org/caf%C3%A9"),
        (b"?q=1", "http://example.org/dir/a.png?q=1"),
    ],
)
def test_redirects_are_resolved(location: bytes, expected: str) -> None:
    current = parse_http("http://example.org/dir/a.png", allow_disguised=False)
    assert str(follow(current, location, allow_disguised=False)) == expected


@pytest.mark.parametrize(
    "location",
    [
        b"file:///etc/passwd",
        b"s3://bucket/key",
        b"gopher://x/",
        b"http://0x7f.1/",
        b"http://user@x/",
        b"//[::1",
        b"h\ttp://x/",
        b"http://[fe80::1%25lo]/",
    ],
)
def test_redirects_to_what_no_event_may_name_are_denied(location: bytes) -> None:
    current = parse_http("http://example.org/a.png", allow_disguised=False)
    with pytest.raises(ItemError) as error:
        follow(current, location, allow_disguised=False)
    assert code_of(error) is Code.FETCH_DENIED


def test_a_redirect_never_leads_from_https_to_http() -> None:
    current = parse_http("https://example.org/a.png", allow_disguised=False)
    with pytest.raises(ItemError, match="from https to http"):
        follow(current, b"http://example.org/a.png", allow_disguised=False)


@pytest.mark.parametrize(
    ("patterns", "host", "expected"),
    [
        ((), "anything.example", True),
        (("example.org",), "example.org", True),
        (("Example.ORG.",), "example.org", True),
        (("example.org",), "www.example.org", False),
        (("*.example.org",), "www.example.org", True),
        (("*.example.org",), "a.b.example.org", True),
        (("*.example.org",), "example.org", False),
        (("*.example.org",), "badexample.org", False),
        (("example.org",), "example.org.evil.test", False),
        (("bücher.example",), "xn--bcher-kva.example", True),
        (("93.184.216.34", "2606:4700::1111"), "2606:4700::1111", True),
        (("[2606:4700::1111]",), "2606:4700::1111", True),
        (("a.example", "*.b.example"), "x.b.example", True),
    ],
)
def test_allowed_hosts(patterns: tuple[str, ...], host: str, expected: bool) -> None:
    assert (host in AllowedHosts(patterns)) is expected


@pytest.mark.parametrize("pattern", ["http://example.org", "*", "*.", "a*.example.org", "example.org:80", "ex ample.org"])
def test_a_wrong_pattern_is_a_configuration_error_that_names_it(pattern: str) -> None:
    with pytest.raises(ConfigurationError, match="ALLOWED_HOSTS") as error:
        AllowedHosts([pattern])
    assert repr(pattern) in str(error.value)


@pytest.mark.parametrize(
    ("url", "bucket", "key"),
    [
        ("s3://my-bucket/a/b.png", "my-bucket", "a/b.png"),
        ("S3://My_Bucket.1/a", "My_Bucket.1", "a"),
        ("gs://bucket/a%20b?c#d&e=f.png", "bucket", "a%20b?c#d&e=f.png"),
        ("gs://bucket/ü/日本 .png", "bucket", "ü/日本 .png"),
        ("s3://bucket/..a/b..", "bucket", "..a/b.."),
    ],
)
def test_object_urls_are_literal(url: str, bucket: str, key: str) -> None:
    target = parse_object(url, allowed_buckets=())
    assert (target.bucket, target.key) == (bucket, key)


@pytest.mark.parametrize(
    "url",
    [
        "s3:bucket/key",
        "s3:///key",
        "s3://ab/key",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket//key",
        "s3://bucket/a//b",
        "s3://bucket/a/",
        "s3://bucket/../other/key",
        "s3://bucket/a/./b",
        "s3://user@bucket/key",
        "s3://bucket:80/key",
        "s3://bucket?x/key",
        "s3://buc..ket/key",
        "s3://-bucket/key",
        "s3://bücket/key",
        "s3://bucket/a\nb",
        "s3://bucket/a\x7f",
    ],
)
def test_object_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ItemError) as error:
        parse_object(url, allowed_buckets=())
    assert code_of(error) is Code.FETCH_DENIED


def test_buckets_outside_the_list_are_denied() -> None:
    assert parse_object("s3://one/k", allowed_buckets=("one", "two")).bucket == "one"
    with pytest.raises(ItemError, match="bucket three is not allowed"):
        parse_object("s3://three/k", allowed_buckets=("one", "two"))
