"""`train pack`: images of a folder with a manifest to shards in D3's layout, with aligned fakes where an autoencoder is given."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.terminal import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments, without --data and --out."""
    parser.add_argument("--split", default="train")
    parser.add_argument("--records", type=at_least(1), default=1000, help="records a shard")
    parser.add_argument("--autoencoder", type=Path, help="folder of an autoencoder: reals get their aligned fakes")


def run(args: argparse.Namespace) -> int:
    """Writes the shards and says how many. Raises DataError."""
    from train.data import read_manifest, write_shards

    entries = read_manifest(args.data, args.split)
    shards, damage = write_shards(entries, args.out, args.records, aligned_maker(args.autoencoder, args.out))
    print(f"{len(shards)} shards in {args.out}; {damage}")
    return 0


def aligned_maker(autoencoder: Path | None, out: Path) -> Callable[[bytes], bytes] | None:
    """A real image's bytes -> its aligned fake as a file: a JPEG with the original's own tables, else a PNG.

    Reconstructions are
    remembered in a folder of `out`. Raises AlignedError; what it returns raises ImageError where bytes cannot be decoded.
    """
    if autoencoder is None:
        return None
    import numpy as np
    from PIL import Image

    from engine.images import read
    from train.aligned import reconstruction
    from train.store import LIMITS, tables_of

    reconstruct = reconstruction(autoencoder, out)

    def make(data: bytes) -> bytes:
        decoded = read(data, LIMITS)
        fake = Image.fromarray(reconstruct(np.asarray(decoded.frames[0])))
        tables = tables_of(data) if decoded.format == "JPEG" else None
        parameters: dict[str, Any] = {"format": "PNG"}
        if tables is not None:
            parameters = {"format": "JPEG", "qtables": tables.values, "subsampling": tables.subsampling}
        buffer = io.BytesIO()
        fake.save(buffer, **parameters)
        return buffer.getvalue()

    return make
