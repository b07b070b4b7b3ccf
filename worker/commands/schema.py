"""`worker schema`: JSON Schemas of event, verdict and dead letter, as files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from worker.errors import ConfigurationError
from worker.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write."""
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write the schemas to; made if missing")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Write the three files and print their names.

    Raises:
        ConfigurationError: the folder cannot be written.
    """
    from worker.contracts.schemas import all_schemas

    folder: Path = arguments.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, schema in all_schemas().items():
            path = folder / name
            path.write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            print(path)
    except OSError as error:
        raise ConfigurationError(f"--out {folder}: {error.strerror or error}") from error
    return 0
