"""Made-up shards in D3's layout for the training tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from tests.train.pictures import picture


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A plain tar with these members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def encoded(seed: int, extension: str, *, fake: bool, side: int = 48) -> bytes:
    """A small picture as a file."""
    buffer = io.BytesIO()
    picture(seed, side, side + 8, fake=fake).save(buffer, {"jpg": "JPEG", "png": "PNG"}[extension])
    return buffer.getvalue()


def d3(folder: Path, shards: int = 3, records: int = 4, side: int = 48) -> list[Path]:
    """Shards of records with one real and four fakes, members in no particular order, extensions mixed as in D3."""
    paths = []
    for s in range(shards):
        members = []
        for r in range(records):
            number = s * records + r
            key = f"elsa_v2__train__{number}"
            images = [
                (f"{key}.gen_{g}.{'jpg' if (g + r) % 2 else 'png'}", encoded(100 * number + g, "png", fake=True, side=side))
                for g in range(4)
            ]
            images.insert(r % 5, (f"{key}.real.jpg", encoded(100 * number + 9, "jpg", fake=False, side=side)))
            members += [(f"{key}.caption.txt", b"a caption"), *images, (f"{key}.url.txt", b"u")]
        paths.append(tar(folder / f"elsa-{s:04d}.tar", members))
    return paths
