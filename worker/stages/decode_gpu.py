"""Decode with a GPU first (`DECODE__GPU`): one process asks nvImageCodec; what it cannot, may not or does not do, the others do.

nvImageCodec is a large native library that reads strangers' bytes with a CUDA context in hand, so it has a process of its own,
which holds nothing else, may die alone and is replaced like any decoder. One thread owns it. Nothing waits for it to come up:
until its self-check is passed, while it is being replaced, and after it was refused or has died too often, images go the usual
way. Whatever goes wrong with an image there is no verdict on it: the safe decoder looks at it anew, and its word is final.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import structlog

from engine import jpeg_region
from engine.containers import JPEG, sniff
from engine.preprocess import Layout
from worker.clock import Deadline
from worker.errors import ItemError, StaleItemError
from worker.items import Decoded, Fetched
from worker.settings import DecodeSettings
from worker.stages import decode
from worker.stages.decode_child import Child, DecoderDied

GPU_FUNCTION = "worker.stages.decode_gpu_process:decode_image"
OPENING_S = 60.0
"""For the device to be opened and the self-check to be made."""
MOST_DEATHS = 5
"""In a row without one decoded image: then the process is not replaced any more."""

Restarted = Callable[[str], None]

log = structlog.get_logger()


def open_decoder(settings: DecodeSettings, crops: Layout, on_restart: Restarted | None = None) -> decode.Decoder:
    """The decoder that the settings ask for; not started yet."""
    return (GpuFirstDecoder if settings.gpu else decode.Decoder)(settings, crops, on_restart)


class GpuFirstDecoder(decode.Decoder):
    """A Decoder whose JPEGs try the GPU process first; arguments and errors as there."""

    def __init__(
        self,
        settings: DecodeSettings,
        crops: Layout,
        on_restart: Restarted | None = None,
        function: str = decode.DECODE_FUNCTION,
        gpu_function: str = GPU_FUNCTION,
    ) -> None:
        super().__init__(settings, crops, on_restart, function)
        self.gpu = GpuProcess(settings, crops, on_restart, gpu_function)

    def start(self) -> None:
        """Start all processes; waits for those on the CPU only. Raises as `Decoder.start`."""
        super().start()
        self.gpu.start()

    def decode(self, fetched: Fetched, index: int) -> Decoded:
        """As `Decoder.decode`."""
        decoded = self.gpu.decode(fetched) if sniff(fetched.data) == JPEG else None
        return super().decode(fetched, index) if decoded is None else decoded

    def takes(self, index: int) -> int:
        """As `Decoder.takes`; one while the GPU process takes images."""
        return 1 if self.gpu.in_service else super().takes(index)

    def close(self, deadline: Deadline) -> None:
        """End all processes. Safe to call twice."""
        self.gpu.close(deadline)
        super().close(deadline)


class Refused(Exception):  # noqa: N818 - says what it is
    """The GPU decoder cannot be used on this machine; the message says why."""


class _Request:
    """An image on its way through the GPU process."""

    def __init__(self, fetched: Fetched) -> None:
        self.fetched = fetched
        self.decoded: Decoded | None = None
        self.done = threading.Event()


class GpuProcess:
    """The GPU decoder process, its one owner thread, and the images that wait for it."""

    def __init__(self, settings: DecodeSettings, crops: Layout, on_restart: Restarted | None, function: str) -> None:
        self._settings = settings
        self._crops: Layout = crops
        self._on_restart = on_restart
        self._function = function
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._in_service = False
        self._closed = threading.Event()
        self._child: Child | None = None
        # The kernel kills a child when the thread that started it ends: this one lives as long as the process is wanted.
        self._thread = threading.Thread(target=self._run, name="decode-gpu", daemon=True)

    @property
    def in_service(self) -> bool:
        """Whether images are taken."""
        return self._in_service

    @property
    def pid(self) -> int | None:
        """Process id, None where there is no process."""
        child = self._child
        return child.pid if child is not None and child.alive else None

    def start(self) -> None:
        """Bring the process up, in the background."""
        self._thread.start()

    def decode(self, fetched: Fetched) -> Decoded | None:
        """The image, or None where the safe decoder has to look at it. From any thread."""
        request = _Request(fetched)
        with self._lock:
            if not self._in_service:
                return None
            self._requests.put(request)
        request.done.wait()  # the owner answers within DECODE__TIMEOUT_S, or gives back all that waits
        return request.decoded

    def close(self, deadline: Deadline) -> None:
        """End it after the image in the works, or at the deadline. Safe to call twice."""
        with self._lock:
            self._closed.set()
            child = self._child
        self._requests.put(None)
        if child is not None:
            child.finish(deadline)
        if self._thread.is_alive():
            self._thread.join(deadline.remaining())

    # -- the owner thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        deaths = 0
        while not self._closed.is_set():
            try:
                child = self._opened()
                log.info("decode.gpu_ready", pid=child.pid)
                served, reason, problem = self._serve(child)
            except Refused as refusal:
                self._refused(str(refusal))
                return
            except (TimeoutError, DecoderDied, OSError) as error:
                served, reason, problem = 0, "crashed", self._ended(error)
            if self._closed.is_set():
                return
            deaths = 1 if served else deaths + 1
            log.warning("decode.gpu_process_died", code=f"decode.{reason}", problem=problem, deaths_in_a_row=deaths)
            if self._on_restart is not None:
                self._on_restart(reason)
            if deaths >= MOST_DEATHS:
                self._refused(f"its process died {deaths} times in a row")
                return

    def _refused(self, reason: str) -> None:
        if not self._closed.is_set():
            log.warning("decode.gpu_refused", reason=reason, instead="decoded on the CPU")

    def _opened(self) -> Child:
        """A process that has passed its self-check.

        Raises:
            Refused: it says that there is no GPU decoder here, or differs too much.
            TimeoutError, DecoderDied, OSError: it did not come up.
        """
        with self._lock:
            if self._closed.is_set():
                raise Refused("the decoder was closed")
            child = self._child = Child(self._settings, self._crops, self._function, cuda=True)
        child.wait_ready()
        try:
            child.exchange(jpeg_region.samples()[0], self._settings.model_copy(update={"timeout_s": OPENING_S}))
        except ItemError as error:
            child.kill()
            raise Refused(error.message) from error
        return child

    def _serve(self, child: Child) -> tuple[int, str, str]:
        """Images through the process until it ends or is ended: how many it decoded, and why it ended."""
        served = 0
        self._in_service = True
        try:
            while (request := self._requests.get()) is not None:
                try:
                    request.decoded = decode.decoded_of(request.fetched, *child.exchange(request.fetched.data, self._settings))
                    served += 1
                except (ItemError, StaleItemError):
                    pass  # not its kind, or damaged: the safe decoder says so, or not
                except TimeoutError as error:
                    return served, "timeout", self._ended(error)
                except DecoderDied as error:
                    return served, "crashed", self._ended(error)
                finally:
                    request.done.set()
            return served, "closed", ""
        finally:
            with self._lock:
                self._in_service = False
            while not self._requests.empty():
                if (waiting := self._requests.get()) is not None:
                    waiting.done.set()

    def _ended(self, error: Exception) -> str:
        """End the process, and say how it had ended."""
        child = self._child
        if child is None:
            return str(error)
        if isinstance(error, TimeoutError):
            child.kill()
            return "no answer in time"
        problem = "; ".join(filter(None, (str(error), child.end(), child.last_words())))
        child.kill()
        return problem


def probe(settings: DecodeSettings, crops: Layout, function: str = GPU_FUNCTION) -> str | None:
    """Why the GPU decoder cannot be used here; None where it can. Takes as long as opening the device takes."""
    process = GpuProcess(settings, crops, None, function)
    try:
        process._opened()
        return None
    except Refused as refusal:
        return str(refusal)
    except (TimeoutError, DecoderDied, OSError) as error:
        return f"its process did not come up: {process._ended(error)}"
    finally:
        process.close(Deadline(1.0))
