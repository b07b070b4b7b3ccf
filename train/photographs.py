"""Pictures that Debian packages ship, as more real images: photographs and human art, crops at many scales beside a corpus.

    apt-get download PACKAGE ...                       # those that `python -m train.photographs --packages` prints
    for f in *.deb; do dpkg-deb -x "$f" unpacked; done
    python -m train.photographs --unpacked unpacked --corpus CORPUS --out DATA

DATA then holds `photographs/`, a link `corpus`, and a manifest.tsv of both, for `--data`. Which files, and what was left out:
`train.packages`. Large photographs hold what the small images of a corpus lack: a crop of 224 px that shows a fiftieth of the
scene, as it does of a camera's photograph, and every scale between that and the whole. Every fourth picture is for validation;
sources that judge are for neither (`split` "judge"). Terms of use stand in each package's `copyright` file. `--first` keeps to
what version 2026.11.27 was trained with.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from PIL import Image

from train import qt_resources
from train.data import DataError
from train.packages import DEBIAN, FIRST, PACKAGES, SIDE_PX, Package
from train.terminal import say

HELD_OUT_OF = 4
JUDGE = "judge"
COLUMNS = ("file", "split", "label", "generator", "source", "layout", "original_format", "repo", "path", "licence", "sha256")


def found(unpacked: Path, packages: Sequence[Package]) -> Iterator[tuple[Package, str, bytes]]:
    """The pictures below a folder that packages were unpacked into: package, path, the file's bytes.

    What is smaller than the package's `smallest` is passed over. Raises DataError naming what is not there.
    """
    for package in packages:
        for pattern in package.files:
            outer, _, inner = pattern.partition(":")
            matches = sorted((unpacked / package.folder).glob(outer))
            if not matches:
                raise DataError(f"{unpacked / package.folder}: no {outer}; unpack the packages into {unpacked}")
            for match in matches:
                name = str(match.relative_to(unpacked))
                held = sorted(qt_resources.files(match)) if inner else [("", match.read_bytes())]
                chosen = [(inside, data) for inside, data in held if not inner or fnmatch(inside, inner)]
                yield from ((package, name + inside, data) for inside, data in chosen if _shorter(data) >= package.smallest)


def _shorter(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        return min(image.size)


def opened(data: bytes, rng: np.random.Generator) -> Image.Image:
    """The picture as RGB; what is transparent lies on a grey that is drawn, white as often as any other."""
    with Image.open(io.BytesIO(data)) as image:
        if not image.has_transparency_data:
            return image.convert("RGB")
        whole = image.convert("RGBA")
    grey = 255 if rng.random() < 0.5 else int(rng.integers(256))
    return Image.alpha_composite(Image.new("RGBA", whole.size, (grey, grey, grey, 255)), whole).convert("RGB")


def crops(photograph: Image.Image, count: int, native: int, rng: np.random.Generator) -> Iterator[Image.Image]:
    """`count` crops of 320 px: the first `native` at the picture's own resolution, the others after it was made smaller.

    The scale is log-uniform between one and what leaves a shorter side of 320 px, the resampling filter is drawn too. A picture
    that is smaller than that gives squares of its shorter side.
    """
    square = min(SIDE_PX, *photograph.size)
    smallest = square / min(photograph.size)
    for number in range(count):
        scale = float(np.exp(rng.uniform(np.log(smallest), 0.0))) if number >= native else 1.0
        side = min(round(square / scale), *photograph.size)
        left, top = (int(rng.integers(extent - side + 1)) for extent in photograph.size)
        if scale == 1.0:
            # On the grid of the file's own compression.
            left, top = left // 16 * 16, top // 16 * 16
        way = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BOX)[int(rng.integers(3))]
        piece = photograph.crop((left, top, left + side, top + side))
        yield piece if side == square else piece.resize((square, square), way)


def write(unpacked: Path, out: Path, packages: Sequence[Package], seed: int = 0) -> list[dict[str, str]]:
    """Writes the crops as lossless WebP below `out`/photographs; returns their rows of a manifest. Raises DataError."""
    folder = out / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (package, path, data) in enumerate(found(unpacked, packages)):
        held_out = number % HELD_OUT_OF == HELD_OUT_OF - 1
        split = JUDGE if package.judge else "val" if held_out else "train"
        count = package.crops if split == "train" else max(1, package.crops // 4)
        # What version 2026.11.27 was made with stays as it was: none of two crops at the picture's own resolution.
        native = count // 4 if package in FIRST else max(1, count // 4)
        rng = np.random.default_rng((seed, number))
        for i, crop in enumerate(crops(opened(data, rng), count, native, rng)):
            file = folder / f"{number:03d}-{i:02d}.webp"
            crop.save(file, "WEBP", lossless=True, method=0)
            rows.append({
                "file": str(file.relative_to(out)), "split": split, "label": "real", "generator": package.kind,
                "source": package.source, "layout": "single", "original_format": path.rpartition(".")[2].upper(),
                "repo": "Debian", "path": f"{path}/crop-{i}",  # so that crops of one photograph form a group
                "licence": package.licence, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            })  # fmt: skip
    return rows


def joined(corpus: Path, rows: list[dict[str, str]], out: Path) -> int:
    """Writes `out`/manifest.tsv with the corpus' rows, whose files are reached through the link `out`/corpus, and `rows`."""
    link = out / "corpus"
    link.unlink(missing_ok=True)
    link.symlink_to(corpus.resolve(), target_is_directory=True)
    with (corpus / "manifest.tsv").open(encoding="utf-8", newline="") as lines:
        theirs = [row | {"file": f"corpus/{row['file']}"} for row in csv.DictReader(lines, delimiter="\t")]
    with (out / "manifest.tsv").open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, delimiter="\t", extrasaction="ignore", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(theirs + rows)
    return len(theirs) + len(rows)


def main() -> int:
    """Exit code 0, or 2 with one line."""
    parser = argparse.ArgumentParser(prog="train.photographs")
    parser.add_argument("--packages", action="store_true", help="print the names of the Debian packages and do nothing else")
    parser.add_argument("--first", action="store_true", help="only the packages that version 2026.11.27 was trained with")
    parser.add_argument("--unpacked", type=Path, help="folder that the packages were unpacked into")
    parser.add_argument("--corpus", type=Path, help="folder with manifest.tsv to put them beside")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.packages:
        print(" ".join(DEBIAN))
        return 0
    if args.unpacked is None or args.corpus is None or args.out is None:
        parser.error("give --unpacked, --corpus and --out")
    try:
        rows = write(args.unpacked, args.out, FIRST if args.first else PACKAGES)
        total = joined(args.corpus, rows, args.out)
    except (DataError, OSError) as exc:
        print(exc, file=sys.stderr)
        return 2
    say(f"{args.out}: {len(rows)} crops of pictures beside the corpus, {total} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
