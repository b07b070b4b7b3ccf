"""Explanations, pictures and trials."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from worker.console import guard
from worker.console.explain import Busy
from worker.console.labels import entry_of
from worker.console.pages import console_of, limited_body
from worker.console.pictures import CONTENT_TYPE
from worker.console.uploads import Unavailable

PURPOSE = "image"


async def verdict(request: Request) -> Response:
    """A verdict, its item's history and its rule."""
    guard.person_of(request)
    console = console_of(request)
    found = _verdict(request)
    key = entry_of(found)
    try:
        rule: dict[str, Any] | None = await asyncio.to_thread(console.explainer.rule, found)
        problem = None
    except (Unavailable, Busy) as error:
        rule, problem = None, str(error)
    item = console.desk.details(key)
    return JSONResponse({"verdict": found, "entry": key, "item": item, "rule": rule, "rule_problem": problem})


async def picture(request: Request) -> Response:
    """A short-lived link to a verdict's picture, good for this person alone; or why there is none."""
    person = guard.person_of(request)
    console = console_of(request)
    found = _verdict(request)
    try:
        await asyncio.to_thread(console.pictures.of, found)
    except Unavailable as error:
        return JSONResponse({"link": None, "unavailable": str(error)})
    content = {"event_id": found["event_id"], "verdict_id": found["verdict_id"], "for": person.name}
    link = console.signer.sign(PURPOSE, content, console.clock.time() + console.settings.console.image_link_s)
    return JSONResponse({"link": f"image?ref={link}"})


async def explanation(request: Request) -> Response:
    """Heat map, heads and neighbours: takes a second; or why there are none."""
    guard.person_of(request)
    console = console_of(request)
    found = _verdict(request)
    try:
        seen = await asyncio.to_thread(console.pictures.of, found)
        return JSONResponse(await asyncio.to_thread(console.explainer.explain, seen))
    except (Unavailable, Busy) as error:
        return JSONResponse({"unavailable": str(error)})


async def image(request: Request) -> Response:
    """A preview, for whom the link was made and as long as it is good."""
    person = guard.person_of(request)
    console = console_of(request)
    link = console.signer.open(PURPOSE, request.query_params.get("ref", ""), console.clock.time())
    if link is None or link.get("for") != person.name:
        raise HTTPException(403, "this link is not good, or not any more")
    found = find_verdict(request, str(link["event_id"]))
    if found is None or found["verdict_id"] != link["verdict_id"]:
        raise HTTPException(410, "this verdict is no longer in the console's memory")
    try:
        seen = await asyncio.to_thread(console.pictures.of, found)
    except Unavailable as error:
        raise HTTPException(410, str(error)) from error
    return Response(seen.preview, media_type=CONTENT_TYPE, headers={"cache-control": "private, max-age=60"})


async def trial(request: Request) -> Response:
    """What the worker would say of an image; nothing is published and nothing is kept."""
    guard.changing(request)
    console = console_of(request)
    data = await limited_body(request, console.settings.fetch.max_bytes)
    if not data:
        raise HTTPException(400, "no image")
    tenant = (request.query_params.get("tenant") or "default")[:200]
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        found = await asyncio.to_thread(console.explainer.trial, data, sha256, tenant)
        seen = await asyncio.to_thread(console.pictures.read, data, sha256)
        rule = await asyncio.to_thread(console.explainer.rule, found)
        evidence = await asyncio.to_thread(console.explainer.explain, seen)
    except Unavailable as error:
        return JSONResponse({"trial": True, "unavailable": str(error)})
    except Busy as error:
        raise HTTPException(503, str(error)) from error
    preview = base64.b64encode(seen.preview).decode()
    return JSONResponse({"trial": True, "verdict": found, "rule": rule, "evidence": evidence, "preview": preview})


def find_verdict(request: Request, event_id: str) -> dict[str, Any] | None:
    """An event's verdict: of the latest ones, or of those that wait for review."""
    console = console_of(request)
    return console.recent.of_event(event_id) or console.desk.verdict_of_event(event_id)


def _verdict(request: Request) -> dict[str, Any]:
    found = find_verdict(request, request.query_params.get("event_id", ""))
    if found is None:
        raise HTTPException(404, "this event is not in the console's memory: it keeps the latest verdicts and the review queue")
    return found


ROUTES = [
    Route("/api/verdict", verdict),
    Route("/api/picture", picture),
    Route("/api/explanation", explanation),
    Route("/image", image),
    Route("/api/trial", trial, methods=["POST"]),
]
