"""file URLs: regular files under FETCH__FILE_ROOTS, wherever symbolic links lead, and nothing else."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote_to_bytes

from worker.clock import Deadline
from worker.errors import Code, ItemError, TransientItemError
from worker.image_room import Hold, unbounded
from worker.stages.fetch_urls import denied, split_scheme

CHUNK_BYTES = 2**20

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENXIO})


class FileSource:
    """Images from the worker's own disk. Thread-safe."""

    def __init__(self, roots: Iterable[Path], max_bytes: int) -> None:
        self._roots = tuple(roots)
        self._max_bytes = max_bytes

    def read(self, url: str, deadline: Deadline, hold: Hold = unbounded) -> bytes:
        """The bytes of the file; `hold` as in `Fetcher.fetch`.

        Raises:
            ItemError: fetch.denied outside the roots and for what is no readable regular file; fetch.not_found,
                fetch.too_large.
            TransientItemError: fetch.unavailable for an error of the disk, fetch.timeout.
        """
        path = file_path(url)
        try:
            descriptor = self._open(path)
        except OSError as error:
            raise _mapped(error) from error
        try:
            return self._read(descriptor, deadline, hold)
        except OSError as error:
            raise _mapped(error) from error
        finally:
            os.close(descriptor)

    def _open(self, path: str) -> int:
        """Open the file behind all symbolic links, if that lies under a root.

        The resolved path is walked from the root without following links: whoever puts a link in between resolving and
        opening gets an error instead of a file from elsewhere. O_NONBLOCK: opening a FIFO must not wait for a writer.
        """
        resolved = os.path.realpath(path)
        for root in self._roots:
            real_root = os.path.realpath(root)
            if os.path.commonpath((real_root, resolved)) == real_root:
                return _open_below(real_root, os.path.relpath(resolved, real_root))
        raise denied("the path is not under an allowed folder")

    def _read(self, descriptor: int, deadline: Deadline, hold: Hold) -> bytes:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise denied("the path is not a regular file")
        held_bytes = status.st_size or self._max_bytes  # a file without a size, as in /proc, may hold anything
        if held_bytes <= self._max_bytes:
            hold(held_bytes)
        body = bytearray()
        while len(body) <= self._max_bytes and status.st_size <= self._max_bytes:
            if deadline.expired():
                raise TransientItemError(Code.FETCH_TIMEOUT, "the file was not read in time")
            chunk = os.read(descriptor, min(CHUNK_BYTES, self._max_bytes + 1 - len(body)))
            if not chunk:
                return bytes(body)
            body += chunk
            if len(body) > held_bytes:  # it grows while it is read
                hold(held_bytes := self._max_bytes)
        raise ItemError(Code.FETCH_TOO_LARGE, f"the image is larger than {self._max_bytes} bytes")


def file_path(url: str) -> str:
    """The absolute path of a file URL (RFC 8089): percent-decoded once, host empty or localhost.

    Raises:
        ItemError: fetch.denied for another host, a relative path, a query or fragment, or a NUL.
    """
    _, rest = split_scheme(url)
    if rest.startswith("//"):
        host, slash, tail = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise denied("file URLs with a host are not allowed")
        rest = slash + tail
    if not rest.startswith("/") or "?" in rest or "#" in rest:
        raise denied("the file URL has no absolute path, or a query or fragment")
    decoded = unquote_to_bytes(rest)
    if b"\0" in decoded:
        raise denied("the file URL holds a NUL")
    return os.fsdecode(decoded)


def _open_below(root: str, relative: str) -> int:
    parts = Path(relative).parts
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        kind = os.O_NONBLOCK | os.O_NOCTTY if last else os.O_DIRECTORY
        try:
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


def _mapped(error: OSError) -> ItemError:
    if error.errno in _ABSENT:
        return ItemError(Code.FETCH_NOT_FOUND, "there is no such file")
    if error.errno in _FORBIDDEN:
        return denied("the file may not be opened")
    return TransientItemError(Code.FETCH_UNAVAILABLE, "the file cannot be read at the moment")
