"""What stands before every page: security headers, the host's name, who is asking, and proof that their own page asks."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.console.identity import LOOPBACK, Caller, Identities, Person

CSRF_HEADER = "x-csrf-token"

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=()",
    "x-frame-options": "DENY",
}


class SecurityHeaders:
    """Puts the headers on every answer, and refuses foreign host names where anyone on this machine is let in.

    Without the latter a page of a stranger could point its own name to this machine and read as if it were ours.
    """

    def __init__(self, app: ASGIApp, local_only: bool) -> None:
        self._app = app
        self._local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        if self._local_only and host_name(Headers(scope=scope).get("host", "")) not in LOOPBACK:
            await _refuse(send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


async def _refuse(send: Send) -> None:
    body = b'{"error": "without sign-in this console answers to localhost only"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def host_name(host: str) -> str:
    """The name in a Host header, without the port and an IPv6 address's brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def caller_of(connection: HTTPConnection) -> Caller:
    """What identity depends on."""
    peer = connection.client.host if connection.client else ""
    return Caller(peer, connection.headers, connection.cookies)


def person_of(request: Request) -> Person:
    """Who is asking.

    Raises:
        HTTPException: 401, a stranger.
    """
    identities: Identities = request.app.state.identities
    person = identities.of(caller_of(request))
    if person is None:
        raise HTTPException(401, "sign in first")
    return person


def changing(request: Request) -> Person:
    """Who wants to change something, from their own page.

    Raises:
        HTTPException: 401; 403 for a request that another site may have forged.
    """
    person = person_of(request)
    check_origin(request)
    bearer = request.headers.get("authorization", "").lower().startswith("bearer ") and person.session.startswith("bearer ")
    identities: Identities = request.app.state.identities
    if not bearer and not identities.csrf_holds(person, request.headers.get(CSRF_HEADER, "")):
        raise HTTPException(403, "this request did not come from the console's own page; reload it")
    return person


def reviewer(request: Request) -> Person:
    """Who wants to decide something.

    Raises:
        HTTPException: as `changing`; 403 for a viewer.
    """
    person = changing(request)
    if not person.may_decide:
        raise HTTPException(403, "your role is viewer: only reviewers decide")
    return person


def check_origin(request: Request) -> None:
    """Raises HTTPException 403 where the browser itself says that another site is asking."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin")
    if site not in ("same-origin", "none") or (origin is not None and urlsplit(origin).netloc != request.headers.get("host")):
        raise HTTPException(403, "this request comes from another site")
