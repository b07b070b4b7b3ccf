"""The shell, sign-in, probes and the live stream."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import TYPE_CHECKING, Any, cast

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from worker.console import guard
from worker.console.identity import COOKIE, LOOPBACK
from worker.console.live import Filter

if TYPE_CHECKING:
    from worker.console.server import Console

TICKS_PER_S = 4
MAX_STREAMS = 64
"""Open live views and queues: each filter is asked about each verdict."""
MAX_JSON_BYTES = 16 * 1024
REFUSAL_DELAY_S = 0.5
"""Before a wrong token is told so: guessing gets nowhere."""
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def console_of(request: Request) -> Console:
    """Everything behind the pages."""
    return cast("Console", request.app.state.console)


async def json_body(request: Request) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
        HTTPException: 400, or 413 where it is too large.
    """
    body = await limited_body(request, MAX_JSON_BYTES)
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "not valid JSON") from error
    if not isinstance(found, dict):
        raise HTTPException(400, "expected a JSON object")
    return found


async def limited_body(request: Request, most_bytes: int) -> bytes:
    """The body, read no further than allowed. Raises HTTPException 413 beyond."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise HTTPException(413, f"larger than {most_bytes} bytes")
    return bytes(body)


class _Files:
    """The page's files, read once from the package."""

    def __init__(self) -> None:
        folder = resources.files("worker.console").joinpath("static")
        self._files = {file.name: file.read_bytes() for file in folder.iterdir() if "." + file.name.rpartition(".")[2] in _TYPES}
        self._tags = {name: f'"{hashlib.sha256(data).hexdigest()[:16]}"' for name, data in self._files.items()}

    def answer(self, request: Request, name: str) -> Response:
        """A file, or 304 where the browser has it."""
        if name not in self._files:
            raise HTTPException(404, "no such page")
        headers = {"etag": self._tags[name], "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == self._tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(self._files[name], media_type=_TYPES["." + name.rpartition(".")[2]], headers=headers)


_FILES = _Files()


async def shell(request: Request) -> Response:
    """The one page; it holds nothing that needs a sign-in."""
    return _FILES.answer(request, "index.html")


async def static(request: Request) -> Response:
    """Style and scripts."""
    return _FILES.answer(request, request.path_params["name"])


async def livez(request: Request) -> Response:
    """Whether the process answers."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Whether the topics are being read and what was there at the start has been."""
    feed = console_of(request).feed
    conditions = {"broker": feed.connected, "caught_up": feed.caught_up}
    good = all(conditions.values())
    return JSONResponse({"status": "ok" if good else "unavailable", **conditions}, 200 if good else 503)


async def me(request: Request) -> Response:
    """Who is asking (a stranger is told how to come in), and the token their page sends along when it changes something."""
    console = console_of(request)
    person = console.identities.of(guard.caller_of(request))
    auth = console.settings.console.auth
    if person is None:
        return JSONResponse({"signed_in": False, "auth": auth})
    return JSONResponse(
        {
            "signed_in": True,
            "name": person.name,
            "role": person.role,
            "may_decide": person.may_decide,
            "auth": auth,
            "csrf": console.identities.csrf_token(person),
            "claim_s": console.settings.console.claim_s,
            "max_image_bytes": console.settings.fetch.max_bytes,
        }
    )


async def sign_in(request: Request) -> Response:
    """A token for a session cookie."""
    console = console_of(request)
    guard.check_origin(request)
    if console.settings.console.auth != "token":
        raise HTTPException(404, "this console has no sign-in of its own")
    token = (await json_body(request)).get("token")
    cookie = console.identities.sign_in(token) if isinstance(token, str) else None
    if cookie is None:
        await asyncio.sleep(REFUSAL_DELAY_S)
        raise HTTPException(401, "this token is nobody's")
    answer = JSONResponse({"signed_in": True})
    seconds = console.settings.console.session_s
    answer.set_cookie(COOKIE, cookie, max_age=seconds, path="/", httponly=True, samesite="strict", secure=_secure(request))
    return answer


async def sign_out(request: Request) -> Response:
    """Forget the session."""
    guard.changing(request)
    answer = JSONResponse({"signed_in": False})
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict", secure=_secure(request))
    return answer


def _secure(request: Request) -> bool:
    """Whether the cookie is for https alone: always, except on this machine itself."""
    return guard.host_name(request.headers.get("host", "")) not in LOOPBACK


async def live(request: Request) -> Response:
    """Server-sent events: `rows` four times a second, `summary` every second."""
    guard.person_of(request)
    console = console_of(request)
    subscription = await asyncio.to_thread(console.live.subscribe, _filter(request))

    async def events() -> AsyncIterator[str]:
        try:
            next_summary = 0.0
            while not console.stopping:
                rows, seen = console.live.take(subscription)
                if seen:
                    yield event("rows", {"rows": [row.public() for row in rows], "of": seen})
                if time.monotonic() >= next_summary:
                    next_summary = time.monotonic() + 1.0
                    summary = console.live.summary(subscription)
                    feed = {"connected": console.feed.connected, "caught_up": console.feed.caught_up}
                    yield event("summary", summary | {"fleet": console.fleet.summary(), "feed": feed})
                await asyncio.sleep(1 / TICKS_PER_S)
        finally:
            console.live.unsubscribe(subscription)

    return stream(request, events)


def event(name: str, content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n"


def stream(request: Request, events: Callable[[], AsyncIterator[str]]) -> Response:
    """An answer that goes on until the page is closed. Raises HTTPException 503 where too many are open."""
    state = request.app.state
    if getattr(state, "streams", 0) >= MAX_STREAMS:
        raise HTTPException(503, "too many open pages")

    async def counted() -> AsyncIterator[str]:
        state.streams = getattr(state, "streams", 0) + 1
        try:
            async for text in events():
                yield text
        finally:
            state.streams -= 1

    return StreamingResponse(counted(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def _filter(request: Request) -> Filter:
    asked = request.query_params
    label, action = asked.get("label") or None, asked.get("action") or None
    if label not in (None, "ai_generated", "authentic", "undetermined") or action not in (None, "allow", "review", "block"):
        raise HTTPException(400, "no such label or action")
    return Filter((asked.get("tenant") or "")[:200] or None, label, action, _score(asked.get("low")), _score(asked.get("high")))


def _score(text: str | None) -> float | None:
    if not text:
        return None
    try:
        score = float(text)
    except ValueError as error:
        raise HTTPException(400, "a score is a number from 0 to 1") from error
    if not 0 <= score <= 1 or math.isnan(score):
        raise HTTPException(400, "a score is a number from 0 to 1")
    return score


ROUTES = [
    Route("/", shell),
    Route("/static/{name}", static),
    Route("/livez", livez),
    Route("/readyz", readyz),
    Route("/api/me", me),
    Route("/api/session", sign_in, methods=["POST"]),
    Route("/api/session", sign_out, methods=["DELETE"]),
    Route("/api/live", live),
]
