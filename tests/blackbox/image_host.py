"""An HTTP host of images that also misbehaves on request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import ClassVar, Self


class ImageHost:
    """/image/N, /missing, /unavailable, /large, /slow; counts requests by path."""

    def __init__(self, images: list[bytes], large_bytes: int) -> None:
        hits: Counter[str] = Counter()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            counted: ClassVar[Counter[str]] = hits

            def do_GET(self) -> None:
                hits[self.path] += 1
                name = self.path.strip("/").partition("/")
                if name[0] == "image":
                    self._send(200, images[int(name[2]) % len(images)])
                elif name[0] == "large":
                    self._send(200, bytes(large_bytes))
                elif name[0] == "slow":
                    time.sleep(5)
                    self._send(200, images[0])
                else:
                    self._send(503 if name[0] == "unavailable" else 404, b"no")

            def _send(self, status: int, body: bytes) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                return

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                """Clients hang up on a host that is slow: no traceback."""

        self.hits = hits
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
