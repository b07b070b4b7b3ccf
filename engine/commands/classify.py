"""`engine classify`: scores of files and folders, a row each as soon as it is known, in bounded memory."""

from __future__ import annotations

import argparse
import errno
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from engine.commands import CommandError, model_arguments, rows

SUFFIXES = frozenset(
    f".{suffix}"
    for group in (
        "jpg jpeg jpe jfif",
        "png apng",
        "webp",
        "gif",
        "bmp dib",
        "tif tiff",
        "avif avifs",
        "heic heif heics heifs hif",
    )
    for suffix in group.split()
)
MAX_FILE_BYTES = 256 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `engine classify`."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="image, or folder to search for images")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--all", action="store_true", help="in folders, try files of any name, not only of images' suffixes")
    parser.add_argument("--batch-size", type=model_arguments.positive, default=16, metavar="N", help="crops at once; default: 16")
    model_arguments.add(parser)


def run(arguments: argparse.Namespace) -> int:
    """Score and print. Returns 1 if an image could not be scored, else 0."""
    for path in arguments.paths:
        _check_exists(path)
    search = Search(arguments.paths, arguments.all)
    counts: Counter[str] = Counter()
    with model_arguments.detector(arguments) as detector:
        started = time.monotonic()
        images = ((name, partial(read_file, name)) for name in search)
        with rows.printer(arguments.json, detector, search.count) as show:
            for row in detector.classify(images, batch_size=arguments.batch_size):
                counts[rows.label(row)] += 1
                show(row)
        took_s = time.monotonic() - started
    if not counts or sys.stderr.isatty():
        print(_summary(counts, search.skipped, took_s), file=sys.stderr)
    return 1 if counts["undetermined"] else 0


class Search:
    """The files that paths name, drawn one by one: files themselves, and those in folders, sorted in each folder.

    In folders, hidden entries and links to folders are left out, and files without an image's suffix unless `every` is set;
    `skipped` counts the latter.
    """

    def __init__(self, paths: list[Path], every: bool = False) -> None:
        self._paths, self._every = paths, every
        self.skipped = 0

    def count(self) -> int:
        """How many there are, by looking once more."""
        return sum(1 for _ in Search(self._paths, self._every)._files(quiet=True))

    def __iter__(self) -> Iterator[str]:
        return self._files(quiet=False)

    def _files(self, quiet: bool) -> Iterator[str]:
        for path in self._paths:
            if not path.is_dir():
                yield str(path)
                continue
            for folder, folders, names in os.walk(path, onerror=None if quiet else _report_unreadable):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in sorted(name for name in names if not name.startswith(".")):
                    if self._every or Path(name).suffix.lower() in SUFFIXES:
                        yield str(Path(folder, name))
                    else:
                        self.skipped += 1


def read_file(name: str) -> bytes:
    """The bytes of a regular file of at most 256 MiB.

    Raises:
        OSError: it is something else, larger, or unreadable.
    """
    # Non-blocking, so that a pipe among the files is refused instead of waited for.
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MAX_FILE_BYTES} bytes")
        return stream.read()


def _check_exists(path: Path) -> None:
    try:
        path.stat()
    except FileNotFoundError as error:
        raise CommandError(f"{path}: no such file or folder") from error
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _report_unreadable(error: OSError) -> None:
    print(f"engine classify: {rows.printable(str(error.filename))}: {error.strerror}, skipped", file=sys.stderr)


def _summary(counts: Counter[str], skipped: int, took_s: float) -> str:
    total = counts.total()
    left_out = f"; left out without an image's suffix: {skipped} (--all tries them)" if skipped else ""
    if not total:
        return f"engine classify: no images found{left_out}"
    by_label = ", ".join(f"{count} {label}" for label, count in sorted(counts.items()))
    return f"{total} images in {took_s:.1f} s ({total / took_s:.1f}/s): {by_label}{left_out}"
