"""How near training comes to the bare step: loader alone, augmentation alone, step alone, and the whole, in turns, in one run.

    python -m benchmarks.training [--data FOLDER] [--device cpu] [--tokens 196] [--records 4] [--workers 1] [--seconds 20]

`bare` is forward and backward of the recipe's loss on one batch that already lies on the device: no loader, no copy, no
optimiser, no average. `step` adds copy, clipping, optimiser and average. `loader` takes batches and drops them. `whole` is
`train.pretrain.train` as it ships. Every kind of input is measured against the same bare step: decoded images (`store`),
shards as they lie (`shards`), crops augmented beforehand (`pool`); on CUDA also views computed on the device (`device`).
Turns alternate, so that all see the
same load; a figure is the median over turns, a ratio the median of the turns' ratios. Beside views a second of the clock stand
milliseconds of processor time a view, of the training process and of a loader process: on a shared machine they are the steadier.
Results go to benchmarks/results/training-<device>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import record

TURNS = 5
IMAGES = 48
VIEWS_A_RECORD = 8


def made_up(folder: Path) -> Path:
    """A folder with a manifest: 320 px photographs-like JPEGs as reals, lossless PNGs as fakes, of noise over gradients."""
    lines = ["file\tsplit\tlabel\tgenerator\tsource"]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(IMAGES):
        label = ("real", "fake")[i % 2]
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((320, 320), Image.Resampling.BICUBIC)
        rgb = np.clip(np.asarray(coarse).astype(int) + rng.integers(-12, 13, (320, 320, 3)), 0, 255).astype(np.uint8)
        name = f"{i}.{'jpg' if label == 'real' else 'png'}"
        Image.fromarray(rgb).save(folder / name, **({"quality": 90} if label == "real" else {"compress_level": 1}))
        lines.append(f"{name}\ttrain\t{label}\tmade\tsource")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder


def paired_shards(folder: Path, out: Path) -> Path:
    """One shard of records with a real and a fake each, as D3 has them, from a folder with a manifest."""
    import tarfile

    from train.data import read_manifest

    out.mkdir(parents=True, exist_ok=True)
    sides: tuple[list[Path], list[Path]] = ([], [])
    for entry in read_manifest(folder, "train"):
        sides[entry.label].append(entry.path)
    with tarfile.open(out / "shard-000000.tar", "w") as tar:
        for number, (real, fake) in enumerate(zip(*sides, strict=False)):
            for role, path in (("real", real), ("gen_0", fake)):
                info = tarfile.TarInfo(f"{number:06d}.{role}{path.suffix.lower()}")
                data = path.read_bytes()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out


def prepared(data: Path, root: Path, recipes: dict[str, Any]) -> dict[str, Path]:
    """The folder that each input's recipe reads from."""
    from train import pool, shard_index, store
    from train.data import read_manifest
    from train.sources import SHARD_INDEX

    store.build(read_manifest(data, "train"), root / "store")
    pool.build(root / "store", root / "store" / "pool", recipes["pool"].pool_copies)
    shards = shard_index.shards_in(paired_shards(data, root / "tars"))
    shard_index.build(shards, root / "shards" / SHARD_INDEX)
    return {name: root / ("shards" if name == "shards" else "store") for name in recipes}


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """Views a second by the clock, and milliseconds of this process's processor time a view."""

    views_per_s: float
    cpu_ms_a_view: float


def measure(views: int, run: Callable[[], object], seconds: float) -> Figure:
    """A call of `views` views, repeated for about `seconds`."""
    began, cpu, calls = time.perf_counter(), time.process_time(), 0
    while not calls or time.perf_counter() - began < seconds:
        run()
        calls += 1
    return Figure(views * calls / (time.perf_counter() - began), 1000 * (time.process_time() - cpu) / (views * calls))


def bare_step(run: Any, batch: Any) -> Callable[[], None]:
    """Forward and backward alone, on tensors that lie on the device already."""
    import torch

    def step() -> None:
        run.gradients(on_device)
        if run.device.type == "cuda":
            torch.cuda.synchronize()

    on_device = dataclasses.replace(batch, patches=batch.patches.to(run.device), index=batch.index.to(run.device))
    return step


def turns(recipe: Any, folder: Path, options: argparse.Namespace, bare: Callable[[], None]) -> Iterator[dict[str, Figure]]:
    """One turn after the other: bare, loader, step and whole of one input, each for its share of the seconds."""
    from train.pretrain import Run
    from train.views import loader

    share = options.seconds / TURNS / 4
    views = recipe.phases[0].records * VIEWS_A_RECORD
    with tempfile.TemporaryDirectory(prefix="code-bench-") as scratch:
        run = Run(recipe, folder, Path(scratch), options.device)
        in_process = loader(folder, recipe, 0, workers=0)
        batch = next(in_process)
        run.train_step(batch)
        for _ in range(TURNS):
            yield {
                "bare": measure(views, bare, share),
                "loader": taken(loader(folder, recipe, 0, workers=options.workers), views, share, options.workers),
                "loader in process": measure(views, lambda: next(in_process), share),
                "step": measure(views, lambda: run.train_step(batch), share),
                "whole": whole(run, share, options.workers),
            }


def taken(batches: Any, views: int, seconds: float, workers: int) -> Figure:
    """The loader alone: its batches are dropped."""
    for _ in islice(batches, 2 * max(1, workers)):  # processes start and read ahead
        pass
    figure = measure(views, lambda: next(batches), seconds)
    batches.close()
    return figure


def whole(run: Any, seconds: float, workers: int) -> Figure:
    """The shipped loop, from the end of its first steps: starting the loader processes does not count."""
    from train.pretrain import train

    seen: list[tuple[float, float, int]] = []

    def note(_progress: object) -> None:
        seen.append((time.perf_counter(), time.process_time(), run.views))
        if seen[-1][0] - seen[0][0] >= seconds and len(seen) > 3:
            raise _EnoughError

    run.save = lambda: None  # the checkpoint, every three minutes, is not of the step
    with contextlib.suppress(_EnoughError):
        train(run, workers=workers, line_every_s=0.0, on_progress=note)
    (began, cpu, first), (ended, cpu_end, last) = seen[min(2, len(seen) - 2)], seen[-1]
    return Figure((last - first) / (ended - began), 1000 * (cpu_end - cpu) / (last - first))


class _EnoughError(Exception):
    """Ends the measured loop."""


def augmentation(folder: Path, seconds: float) -> dict[str, float]:
    """Images a second of processor time through each preset, from decoded images of 320 px at most."""
    from train.augment import PRESETS
    from train.store import PixelStore

    store = PixelStore(folder)
    images = [Image.fromarray(store.pixels(item)) for item in store.items[:32]]
    out = {}
    for name, preset in PRESETS.items():
        rng, turn = np.random.default_rng(0), iter(range(1 << 62))
        figure = measure(1, lambda: np.asarray(preset(images[next(turn) % len(images)], rng, 1.0)), seconds)  # noqa: B023
        out[name] = round(1000 / figure.cpu_ms_a_view, 1)
    return out


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options, of the command line where none are given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, help="folder with a manifest; default: images made up for the purpose")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tokens", type=int, default=196, help="patches a view keeps (196: whole crops)")
    parser.add_argument("--records", type=int, default=4, help="images of each class a step; take 256 on a GPU")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads")
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    parser.add_argument("--seconds", type=float, default=40, help="for each input")
    return parser.parse_args(given)


def main() -> None:
    """Measure, write, print."""
    options = arguments()
    path, figures = measured(options)
    print(table(figures))
    print(path)


def measured(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The figures, and where they were written."""
    import torch

    from train.pretrain import Run
    from train.recipe import Phase, Recipe
    from train.views import loader

    torch.set_num_threads(options.threads)
    phase = Phase(1 << 30, options.records, options.tokens, "native", "platform", depth=options.depth)
    base = Recipe("bench", (phase,), cross_entropy_weight=1.0, ema_decay=0.99, clip_norm=1.0, loss="paper")
    recipes = {"store": base, "shards": base, "pool": dataclasses.replace(base, pool_copies=4)}
    if options.device != "cpu":
        recipes["device"] = dataclasses.replace(base, augment_on="device")
    with tempfile.TemporaryDirectory(prefix="code-bench-") as scratch:
        root = Path(scratch)
        folders = prepared(options.data or made_up(root / "images"), root, recipes)
        bare_run = Run(base, folders["store"], root / "bare", options.device)
        bare = bare_step(bare_run, next(iter(loader(folders["store"], base, 0, workers=0))))
        bare()
        inputs = {name: list(turns(recipe, folders[name], options, bare)) for name, recipe in recipes.items()}
        presets = augmentation(folders["store"], 4.0)
    figures = {
        "device": str(options.device) if options.device == "cpu" else torch.cuda.get_device_name(),
        "settings": {k: getattr(options, k) for k in ("tokens", "records", "depth", "threads", "workers", "seconds")},
        "data": "given" if options.data else "made up",
        "augmentation_images_per_s": presets,
        "inputs": {name: summary(rows) for name, rows in inputs.items()},
    }
    name = re.sub(r"[^a-z0-9]+", "-", figures["device"].lower()).strip("-")
    return record.write(f"training-{name}", figures), figures


def summary(rows: list[dict[str, Figure]]) -> dict[str, Any]:
    """Medians over the turns, and of the ratios within each turn."""
    out: dict[str, Any] = {}
    for name in rows[0]:
        out[name] = {
            "views_per_s": round(median(row[name].views_per_s for row in rows), 1),
            "cpu_ms_a_view": round(median(row[name].cpu_ms_a_view for row in rows), 3),
        }
    for name in ("loader", "step", "whole"):
        ratios = sorted(row[name].views_per_s / row["bare"].views_per_s for row in rows)
        out[name] |= {"over_bare": round(median(ratios), 3), "over_bare_range": [round(ratios[0], 3), round(ratios[-1], 3)]}
    for name in ("step", "whole"):
        by_cpu = median(row["bare"].cpu_ms_a_view / row[name].cpu_ms_a_view for row in rows)
        out[name]["over_bare_by_cpu_time"] = round(by_cpu, 3)
    return out


def table(figures: dict[str, Any]) -> str:
    """Markdown: a row an input."""
    lines = [
        f"| input ({figures['device']}) | bare | loader | step | whole | whole / bare (range) | by processor time "
        "| processor ms a view: bare, loader |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in figures["inputs"].items():
        rates = " | ".join(f"{row[what]['views_per_s']:,.0f}" for what in ("bare", "loader", "step", "whole"))
        low, high = row["whole"]["over_bare_range"]
        cells = f"{row['whole']['over_bare']:.2f} ({low:.2f}-{high:.2f}) | {row['whole']['over_bare_by_cpu_time']:.2f}"
        costs = f"{row['bare']['cpu_ms_a_view']:.2f}, {row['loader in process']['cpu_ms_a_view']:.2f}"
        lines.append(f"| {name} | {rates} | {cells} | {costs} |")
    presets = ", ".join(f"{name} {number:.0f}" for name, number in figures["augmentation_images_per_s"].items())
    return "\n".join([*lines, f"views a second; augmentation alone, images a second of one core: {presets}"])


if __name__ == "__main__":
    main()
