"""Photographs that Debian packages ship, as more real images: crops at many scales beside a corpus.

    apt-get download lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers gcompris-qt-data
    for f in *.deb; do dpkg-deb -x "$f" unpacked; done
    python -m train.photographs --unpacked unpacked --corpus CORPUS --out DATA

DATA then holds `photographs/`, a link `corpus`, and a manifest.tsv of both, for `--data`. The wallpapers and a learning game's
photographs were picked by eye; drawings, renders and what was painted over are left out. Their files are of 0.3 to 18 megapixels
and so hold what the small images of a corpus lack: a crop of 224 px that shows a fiftieth of the scene, as it does of a camera's
photograph, and every scale between that and the whole. Every fourth photograph is for validation. Terms of use stand in each
package's `copyright` file.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from PIL import Image

from train import qt_resources
from train.data import DataError
from train.terminal import say

SIDE_PX = 320
HELD_OUT_OF = 4
COLUMNS = ("file", "split", "label", "generator", "source", "layout", "original_format", "repo", "path", "licence", "sha256")


@dataclass(frozen=True, slots=True)
class Package:
    """Photographs of a package, one source: `files` are paths (patterns) below `folder`, or inside a Qt resource file there.

    crops: of each photograph in training; a quarter of them of one for validation. licence: as the copyright file states it.
    """

    source: str
    licence: str
    folder: str
    files: tuple[str, ...]
    crops: int = 24


GCOMPRIS = "usr/share/gcompris-qt/rcc"
GCOMPRIS_TERMS = "CC-BY, CC-BY-SA, CC0, GFDL, GPL and public domain, file by file"
PACKAGES = (
    Package("lomiri-wallpapers-16.04", "CC-BY-4.0 and CC-BY-SA-4.0", "usr/share/backgrounds", (
        "Bridge_by_*", "Dragonfly_by_*", "Picture_0B_*", "Picture_1A_*", "Wine_by_*", "aitzgorri_by_*", "free_by_*",
        "friends_by_*", "greentock_by_*", "life_by_*", "picosdeeuropa_by_*", "seeding_by_*", "sunset_by_*",
    )),
    Package("lomiri-wallpapers-20.04", "CC-BY-4.0 and CC-BY-SA-4.0", "usr/share/backgrounds", ("Kleiber_by_*",)),
    Package("mate-backgrounds", "GPL-2+", "usr/share/backgrounds/mate/nature", (
        "Aqua.jpg", "Blinds.jpg", "Dune.jpg", "FreshFlower.jpg", "Garden.jpg", "GreenMeadow.jpg", "LadyBird.jpg", "RainDrops.jpg",
        "Storm.jpg", "TwoWings.jpg", "Wood.jpg", "YellowFlower.jpg",
    )),
    Package("plasma-workspace-wallpapers", "GPL-2+", "usr/share/wallpapers", tuple(
        f"{name}/contents/images/2560x1600.jpg"
        for name in ("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite",
                     "OneStandsOut", "Path", "summer_1am")
    )),
    Package("gcompris-animals", GCOMPRIS_TERMS, GCOMPRIS, (
        "erase.rcc:*/resource/*.webp", "explore_farm_animals.rcc:*/animals/*.webp", "explore_world_animals.rcc:*/animals/*.webp",
    ), crops=8),
    Package("gcompris-places", GCOMPRIS_TERMS, GCOMPRIS, (
        "explore_monuments.rcc:*/resource/*/*.webp", "explore_world_music.rcc:*/music/*.webp", "clickgame.rcc:*/sea?.webp",
        *(f"details.rcc:*/{name}_background.webp" for name in (
            "EgeskovSlotSpejling", "GizahPyramids", "EilanDonanCastle", "TowerBridgeLondon", "Chenonceau", "NDP", "Nagoya",
            "TajMahal", "Neuschwanstein", "OperaSidney", "FanoeWindmill",
        )),
    ), crops=8),
)  # fmt: skip


def found(unpacked: Path) -> Iterator[tuple[Package, str, bytes]]:
    """The photographs below a folder that packages were unpacked into: package, path, the file's bytes.

    What is smaller than a crop is passed over. Raises DataError naming what is not there.
    """
    for package in PACKAGES:
        for pattern in package.files:
            outer, _, inner = pattern.partition(":")
            matches = sorted((unpacked / package.folder).glob(outer))
            if not matches:
                raise DataError(f"{unpacked / package.folder}: no {outer}; unpack the packages into {unpacked}")
            for match in matches:
                name = str(match.relative_to(unpacked))
                held = sorted(qt_resources.files(match)) if inner else [("", match.read_bytes())]
                chosen = [(inside, data) for inside, data in held if not inner or fnmatch(inside, inner)]
                yield from ((package, name + inside, data) for inside, data in chosen if _large(data))


def _large(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return min(image.size) >= SIDE_PX


def crops(photograph: Image.Image, count: int, rng: np.random.Generator) -> Iterator[Image.Image]:
    """`count` crops of 320 px: the first at the photograph's own resolution, the others after it was made smaller.

    The scale is log-uniform between one and what leaves a shorter side of 320 px, the resampling filter is drawn too.
    """
    smallest = SIDE_PX / min(photograph.size)
    for number in range(count):
        scale = float(np.exp(rng.uniform(np.log(smallest), 0.0))) if number >= count // 4 else 1.0
        side = min(round(SIDE_PX / scale), *photograph.size)
        left, top = (int(rng.integers(extent - side + 1)) for extent in photograph.size)
        if scale == 1.0:
            # On the grid of the file's own compression.
            left, top = left // 16 * 16, top // 16 * 16
        way = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BOX)[int(rng.integers(3))]
        piece = photograph.crop((left, top, left + side, top + side))
        yield piece if side == SIDE_PX else piece.resize((SIDE_PX, SIDE_PX), way)


def write(unpacked: Path, out: Path, seed: int = 0) -> list[dict[str, str]]:
    """Writes the crops as lossless WebP below `out`/photographs; returns their rows of a manifest. Raises DataError."""
    folder = out / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (package, path, data) in enumerate(found(unpacked)):
        split = "val" if number % HELD_OUT_OF == HELD_OUT_OF - 1 else "train"
        count = package.crops if split == "train" else package.crops // 4
        photograph = Image.open(io.BytesIO(data)).convert("RGB")
        for i, crop in enumerate(crops(photograph, count, np.random.default_rng((seed, number)))):
            file = folder / f"{number:03d}-{i:02d}.webp"
            crop.save(file, "WEBP", lossless=True, method=0)
            rows.append({
                "file": str(file.relative_to(out)), "split": split, "label": "real", "generator": "camera",
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
    parser.add_argument("--unpacked", type=Path, required=True, help="folder that the packages were unpacked into")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with manifest.tsv to put them beside")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        rows = write(args.unpacked, args.out)
        total = joined(args.corpus, rows, args.out)
    except (DataError, OSError) as exc:
        print(exc, file=sys.stderr)
        return 2
    say(f"{args.out}: {len(rows)} crops of photographs beside the corpus, {total} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
