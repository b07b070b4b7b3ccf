"""The URL of an image, read strictly: what two parsers could read differently is refused.

Everything here is decided on the text alone; the address behind a host name is judged when it is connected to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, urljoin

import idna

from worker.errors import Code, ConfigurationError, ItemError
from worker.stages.addresses import DisguisedAddressError, disguised, literal

MAX_URL_CHARS = 16_384
DEFAULT_PORTS = {"http": 80, "https": 443}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31}):(.*)", re.DOTALL)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_BUCKET = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]|\.(?!\.)){1,220}[A-Za-z0-9]")
_TARGET_SAFE = "!$%&'()*+,/:;=?@[]~-._"


@dataclass(frozen=True, slots=True)
class HttpUrl:
    """Where a request goes. `host`: lower-case ASCII name, or an address without brackets; `target`: path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """Host and port as a Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


@dataclass(frozen=True, slots=True)
class ObjectUrl:
    """An object in a bucket; `key` is literal, as the stores' own tools read it: nothing is percent-decoded."""

    scheme: str
    bucket: str
    key: str


def denied(message: str) -> ItemError:
    """A URL that is not allowed; the message must name nothing the event did not say itself."""
    return ItemError(Code.FETCH_DENIED, message)


def split_scheme(url: str) -> tuple[str, str]:
    """Lower-case scheme and what follows its colon.

    Raises:
        ItemError: fetch.denied for what is no URL, is longer than 16,384 characters or holds control characters.
    """
    if len(url) > MAX_URL_CHARS:
        raise denied(f"the URL is longer than {MAX_URL_CHARS} characters")
    if _UNPRINTABLE.search(url):
        raise denied("the URL holds control characters")
    match = _SCHEME.fullmatch(url)
    if match is None:
        raise denied("the URL has no scheme")
    return match[1].lower(), match[2]


def parse_http(url: str, *, allow_disguised: bool) -> HttpUrl:
    """Read an http or https URL.

    Raises:
        ItemError: fetch.denied for userinfo, percent-encoded or malformed hosts, zones, bad ports, and IPv4 addresses in
            disguise (unless `allow_disguised`, where they become the address they stand for).
    """
    scheme, rest = split_scheme(url)
    if scheme not in DEFAULT_PORTS:
        raise denied(f"scheme {scheme} is not allowed")
    if not rest.startswith("//"):
        raise denied("the URL has no host")
    end = re.search(r"[/?#]", rest[2:])
    cut = len(rest) if end is None else end.start() + 2
    authority, target = rest[2:cut], rest[cut:].partition("#")[0]
    if "@" in authority:
        raise denied("URLs with a user name or password are not allowed")
    host, port = _split_port(authority)
    target = quote(target, safe=_TARGET_SAFE)
    return HttpUrl(
        scheme=scheme,
        host=normal_host(host, allow_disguised=allow_disguised),
        port=DEFAULT_PORTS[scheme] if port is None else port,
        target=target if target.startswith("/") else f"/{target}",
    )


def follow(current: HttpUrl, location: bytes, *, allow_disguised: bool) -> HttpUrl:
    """The URL a redirect names.

    Raises:
        ItemError: fetch.denied as `parse_http`, and for a step from https down to http.
    """
    try:
        text = location.decode("utf-8")
    except UnicodeDecodeError:
        text = location.decode("latin-1")
    if _UNPRINTABLE.search(text):  # urljoin would drop some of them silently
        raise denied("redirected to a URL that holds control characters")
    try:
        target = parse_http(urljoin(str(current), text.strip(" ")), allow_disguised=allow_disguised)
    except ValueError as error:  # urllib's own idea of brackets
        raise denied("redirected to a malformed URL") from error
    except ItemError as error:
        raise denied(f"redirected: {error.message}") from error
    if current.scheme == "https" and target.scheme == "http":
        raise denied("redirected from https to http")
    return target


def _split_port(authority: str) -> tuple[str, int | None]:
    if authority.startswith("["):
        host, bracket, rest = authority.partition("]")
        host += bracket
        if not bracket or (rest and not rest.startswith(":")):
            raise denied("the URL's host is malformed")
        text = rest[1:]
    else:
        host, _, text = authority.partition(":")
    if not text:
        return host, None
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65_536:
        raise denied("the URL's port is not a number from 1 to 65535")
    return host, int(text)


def normal_host(host: str, *, allow_disguised: bool = False) -> str:
    """A host as it is compared, resolved and named to the server: ASCII (IDNA 2008 with UTS 46 mapping), lower-case.

    Raises:
        ItemError: fetch.denied, see `parse_http`.
    """
    if "%" in host:
        raise denied("percent-encoded hosts and zone ids are not allowed")
    if host.startswith("["):
        return _normal_ipv6(host[1:-1], allow_disguised=allow_disguised)
    if not host or len(host) > 255 or ":" in host:
        raise denied("the URL's host is malformed")
    name = host.lower()
    if not host.isascii():
        try:
            name = idna.encode(host, uts46=True, std3_rules=False).decode("ascii")
        except (idna.IDNAError, UnicodeError) as error:
            raise denied("the URL's host is not a valid international name") from error
    try:
        address = literal(name)
        if address is not None and host != str(address):
            raise DisguisedAddressError("an IPv4 address in letters that are not ASCII digits")
    except DisguisedAddressError as error:
        found = disguised(name) if allow_disguised else None
        if found is None:
            raise denied(f"the URL's host is {error}") from error
        return str(found)
    name = name.removesuffix(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise denied("the URL's host is malformed")
    return name


def _normal_ipv6(text: str, *, allow_disguised: bool) -> str:
    try:
        address = literal(text) if ":" in text else None
    except DisguisedAddressError as error:
        raise denied("the URL's host is not an IPv6 address") from error
    if address is None:
        raise denied("the URL's host is not an IPv6 address")
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None and not allow_disguised:
        raise denied("the URL's host is an IPv4-mapped address")
    return str(address)


def parse_object(url: str, *, allowed_buckets: tuple[str, ...]) -> ObjectUrl:
    """Read an s3 or gs URL: scheme://bucket/key, the key being everything after the slash.

    Raises:
        ItemError: fetch.denied for a bucket that is not allowed or no bucket's name, and for keys that the store client
            cannot name exactly (empty, `.` or `..` segments): it would read another object.
    """
    scheme, rest = split_scheme(url)
    bucket, _, key = rest.removeprefix("//").partition("/")
    if not rest.startswith("//") or not _BUCKET.fullmatch(bucket):
        raise denied(f"the {scheme} URL has no valid bucket name")
    if allowed_buckets and bucket not in allowed_buckets:
        raise denied(f"bucket {bucket} is not allowed")
    if any(segment in ("", ".", "..") for segment in key.split("/")):
        raise denied("the object's key is empty or holds an empty, '.' or '..' segment")
    return ObjectUrl(scheme, bucket, key)


class AllowedHosts:
    """FETCH__ALLOWED_HOSTS: exact names, or *.example.org for everything below example.org (but not itself)."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """Normalise the patterns.

        Raises:
            ConfigurationError: a pattern is no host name.
        """
        self._exact: set[str] = set()
        self._below: list[str] = []
        for pattern in patterns:
            parent = pattern.removeprefix("*.")
            bracketed = f"[{parent}]" if parent.count(":") > 1 and not parent.startswith("[") else parent
            try:
                host = normal_host(bracketed, allow_disguised=True)
            except ItemError as error:
                raise ConfigurationError(
                    f"WORKER_FETCH__ALLOWED_HOSTS: {pattern!r} is neither a host name nor *.domain ({error.message})"
                ) from error
            if parent != pattern:
                self._below.append(f".{host}")
            else:
                self._exact.add(host)

    def __contains__(self, host: str) -> bool:
        if not self._exact and not self._below:
            return True
        return host in self._exact or any(host.endswith(suffix) for suffix in self._below)
