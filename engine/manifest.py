"""The manifest of a model bundle, `format: code-bundle/1`: what the model is, where its files lie, what was measured.

Fields this version does not know are ignored, so that an older worker reads a bundle to which something was added; what
changes the meaning of a known field gets a new `format`.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from engine.calibration import Calibration
from engine.heads import EMBEDDING_DIM, HEADS, Head
from engine.preprocess import Layout, Preprocess

FORMAT: Final = "code-bundle/1"
MANIFEST_FILE = "manifest.json"
ENCODER_FILE = "encoder.safetensors"
HEADS_FILE = "heads.safetensors"
MODEL_CARD_FILE = "MODEL_CARD.md"
REPLAY_FILE = "replay.safetensors"
ARCH: Final = "vit_tiny_patch16_224"

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Probability = Annotated[float, Field(ge=0, le=1)]
Channel = Annotated[int, Field(ge=0, le=255)]
EmbeddingRow = Annotated[tuple[float, ...], Field(min_length=EMBEDDING_DIM, max_length=EMBEDDING_DIM)]


def is_plain_name(name: str) -> bool:
    """Whether a name can only mean an entry of the folder it stands in: no separators, no leading dot, 1 to 128 characters."""
    return _PLAIN_NAME.fullmatch(name) is not None


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError(f"{name!r} is not a plain name (letters, digits, '.', '_', '+', '-'; no folder)")
    return name


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class FileRef(_Part):
    """A file beside the manifest and the SHA-256 of its bytes."""

    file: str
    sha256: Sha256

    @field_validator("file")
    @classmethod
    def _beside_the_manifest(cls, name: str) -> str:
        return _plain(name)


class EncoderPart(FileRef):
    """The encoder's weights, by timm's names, and what is needed to build it."""

    arch: Literal["vit_tiny_patch16_224"] = ARCH
    layer_norm_eps: float = Field(gt=0, lt=1e-2)
    parameters: int = Field(gt=0)


class LinearFacts(_Part):
    """Logistic regression: `c` is the inverse regularisation it was fitted with, None where unknown."""

    c: float | None = None


class KnnFacts(_Part):
    """Nearest neighbour with cosine distance: how many images of each class the gallery holds."""

    k: Literal[1] = 1
    metric: Literal["cosine"] = "cosine"
    reals: int = Field(ge=1)
    fakes: int = Field(ge=1)


class OcsvmFacts(_Part):
    """One-class SVM on real images: kernel (gamma x.v + coef0)^degree."""

    kernel: Literal["poly"] = "poly"
    gamma: float = Field(gt=0)
    degree: int = Field(ge=1, le=6)
    coef0: float = 0.0
    nu: float | None = None
    support_vectors: int = Field(ge=1)


class HeadsPart(FileRef):
    """The heads' arrays and facts."""

    linear: LinearFacts
    knn: KnnFacts
    ocsvm: OcsvmFacts


class PreprocessPart(_Part):
    """The preprocessing the model was trained and evaluated with; `id` must be the one its values give here."""

    id: str
    crop_px: int
    mean: tuple[float, float, float]
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    pad_rgb: tuple[Channel, Channel, Channel]
    alpha_over_rgb: tuple[Channel, Channel, Channel]

    @classmethod
    def of(cls, preprocess: Preprocess) -> PreprocessPart:
        """The block for a preprocessing."""
        return cls(
            id=preprocess.id,
            crop_px=preprocess.crop_px,
            mean=preprocess.mean,
            std=preprocess.std,
            pad_rgb=preprocess.pad_rgb,
            alpha_over_rgb=preprocess.alpha_over_rgb,
        )

    @property
    def value(self) -> Preprocess:
        """The preprocessing of this block."""
        return Preprocess(self.crop_px, self.mean, self.std, self.pad_rgb, self.alpha_over_rgb)

    @model_validator(mode="after")
    def _is_what_this_version_does(self) -> PreprocessPart:
        here = Preprocess()
        for name in ("crop_px", "pad_rgb", "alpha_over_rgb"):
            if getattr(self, name) != getattr(here, name):
                raise ValueError(f"{name} is {getattr(self, name)}, this version only does {getattr(here, name)}")
        if self.value.id != self.id:
            raise ValueError(f"id is {self.id}, but these values have the id {self.value.id} in this version")
        return self


class Threshold(_Part):
    """A calibrated probability at which a named false-positive rate was met.

    An image counts as AI-generated from `threshold` on (score >= threshold). `fpr` is the share of `reals` at or above it,
    `fpr_upper` the upper end of its one-sided 95% Clopper-Pearson interval; `tpr` the share of generated images at or above it.
    """

    target_fpr: Probability
    threshold: float = Field(ge=0)
    fpr: Probability
    fpr_upper: Probability
    reals: int = Field(ge=1)
    tpr: Probability | None = None
    fakes: int | None = Field(None, ge=1)
    crops: Layout = "center"


class Band(_Part):
    """Scores low <= score < high are too uncertain to decide."""

    low: Probability
    high: Probability

    @model_validator(mode="after")
    def _in_order(self) -> Band:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Histogram(_Part):
    """Counts between edges: len(edges) = len(counts) + 1, edges strictly ascending."""

    edges: tuple[float, ...] = Field(min_length=2, max_length=1001)
    counts: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _fits(self) -> Histogram:
        if len(self.edges) != len(self.counts) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ValueError("edges must be strictly ascending and one more than counts")
        return self


class Reference(_Part):
    """What the model saw when it was made, to measure drift against.

    `images` is how many; `embedding_mean` and `embedding_std` have 192 values; `scores` is the distribution of the calibrated
    probability by head.
    """

    images: int = Field(ge=1)
    embedding_mean: EmbeddingRow
    embedding_std: EmbeddingRow
    scores: dict[Head, Histogram] = Field(default_factory=dict)


class Parent(_Part):
    """A bundle this one was made from; `digest` is the SHA-256 of its manifest."""

    name: str
    version: str
    digest: Sha256


class Manifest(_Part):
    """`manifest.json`. Thresholds and abstain bands are in calibrated probabilities, by head."""

    format: Literal["code-bundle/1"] = FORMAT
    name: str
    version: str
    created_at: AwareDatetime
    encoder: EncoderPart
    heads: HeadsPart
    preprocess: PreprocessPart
    calibration: dict[Head, Calibration]
    thresholds: dict[Head, dict[str, Threshold]] = Field(default_factory=dict)
    abstain: dict[Head, Band] = Field(default_factory=dict)
    reference: Reference | None = None
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    parents: tuple[Parent, ...] = ()
    model_card: FileRef
    replay: FileRef | None = None
    """Embeddings that a later refit of the heads starts from (train/replay.py); serving has no use for them."""

    @field_validator("name", "version")
    @classmethod
    def _plain_names(cls, name: str) -> str:
        return _plain(name)

    @field_validator("calibration")
    @classmethod
    def _every_head(cls, calibration: dict[Head, Calibration]) -> dict[Head, Calibration]:
        missing = [head for head in HEADS if head not in calibration]
        if missing:
            raise ValueError(f"no calibration for {', '.join(missing)}")
        return calibration

    @model_validator(mode="after")
    def _files_differ(self) -> Manifest:
        files = [MANIFEST_FILE, self.encoder.file, self.heads.file, self.model_card.file]
        files += [self.replay.file] if self.replay is not None else []
        if len(set(files)) != len(files):
            raise ValueError(f"encoder, heads, model card and replay must be files of their own: {', '.join(files[1:])}")
        return self
