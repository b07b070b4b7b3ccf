"""A recipe: everything that decides a pretraining run except the data folder, read from one TOML file and frozen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train.augment import PRESETS

Variant = Literal["paper", "as_released"]
VARIANTS: tuple[Variant, ...] = ("paper", "as_released")
TEMPERATURE = 0.1
GEOMETRIES = ("paper", "native")
# Fields that came later count in the digest only where they are set, so that older checkpoints still resume.
_ADDED = (
    *("pool_copies", "align_formats", "align_sizes", "augment_on", "lanes"),
    *("probe_every", "patience", "probe_images", "deterministic", "labelled_share"),
)
CHOICES = {
    "loss": VARIANTS,
    "align_formats": ("none", "lossless", "jpeg"),
    "align_sizes": ("none", "crop", "resize"),
    "augment_on": ("cpu", "device"),
}


class RecipeError(Exception):
    """The recipe is wrong; the message names the file and the field."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of steps with one view geometry.

    records: images of each class in a step (each gives four views). tokens: patches kept of the 196. aligned: share of the fakes
    that are aligned fakes of the step's own reals. strength: of the augmentation preset, linear from first to last step. depth:
    blocks in use; a recipe that begins with fewer than twelve starts the others as identities, so growing changes no output.
    """

    steps: int
    records: int = 64
    tokens: int = 196
    geometry: Literal["paper", "native"] = "paper"
    preset: str = "code"
    strength_from: float = 1.0
    strength_to: float = 1.0
    aligned: float = 0.0
    depth: int = 12


@dataclass(frozen=True, slots=True)
class Recipe:
    """Defaults are the paper's where the paper has one (arXiv 2407.20337, section 4.1).

    whitened_filters: how many of the 192 patch filters start as in `train.initial`. source_balance: exponent of a source's size
    in drawing. pool_copies: crops of each image that are augmented once beforehand (`train.pool`), instead of anew in every step;
    0: none. cross_entropy_weight: of a linear classifier on all views, which the paper does not have. ema_decay: of the
    averaged weights that become the encoder.

    align_formats: `lossless` gives what is lossless a photograph's first compression; `jpeg` re-encodes all images of both
    classes with one distribution of tables; `none` leaves the files' own. align_sizes: real and fake of a slot are cut (`crop`)
    or resized (`resize`) to the same size, so that size says nothing about class. augment_on: `device` computes the views in
    batches on the device (kornia). lanes: streams that a rank's shards are dealt to; loader processes take whole lanes.
    probe_every: steps between linear probes on held-out images (0: none); training stops after `patience` probes without a better
    one, and the best one's weights are the encoder. deterministic: CUDA kernels that repeat bit for bit. labelled_share: for
    `refresh --encoder`, of each class's draws what 50 and more labelled images take; fewer in proportion.
    """

    name: str
    phases: tuple[Phase, ...]
    seed: int = 0
    loss: Variant = "paper"
    temperature: float = TEMPERATURE
    cross_entropy_weight: float = 0.0
    learning_rate: float = 2e-3
    final_learning_rate: float = 1e-6
    weight_decay: float = 2e-5
    beta2: float = 0.999
    warmup_steps: int = 0
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    source_balance: float = 0.5
    whitened_filters: int = 0
    pool_copies: int = 0
    bf16: bool = True
    compile: bool = False
    align_formats: Literal["none", "lossless", "jpeg"] = "lossless"
    align_sizes: Literal["none", "crop", "resize"] = "none"
    augment_on: Literal["cpu", "device"] = "cpu"
    lanes: int = 16
    probe_every: int = 0
    patience: int = 6
    probe_images: int = 512
    deterministic: bool = True
    labelled_share: float = 0.0

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> tuple[Phase, float]:
        """The phase of a step and how far it has gone, 0 to 1."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step / max(1, phase.steps - 1)
            step -= phase.steps
        return self.phases[-1], 1.0

    @property
    def digest(self) -> str:
        """SHA-256 of all fields but the name: what a checkpoint belongs to.

        Fields that came later count only where they are set, so that older checkpoints still belong to their recipes.
        """
        later = {f.name for f in dataclasses.fields(self) if f.name in _ADDED and getattr(self, f.name) == f.default}
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key != "name" and key not in later}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Recipe:
    """Reads a recipe; raises RecipeError naming the field at fault."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise RecipeError(f"{path}: no such recipe") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise RecipeError(f"{path}: {exc}") from exc
    phases = raw.pop("phases", None)
    if not isinstance(phases, list) or not phases:
        raise RecipeError(f"{path}: needs at least one [[phases]] table")
    recipe: Recipe = _filled(
        Recipe,
        {
            "name": path.stem,
            **raw,
            "phases": tuple(_filled(Phase, phase, f"{path}: phases[{i}]") for i, phase in enumerate(phases)),
        },
        str(path),
    )
    _check(recipe, path)
    return recipe


def _filled(kind: Any, values: dict[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise RecipeError(f"{where}: unknown field {unknown[0]!r}")
    for name, value in values.items():
        default = fields[name].default
        expected = int if name == "steps" else type(default)
        if default is dataclasses.MISSING and name != "steps":
            continue
        if expected is float and type(value) is int:
            values = {**values, name: float(value)}
        elif type(value) is not expected:
            raise RecipeError(f"{where}: {name} must be {expected.__name__}, not {value!r}")
    if "steps" in fields and "steps" not in values:
        raise RecipeError(f"{where}: steps is missing")
    return kind(**values)


def _check(recipe: Recipe, path: Path) -> None:
    for name, choices in CHOICES.items():
        if getattr(recipe, name) not in choices:
            raise RecipeError(f"{path}: {name} must be one of {', '.join(choices)}, not {getattr(recipe, name)!r}")
    if recipe.lanes < 1 or recipe.patience < 1 or recipe.probe_every < 0 or recipe.probe_images < 20:
        raise RecipeError(f"{path}: needs lanes >= 1, patience >= 1, probe_every >= 0 and probe_images >= 20")
    if not 0 <= recipe.labelled_share < 1:
        raise RecipeError(f"{path}: labelled_share lies in 0..1, below 1")
    if recipe.pool_copies < 0:
        raise RecipeError(f"{path}: pool_copies must be 0 or more")
    if recipe.pool_copies and (recipe.augment_on == "device" or recipe.align_sizes != "none"):
        raise RecipeError(f"{path}: pool_copies are augmented beforehand: leave augment_on and align_sizes as they are")
    for i, phase in enumerate(recipe.phases):
        where = f"{path}: phases[{i}]"
        if phase.geometry not in GEOMETRIES:
            raise RecipeError(f"{where}: geometry must be one of {', '.join(GEOMETRIES)}, not {phase.geometry!r}")
        if phase.preset not in PRESETS:
            raise RecipeError(f"{where}: preset must be one of {', '.join(PRESETS)}, not {phase.preset!r}")
        if not 1 <= phase.tokens <= 196 or phase.steps < 1 or phase.records < 2:
            raise RecipeError(f"{where}: needs steps >= 1, records >= 2 and tokens in 1..196")
        if not 1 <= phase.depth <= 12 or (i and phase.depth < recipe.phases[i - 1].depth):
            raise RecipeError(f"{where}: depth lies in 1..12 and never shrinks")
        if not 0 <= phase.aligned <= 1 or not 0 <= phase.strength_from <= 1 or not 0 <= phase.strength_to <= 1:
            raise RecipeError(f"{where}: aligned and strengths lie in 0..1")
