"""s3 and gs: objects by obstore, sizes checked before and while they stream, one deadline for all of it.

Endpoint, region and credentials are the operator's, from the standard variables of AWS and Google (docs/fetching.md);
an event only names a bucket and a key, so addresses are not judged here.
"""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from worker.clock import Deadline
from worker.errors import Code, ItemError, TransientItemError
from worker.image_room import Hold, unbounded
from worker.settings import FetchSettings
from worker.stages.fetch_hosts import HostGate
from worker.stages.fetch_urls import ObjectUrl, denied, parse_object

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSStore, S3Store

MAX_STORES = 32
CHUNK_BYTES = 2**20
S3_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
GS_ENDPOINT_VARIABLES = ("GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST")


class BucketSource:
    """Images from object stores. Thread-safe.

    Calls run on an event loop in a thread of its own, because only there a call can be given up when its time is over:
    obstore's time-outs are a store's, not a call's, and do not count the wait for credentials.
    """

    def __init__(self, settings: FetchSettings, gate: HostGate) -> None:
        self._settings = settings
        self._gate = gate
        self._lock = threading.Lock()
        self._stores: OrderedDict[tuple[str, str], S3Store | GCSStore] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def read(self, url: str, deadline: Deadline, hold: Hold = unbounded) -> bytes:
        """The bytes of an object; `hold` as in `Fetcher.fetch`.

        Raises:
            ItemError: fetch.denied for buckets that are not allowed and for the store's 401 and 403; fetch.not_found,
                fetch.too_large.
            TransientItemError: fetch.timeout, fetch.unavailable.
        """
        target = parse_object(url, allowed_buckets=self._settings.allowed_buckets)
        name = f"{target.scheme}://{target.bucket}"
        with self._gate.visit(name, name, deadline):
            return self._mapped(target, name, deadline, hold)

    def close(self) -> None:
        """Give up what is under way and end the thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
            self._stores.clear()
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _mapped(self, target: ObjectUrl, name: str, deadline: Deadline, hold: Hold) -> bytes:
        """The one boundary to obstore; its messages hold endpoints and addresses, so none of them is passed on."""
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            return self._until(deadline, _get(self._store(target), target.key, self._settings.max_bytes, hold))
        except TimeoutError as error:
            raise TransientItemError(Code.FETCH_TIMEOUT, f"{name} did not deliver in time") from error
        except FileNotFoundError as error:
            raise ItemError(Code.FETCH_NOT_FOUND, f"{name} has no such object, or there is no such bucket") from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise denied(f"{name} refuses access") from error
        except (BaseError, OSError, ValueError, CancelledError) as error:
            raise TransientItemError(Code.FETCH_UNAVAILABLE, f"{name} failed or cannot be reached") from error

    def _until(self, deadline: Deadline, call: Coroutine[Any, Any, bytes]) -> bytes:
        future = asyncio.run_coroutine_threadsafe(call, self._running_loop())
        try:
            return future.result(deadline.remaining())
        finally:
            future.cancel()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=(self._loop,), name="fetch-buckets", daemon=True)
                self._thread.start()
            return self._loop

    def _store(self, target: ObjectUrl) -> S3Store | GCSStore:
        """The bucket's client: its connections and credentials are worth keeping, for the buckets used last."""
        key = (target.scheme, target.bucket)
        with self._lock:
            store = self._stores.get(key)
            if store is None:
                store = self._stores[key] = _open_store(target, self._settings.timeout_s)
                if len(self._stores) > MAX_STORES:
                    self._stores.popitem(last=False)
            self._stores.move_to_end(key)
            return store


async def _get(store: S3Store | GCSStore, key: str, max_bytes: int, hold: Hold) -> bytes:
    import obstore

    result = await obstore.get_async(store, key)
    if result.meta["size"] > max_bytes:
        raise _too_large(max_bytes)
    hold(result.meta["size"])
    body = io.BytesIO()
    async for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
        if body.tell() + len(chunk) > max_bytes:
            raise _too_large(max_bytes)
        body.write(chunk)
    return body.getvalue()


def _open_store(target: ObjectUrl, timeout_s: float) -> S3Store | GCSStore:
    """A client that tries once: trying again is the pipeline's, within its own budget."""
    from obstore.store import GCSStore, S3Store

    once = {"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)}
    options: ClientConfig = {"timeout": timedelta(seconds=timeout_s), "connect_timeout": timedelta(seconds=timeout_s)}
    if target.scheme == "s3":
        if _first(S3_ENDPOINT_VARIABLES).lower().startswith("http://"):
            options["allow_http"] = True  # the operator wrote http: that is the permission
        return S3Store(target.bucket, client_options=options, retry_config=once)  # type: ignore[arg-type]
    endpoint = _first(GS_ENDPOINT_VARIABLES)
    config: dict[str, Any] = {}
    if endpoint and not os.environ.get("GOOGLE_BASE_URL"):
        # Google's own clients read this variable, with or without a scheme, and send no credentials then.
        endpoint = endpoint if "://" in endpoint else f"http://{endpoint}"
        config = {"base_url": endpoint.rstrip("/"), "skip_signature": True}
    if endpoint.lower().startswith("http://"):
        options["allow_http"] = True
    return GCSStore(target.bucket, client_options=options, retry_config=once, **config)  # type: ignore[arg-type]


def _first(variables: tuple[str, ...]) -> str:
    return next((value for name in variables if (value := os.environ.get(name))), "")


def _too_large(max_bytes: int) -> ItemError:
    return ItemError(Code.FETCH_TOO_LARGE, f"the image is larger than {max_bytes} bytes")


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()
