"""The README's settings table, made from the settings themselves: `python -m worker.settings_table` rewrites it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

from pydantic import BaseModel, SecretStr

from worker.settings import Settings, environment_name

START, END = "<!-- settings: start -->", "<!-- settings: end -->"


def table() -> str:
    """Markdown: one row a setting, in the order of the groups."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for group_name, group_field in Settings.model_fields.items():
        group = cast(type[BaseModel], group_field.annotation)
        for name, field in group.model_fields.items():
            description = (field.description or "").replace("|", "\\|")
            rows.append(f"| `{environment_name(group_name, name)}` | {_shown(field.default)} | {description} |")
    return "\n".join(rows)


def rewritten(readme: str) -> str:
    """The README with its table renewed.

    Raises:
        ValueError: the README has no markers.
    """
    before, start, rest = readme.partition(START)
    _old, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"README.md lacks {START} and {END}")
    return f"{before}{START}\n{table()}\n{END}{after}"


def _shown(default: object) -> str:
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if default is None or default == ():
        return ""
    if isinstance(default, tuple):
        return f"`{','.join(map(str, default))}`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`"


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    path.write_text(rewritten(path.read_text()))
