"""The queue, claims, decisions and appeals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from worker.console import guard
from worker.console.desk import KEPT_EVENT_IDS
from worker.console.identity import Person
from worker.console.label_writer import NotWritten
from worker.console.labels import MAX_NOTE_CHARS, REASONS, Course, LabelRecord
from worker.console.pages import console_of, event, json_body, stream
from worker.console.uploads import Unavailable

LISTED = 60
LOOK_S = 0.25
REPEAT_S = 5.0
"""The listing is sent again at least so often: claims run out without a record."""
OPPOSITE = {"ai_generated": "authentic", "authentic": "ai_generated"}


async def queue(request: Request) -> Response:
    """Server-sent events: `queue`, its head, whenever it changes."""
    person = guard.person_of(request)
    console = console_of(request)

    async def events() -> AsyncIterator[str]:
        sent, due = -1, 0.0
        loop = asyncio.get_running_loop()
        while not console.stopping:
            if console.desk.version != sent or loop.time() >= due:
                listing = console.desk.listing(person.name, LISTED)
                sent, due = listing["version"], loop.time() + REPEAT_S
                yield event("queue", listing | {"caught_up": console.feed.caught_up})
            await asyncio.sleep(LOOK_S)

    return stream(request, events)


async def entry(request: Request) -> Response:
    """One entry with its history."""
    guard.person_of(request)
    found = console_of(request).desk.details(request.query_params.get("entry", ""))
    if found is None:
        raise HTTPException(404, "no such entry")
    return JSONResponse(found)


async def decided(request: Request) -> Response:
    """Entries with a decision, the latest first; `search`: part of an event id, entry or name."""
    guard.person_of(request)
    wanted = (request.query_params.get("search") or "").strip().lower()
    rows = console_of(request).desk.decided(wanted)
    return JSONResponse({"entries": rows})


async def claim(request: Request) -> Response:
    """Take an entry, or keep it a while longer; that somebody else was faster is an answer, not an error."""
    person = guard.reviewer(request)
    console = console_of(request)
    key, course = await _entry(request, await json_body(request))
    if not course.open:
        return JSONResponse({"claimed": False, "message": _decided_by(course)})
    holder = console.desk.holder(key)
    record = _record(request, "claim", key, person, {"seconds": console.settings.console.claim_s})
    if holder not in (None, person.name) or not await _write(request, record):
        return JSONResponse({"claimed": False, "message": _taken(request, key)})
    return JSONResponse({"claimed": True, "seconds": console.settings.console.claim_s})


async def release(request: Request) -> Response:
    """Give an entry back; with `skip` it comes after the others from now on, for this person."""
    person = guard.reviewer(request)
    asked = await json_body(request)
    key, _ = await _entry(request, asked)
    record = _record(request, "release", key, person, {"skipped": bool(asked.get("skip"))})
    return JSONResponse({"released": await _write(request, record)})


async def decide(request: Request) -> Response:
    """Confirm or overturn the model's label, or give one where there is none; `label` is what the page took that to mean."""
    person = guard.reviewer(request)
    console = console_of(request)
    asked = await json_body(request)
    key, course = await _entry(request, asked)
    details = console.desk.details(key) or {}
    verdict = details.get("verdict")
    if verdict is None:
        raise HTTPException(404, "nothing is known of this image's verdict")
    label, why = _label(asked, verdict), _why(asked)
    if asked.get("label") != label:
        raise HTTPException(409, "another model has judged this image meanwhile: look again")
    if not course.open:
        raise HTTPException(409, _decided_by(course))
    if console.desk.holder(key) != person.name:
        raise HTTPException(409, _taken(request, key))
    if course.appeal and course.latest and person.name == course.latest.by and console.settings.console.auth != "none":
        raise HTTPException(403, "an appeal against your decision is for somebody else to decide")
    if asked.get("previous") != (course.latest.record_id if course.latest else None):
        raise HTTPException(409, _decided_by(course))
    reference = await asyncio.to_thread(_reference, request, verdict)
    content = {
        "decision": asked["decision"],
        "label": label,
        "why": why,
        "previous": course.latest.record_id if course.latest else None,
        "appeal": course.appeal.record_id if course.appeal else None,
        "reverses": course.latest is not None and course.latest.content["label"] != label,
        "earlier": [{"record_id": r.record_id, "by": r.by, "label": r.content["label"]} for r in course.decisions],
        "verdict": {name: verdict[name] for name in ("verdict_id", "event_id", "tenant", "label", "score", "action")}
        | {"model": verdict["model"], "policy": verdict["policy"]},
        "image": {"sha256": verdict["image"]["sha256"], "reference": reference},
        "events": details["count"],
        "event_ids": details["event_ids"][:KEPT_EVENT_IDS],
    }
    if not await _write(request, _record(request, "decision", key, person, content)):
        raise HTTPException(409, _decided_by(console.desk.course(key)))
    return JSONResponse({"decided": True, "label": label})


async def appeal(request: Request) -> Response:
    """Put a decided entry into the queue again, for somebody else to decide."""
    person = guard.reviewer(request)
    asked = await json_body(request)
    key, course = await _entry(request, asked)
    if course.open:
        raise HTTPException(409, "this waits for a decision already")
    note = str(asked.get("note") or "").strip()
    if not note or len(note) > MAX_NOTE_CHARS:
        raise HTTPException(400, f"an appeal needs a reason, of {MAX_NOTE_CHARS} characters at most")
    latest = course.latest
    content = {"note": note, "against": latest.record_id if latest else None}
    if not await _write(request, _record(request, "appeal", key, person, content)):
        raise HTTPException(409, "somebody else appealed at the same moment")
    return JSONResponse({"appealed": True})


async def _entry(request: Request, asked: dict[str, Any]) -> tuple[str, Course]:
    console, key = console_of(request), asked.get("entry")
    if not console.feed.caught_up:
        raise HTTPException(503, "the console is still reading the topics; try again in a moment")
    course = console.desk.course(key) if isinstance(key, str) else None
    if course is None or not isinstance(key, str):
        raise HTTPException(404, "no such entry")
    return key, course


def _record(request: Request, kind: Any, key: str, person: Person, content: dict[str, Any]) -> LabelRecord:
    return LabelRecord(kind, key, person.name, console_of(request).clock.time(), content=content)


async def _write(request: Request, record: LabelRecord) -> bool:
    try:
        return await asyncio.to_thread(console_of(request).labels.write, record)
    except NotWritten as error:
        raise HTTPException(503, str(error)) from error


def _label(asked: dict[str, Any], verdict: dict[str, Any]) -> str:
    """The label that a decision means."""
    decision, given = asked.get("decision"), verdict["label"]
    if decision == "confirm" and given in OPPOSITE:
        return str(given)
    if decision == "overturn" and given in OPPOSITE:
        return OPPOSITE[given]
    if decision == "assign" and given not in OPPOSITE and asked.get("label") in OPPOSITE:
        return str(asked["label"])
    raise HTTPException(400, "confirm or overturn a label; assign one (ai_generated, authentic) where there is none")


def _why(asked: dict[str, Any]) -> dict[str, str]:
    reason, note = asked.get("reason"), str(asked.get("note") or "").strip()
    if reason not in REASONS:
        raise HTTPException(400, f"a decision needs a reason: {', '.join(REASONS)}")
    if len(note) > MAX_NOTE_CHARS or (reason == "other" and not note):
        raise HTTPException(400, f"the reason other needs a note, of {MAX_NOTE_CHARS} characters at most")
    return {"reason": reason, "note": note}


def _reference(request: Request, verdict: dict[str, Any]) -> dict[str, Any]:
    """Where the image is: the upload's place in its topic, and its address without a query (which may hold a signature)."""
    try:
        url = console_of(request).uploads.event(verdict).url
    except Unavailable:
        url = None
    if url is not None:
        parts = urlsplit(url)
        url = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    return {"upload": verdict["source"], "url": url}


def _taken(request: Request, key: str) -> str:
    holder = console_of(request).desk.holder(key)
    return f"{holder} has this one" if holder else "take this one first: nobody has it, or your time ran out"


def _decided_by(course: Course | None) -> str:
    latest = course.latest if course else None
    return f"{latest.by} has decided this one meanwhile" if latest else "this has changed meanwhile"


ROUTES = [
    Route("/api/queue", queue),
    Route("/api/entry", entry),
    Route("/api/decided", decided),
    Route("/api/claim", claim, methods=["POST"]),
    Route("/api/release", release, methods=["POST"]),
    Route("/api/decide", decide, methods=["POST"]),
    Route("/api/appeal", appeal, methods=["POST"]),
]
