"""From a head's raw score to the probability that the image is AI-generated: monotone, in [0, 1], in numpy.

Platt: Platt 1999, p = 1 / (1 + exp(-(slope raw + intercept))). Temperature: Guo et al. 2017 (arXiv 1706.04599), the same with
slope 1 / temperature and no intercept. Isotonic: Zadrozny and Elkan 2002, a non-decreasing piecewise linear function.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Float32 = NDArray[np.float32]


class _Calibration(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    def apply(self, raw: Float32) -> Float32:
        """Calibrate one head's scores.

        Args:
            raw: f32 [n]; infinities count as the largest and smallest score.

        Returns:
            f32 [n] in [0, 1], never decreasing in `raw`. NaN stays NaN: a broken score must not turn into a verdict.
        """
        limit = float(np.finfo(np.float32).max)
        with np.errstate(over="ignore"):
            probability = self._apply(np.clip(np.asarray(raw, np.float64), -limit, limit))
        return np.clip(probability, 0.0, 1.0).astype(np.float32)

    def _apply(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        raise NotImplementedError


class Platt(_Calibration):
    """Logistic function with a slope and an intercept."""

    method: Literal["platt"] = "platt"
    slope: float = Field(gt=0)
    intercept: float = 0.0

    def _apply(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        return _sigmoid(self.slope * raw + self.intercept)


class Temperature(_Calibration):
    """Logistic function with one scale, for scores that are logits."""

    method: Literal["temperature"] = "temperature"
    temperature: float = Field(gt=0)

    def _apply(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        return _sigmoid(raw / self.temperature)


class Isotonic(_Calibration):
    """Linear between knots, constant outside them: scikit-learn's IsotonicRegression with `out_of_bounds="clip"`.

    `raw`: strictly ascending scores; `probability`: never descending, in [0, 1], one for each score.
    """

    method: Literal["isotonic"] = "isotonic"
    raw: tuple[float, ...] = Field(min_length=1, max_length=10_000)
    probability: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _ordered(self) -> Isotonic:
        if len(self.raw) != len(self.probability):
            raise ValueError(f"{len(self.raw)} raw scores for {len(self.probability)} probabilities")
        if any(a >= b for a, b in pairwise(self.raw)):
            raise ValueError("raw scores must be strictly ascending")
        if any(a > b for a, b in pairwise(self.probability)):
            raise ValueError("probabilities must not descend")
        return self

    @cached_property
    def _knots(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.array(self.raw, np.float64), np.array(self.probability, np.float64)

    def _apply(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(np.isnan(raw), np.nan, np.interp(raw, *self._knots))


Calibration = Annotated[Platt | Temperature | Isotonic, Field(discriminator="method")]


def _sigmoid(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    # By the sign, so that neither branch's exponential overflows.
    decay = np.exp(-np.abs(logit))
    probability: NDArray[np.float64] = np.where(logit >= 0, 1.0, decay) / (1.0 + decay)
    return probability
