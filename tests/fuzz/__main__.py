"""Fuzz a target with atheris, guided by coverage: `python -m tests.fuzz TARGET [--minutes M] [--corpus DIR]`.

New inputs go to DIR (default: build/fuzz/TARGET), beginning with the kept ones of tests/fuzz/corpus. A broken promise ends the
run, and its input lies beside DIR as TARGET-crash-*: mend the fault, then put the input into the kept corpus.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

KEPT = Path(__file__).parent / "corpus"
INSTRUMENTED = [
    "worker.contracts",
    "worker.envelopes",
    "worker.stages",
    "engine.containers",
    "engine.images",
    "engine.image_files",
    "engine.tiff_tags",
    "engine.pixels",
]


def main() -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: python -m pip install --constraint constraints.txt atheris")
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.targets import TARGETS
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument(
        "--minimise", type=Path, help="instead: the smallest set of inputs with the same coverage, to this folder"
    )
    given = parser.parse_args()
    found = given.corpus or Path("build/fuzz") / given.target
    found.mkdir(parents=True, exist_ok=True)
    options = ["-timeout=20", "-rss_limit_mb=3000", f"-artifact_prefix={found.parent}/{given.target}-", "-print_final_stats=1"]
    if given.minimise:
        given.minimise.mkdir(parents=True, exist_ok=True)
        folders = ["-merge=1", str(given.minimise), str(found), str(KEPT / given.target)]
    else:
        folders = [f"-max_total_time={int(given.minutes * 60)}", "-max_len=32768", str(found), str(KEPT / given.target)]
    atheris.Setup([sys.argv[0], *options, *folders], TARGETS[given.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
