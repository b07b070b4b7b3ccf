"""Who is asking and what they may do: by a token and its session, by a trusted proxy's headers, or (development) anyone."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from worker.clock import Clock
from worker.console.signing import Signer
from worker.errors import ConfigurationError
from worker.settings import ConsoleSettings, environment_name

COOKIE = "code_console"
MIN_TOKEN_CHARS = 16
MAX_NAME_CHARS = 100
LOOPBACK = ("localhost", "127.0.0.1", "::1")
DEVELOPER = "developer"

Role = Literal["viewer", "reviewer"]
_NAME = re.compile(rf"[^\x00-\x1f\x7f:,]{{1,{MAX_NAME_CHARS}}}")


@dataclass(frozen=True, slots=True)
class Person:
    """Who asks. `session` binds CSRF tokens: to the cookie, or to the name where a proxy vouches for every request."""

    name: str
    role: Role
    session: str

    @property
    def may_decide(self) -> bool:
        """Whether they may claim, decide and appeal."""
        return self.role == "reviewer"


@dataclass(frozen=True, slots=True)
class Caller:
    """What identity depends on of a request: its peer's address, headers in lower case, and cookies."""

    peer: str
    headers: Mapping[str, str]
    cookies: Mapping[str, str]


class Identities:
    """Answers who a caller is; one for the whole console."""

    def __init__(self, settings: ConsoleSettings, signer: Signer, clock: Clock) -> None:
        """
        Raises:
            ConfigurationError: the settings let nobody in, or too many.
        """
        self._settings = settings
        self._signer = signer
        self._clock = clock
        self._holders = _holders(settings) if settings.auth == "token" else {}
        self._proxies = _networks(settings) if settings.auth == "header" else []
        if settings.auth == "none" and settings.host not in LOOPBACK:
            raise ConfigurationError(
                f"{environment_name('console', 'auth')}: none lets anyone in and so may listen on this machine only; "
                f"{environment_name('console', 'host')} is {settings.host}"
            )

    def of(self, caller: Caller) -> Person | None:
        """The caller, or None for a stranger."""
        if self._settings.auth == "none":
            return Person(DEVELOPER, "reviewer", DEVELOPER)
        if self._settings.auth == "header":
            return self._vouched_for(caller)
        scheme, _, token = caller.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._holder(token.strip())
        return self._in_session(caller.cookies.get(COOKIE, ""))

    def sign_in(self, token: str) -> str | None:
        """The session cookie of a token's holder; None for a token that is nobody's."""
        holder = self._holder(token)
        if holder is None:
            return None
        content = {"name": holder.name, "token": self._fingerprint(holder.name), "id": secrets.token_hex(16)}
        return self._signer.sign("session", content, self._clock.time() + self._settings.session_s)

    def csrf_token(self, person: Person) -> str:
        """What this person's page sends along with everything that changes something."""
        return self._signer.digest("csrf", f"{person.session}\0{person.name}")

    def csrf_holds(self, person: Person, token: str) -> bool:
        """Whether it is this person's."""
        return hmac.compare_digest(self.csrf_token(person).encode(), token.encode("utf-8", "replace"))

    def _holder(self, token: str) -> Person | None:
        digest = _digest(token)
        found = None
        for name, (role, expected) in self._holders.items():  # all of them: how long it takes tells nothing
            if hmac.compare_digest(expected, digest):
                found = Person(name, role, f"bearer {name}")
        return found

    def _in_session(self, cookie: str) -> Person | None:
        session = self._signer.open("session", cookie, self._clock.time())
        if session is None or session["name"] not in self._holders or session["token"] != self._fingerprint(session["name"]):
            return None  # a token that was taken away or changed ends its sessions
        return Person(session["name"], self._holders[session["name"]][0], session["id"])

    def _fingerprint(self, name: str) -> str:
        return self._signer.digest("token", self._holders[name][1].hex())[:16]

    def _vouched_for(self, caller: Caller) -> Person | None:
        try:
            peer = ipaddress.ip_address(caller.peer)
        except ValueError:
            return None
        name = caller.headers.get(self._settings.user_header.lower(), "").strip()
        if not any(peer in network for network in self._proxies) or not _NAME.fullmatch(name):
            return None
        groups = {part.strip() for part in caller.headers.get(self._settings.groups_header.lower(), "").split(",")}
        if groups & set(self._settings.reviewer_groups):
            return Person(name, "reviewer", f"proxy {name}")
        if not self._settings.viewer_groups or groups & set(self._settings.viewer_groups):
            return Person(name, "viewer", f"proxy {name}")
        return None


def _holders(settings: ConsoleSettings) -> dict[str, tuple[Role, bytes]]:
    """Role and digest of the token, by name."""
    variable = environment_name("console", "tokens")
    if settings.tokens is None or not settings.tokens.get_secret_value().strip():
        raise ConfigurationError(
            f"{variable}: required with {environment_name('console', 'auth')}=token: name:role:token, comma-separated "
            "(role viewer or reviewer); or set AUTH=header behind a reverse proxy"
        )
    found: dict[str, tuple[Role, bytes]] = {}
    for number, entry in enumerate(settings.tokens.get_secret_value().split(","), 1):
        name, _, rest = entry.strip().partition(":")
        role, _, token = rest.partition(":")
        if not _NAME.fullmatch(name) or role not in ("viewer", "reviewer") or len(token) < MIN_TOKEN_CHARS or name in found:
            raise ConfigurationError(
                f"{variable}: entry {number}: must be name:role:token, each name once, role viewer or reviewer, "
                f"the token {MIN_TOKEN_CHARS} characters or more"
            )
        found[name] = (cast(Role, role), _digest(token))
    return found


def _networks(settings: ConsoleSettings) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    try:
        return [ipaddress.ip_network(text) for text in settings.trusted_proxies]
    except ValueError as error:
        raise ConfigurationError(f"{environment_name('console', 'trusted_proxies')}: {error}") from error


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
