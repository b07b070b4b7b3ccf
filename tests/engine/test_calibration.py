"""Calibrations: monotone, in [0, 1], equal to scikit-learn's, and never a verdict from a broken score."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from engine.calibration import Calibration, Isotonic, Platt, Temperature

positive = st.floats(1e-6, 1e6)
finite = st.floats(-1e6, 1e6)


@st.composite
def isotonics(draw: st.DrawFn) -> Isotonic:
    raw = sorted(draw(st.sets(st.floats(-100, 100, width=32), min_size=1, max_size=20)))
    probability = sorted(draw(st.lists(st.floats(0, 1), min_size=len(raw), max_size=len(raw))))
    return Isotonic(raw=tuple(raw), probability=tuple(probability))


calibrations = st.one_of(
    st.builds(Platt, slope=positive, intercept=finite), st.builds(Temperature, temperature=positive), isotonics()
)


@given(calibrations, st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_monotone_within_zero_and_one(calibration: Platt | Temperature | Isotonic, raw: list[float]) -> None:
    scores = np.array(sorted(raw), np.float32)
    with np.errstate(all="raise", under="ignore"):
        probability = calibration.apply(scores)
    assert probability.dtype == np.float32 and probability.shape == scores.shape
    assert ((probability >= 0) & (probability <= 1)).all()
    assert (np.diff(probability) >= 0).all()


@given(calibrations)
def test_nan_stays_nan(calibration: Platt | Temperature | Isotonic) -> None:
    probability = calibration.apply(np.array([0.0, np.nan, 1.0], np.float32))
    assert np.isnan(probability).tolist() == [False, True, False]


@given(calibrations)
def test_json_and_back(calibration: Platt | Temperature | Isotonic) -> None:
    adapter: TypeAdapter[Platt | Temperature | Isotonic] = TypeAdapter(Calibration)
    assert adapter.validate_json(calibration.model_dump_json()) == calibration


@given(slope=st.floats(0.01, 100), intercept=st.floats(-10, 10), raw=st.floats(-30, 30, width=32))
def test_platt_and_temperature_are_the_logistic_function(slope: float, intercept: float, raw: float) -> None:
    def logistic(logit: float) -> float:
        return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0

    scores = np.array([raw], np.float32)
    assert Platt(slope=slope, intercept=intercept).apply(scores)[0] == pytest.approx(logistic(slope * raw + intercept), abs=1e-6)
    assert Temperature(temperature=slope).apply(scores)[0] == pytest.approx(logistic(raw / slope), abs=1e-6)


def test_isotonic_is_scikit_learns() -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    rng = np.random.default_rng(0)
    raw = rng.standard_normal(500).astype(np.float32)
    labels = rng.random(500) < 1 / (1 + np.exp(-2 * raw))
    fitted = isotonic.IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(raw, labels)
    own = Isotonic(raw=tuple(map(float, fitted.X_thresholds_)), probability=tuple(map(float, fitted.y_thresholds_)))
    queries = np.concatenate([np.linspace(-5, 5, 999), [-np.inf, np.inf]]).astype(np.float32)
    expected = fitted.predict(np.clip(queries, -100, 100))
    np.testing.assert_allclose(own.apply(queries), expected, atol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        {"method": "platt", "slope": 0.0},
        {"method": "platt", "slope": -1.0},
        {"method": "platt", "slope": math.nan},
        {"method": "platt", "slope": 1.0, "intercept": math.inf},
        {"method": "temperature", "temperature": 0.0},
        {"method": "isotonic", "raw": [0.0, 0.0], "probability": [0.1, 0.2]},
        {"method": "isotonic", "raw": [0.0, 1.0], "probability": [0.2, 0.1]},
        {"method": "isotonic", "raw": [0.0, 1.0], "probability": [0.2]},
        {"method": "isotonic", "raw": [0.0, 1.0], "probability": [0.2, 1.1]},
        {"method": "isotonic", "raw": [], "probability": []},
        {"method": "beta", "slope": 1.0},
        {},
    ],
)
def test_what_would_not_be_monotone_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Calibration).validate_python(values)
