"""Puts the console together and serves it: starts and ends every thread and process, and the web server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from worker import kafka_clients
from worker.clock import Clock, Deadline, SystemClock
from worker.console import pages, review_pages, why_pages
from worker.console.desk import Desk
from worker.console.explain import Explainer
from worker.console.feed import Feed
from worker.console.fleet import Fleet
from worker.console.guard import SecurityHeaders
from worker.console.identity import Identities
from worker.console.label_writer import LabelWriter
from worker.console.labels import LabelRecord
from worker.console.live import Live, row_of
from worker.console.pages import TICKS_PER_S
from worker.console.pictures import Pictures
from worker.console.recent import Recent
from worker.console.signing import Signer
from worker.console.uploads import Uploads
from worker.errors import ConfigurationError, FatalError
from worker.settings import Settings, environment_name
from worker.signals import ending_on_signals

log = structlog.get_logger(__name__)

STOP_S = 3
BACKLOG = 128
WAITING_THREADS = 32


class Console:
    """Everything behind the pages. Pages find it as `request.app.state.console`."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        """
        Raises:
            ConfigurationError: settings that let nobody in, a short key, a wrong policy file.
        """
        clock = clock or SystemClock()
        self.settings = settings
        self.clock = clock
        self.signer = Signer.of(settings.console.signing_key)
        self.identities = Identities(settings.console, self.signer, clock)
        self.live = Live(settings.console.rows_per_s, TICKS_PER_S, clock)
        self.desk = Desk(settings.console.max_entries, clock)
        self.recent = Recent()
        self.fleet = Fleet(settings.console.metrics_urls)
        self.feed = Feed(settings.kafka, settings.console, self._verdict, self._label, clock)
        self.labels = LabelWriter(settings.kafka, self.desk)
        self.uploads = Uploads(settings, clock)
        self.pictures = Pictures(settings.decode, self.uploads, clock)
        self.explainer = Explainer(settings, clock)
        self.stopping = False

    def start(self) -> None:
        """Wait for the topics, then start the threads.

        Raises:
            DependencyError: no broker, or a topic is missing and may not be created.
        """
        kafka = self.settings.kafka
        topics = (*kafka.upload_topics, kafka.verdict_topic, kafka.label_topic)
        kafka_clients.ensure_topics(kafka, Deadline(kafka.startup_timeout_s, self.clock), topics=topics)
        self.pictures.start()
        self.feed.start()
        self.fleet.start()

    def close(self) -> None:
        """End threads and processes."""
        self.stopping = True
        for part in (self.feed, self.fleet, self.labels, self.explainer, self.pictures, self.uploads):
            part.close()

    def _verdict(self, verdict: dict[str, Any], at: float) -> None:
        if not self.recent.add(verdict):
            return  # delivered a second time
        self.live.add(row_of(verdict, at))
        if verdict["action"] == "review":
            self.desk.verdict(verdict, at)

    def _label(self, record: LabelRecord) -> None:
        self.desk.label(record)


def application(console: Console) -> Starlette:
    """The web application; it tells the console's streams when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # The default pool has few threads on few cores; here threads wait (for brokers, stores, the engine), they do not work.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WAITING_THREADS, "console-page"))
        yield
        console.stopping = True

    app = Starlette(
        routes=[*pages.ROUTES, *why_pages.ROUTES, *review_pages.ROUTES],
        middleware=[Middleware(SecurityHeaders, local_only=console.settings.console.auth == "none")],
        exception_handlers={HTTPException: _refused},
        lifespan=lifespan,
    )
    app.state.console = console
    app.state.identities = console.identities
    return app


def serve(settings: Settings) -> int:
    """Serve until a signal.

    Returns:
        0.

    Raises:
        FatalError: wrong settings (2), no broker or topic (3), or a failure of the feed (1).
    """
    console = Console(settings)
    listener = _listen(settings)
    try:
        console.start()
        host, port = listener.getsockname()[:2]
        log.info("console.ready", host=host, port=port, auth=settings.console.auth)
        server = _Server(_config(application(console)), console)
        server.run(sockets=[listener])
        if console.feed.failure is not None:
            raise FatalError(f"internal error: {console.feed.failure}") from console.feed.failure
    finally:
        listener.close()
        console.close()
    return 0


class _Server(uvicorn.Server):
    """Ends streams as soon as it is told to stop, and itself when the feed has failed."""

    def __init__(self, config: uvicorn.Config, console: Console) -> None:
        super().__init__(config)
        self._console = console

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Instead of uvicorn's, which would raise the first signal again."""
        with ending_on_signals(lambda: self.should_exit, self._end):
            yield

    def _end(self) -> None:
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        self._console.stopping = self._console.stopping or self.should_exit
        return await super().on_tick(counter) or self._console.feed.failure is not None


def _config(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # who is asking is decided in `identity`, by the peer's own address
        timeout_graceful_shutdown=STOP_S,
        limit_concurrency=1_000,
        h11_max_incomplete_event_size=64 * 1024,
        http="h11",
        ws="none",
    )


def _listen(settings: Settings) -> socket.socket:
    host, port = settings.console.host, settings.console.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"{environment_name('console', 'port')}: cannot listen on {host}:{port}: {error.strerror or error}"
        ) from error
    return listener


async def _refused(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else "internal error"
    return JSONResponse({"error": detail}, status)
