"""Recipes: the shipped ones load, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.recipe import RecipeError, load

SHIPPED = sorted((Path(__file__).parents[2] / "train" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem and recipe.steps > 0


def test_phases_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[[phases]]\nsteps = 3\ndepth = 4\n[[phases]]\nsteps = 2\nstrength_from = 0\n")
    recipe = load(tmp_path / "r.toml")
    assert [recipe.phase_at(s)[0].depth for s in range(5)] == [4, 4, 4, 12, 12]
    assert [recipe.phase_at(s)[1] for s in range(5)] == [0, 0.5, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed = 1\n", r"at least one \[\[phases\]\]"),
        ("lerning_rate = 1.0\n[[phases]]\nsteps = 1\n", "unknown field 'lerning_rate'"),
        ("learning_rate = 'fast'\n[[phases]]\nsteps = 1\n", "learning_rate must be float"),
        ("[[phases]]\nrecords = 3\n", r"phases\[0\]: steps is missing"),
        ("[[phases]]\nsteps = 1\npreset = 'wild'\n", "preset must be one of code, platform"),
        ("[[phases]]\nsteps = 1\ntokens = 300\n", "tokens in 1..196"),
        ("[[phases]]\nsteps = 1\n[[phases]]\nsteps = 1\ndepth = 3\n", "never shrinks"),
        ("loss = 'other'\n[[phases]]\nsteps = 1\n", "loss must be one of paper, as_released"),
        ("not toml", "r.toml"),
    ],
)
def test_errors_name_the_field(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError, match=says):
        load(tmp_path / "r.toml")


def test_the_digest_is_of_the_content_not_of_the_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text("[[phases]]\nsteps = 1\n")
    (tmp_path / "c.toml").write_text("seed = 1\n[[phases]]\nsteps = 1\n")
    a, b, c = (load(tmp_path / f"{name}.toml").digest for name in "abc")
    assert a == b != c
