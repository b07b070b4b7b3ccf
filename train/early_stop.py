"""The early stop: a linear probe on the averaged encoder, and the memory of the best one.

The probe is the paper's (logistic regression, C 0.316, balanced), fitted on training images and scored on held-out ones. Both
are cropped in the middle at native resolution and re-encoded at drawn JPEG qualities, so that no container helps it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from engine.preprocess import center_crop
from train.augment import jpeg
from train.data import DataError

QUALITIES = (60, 96)
BATCH = 32


class Watch:
    """Remembers the best probe and counts those since that were no better."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self.best: dict[str, Tensor] | None = None
        self.best_accuracy, self.best_step, self.since = -1.0, 0, 0
        self.last: float | None = None

    @property
    def exhausted(self) -> bool:
        return self.since >= self._patience

    def note(self, accuracy: float, step: int, average: dict[str, Tensor]) -> bool:
        """Takes a probe's accuracy and the weights it is of; True when patience is at its end."""
        self.last = accuracy
        if accuracy > self.best_accuracy:
            self.best = {name: tensor.detach().clone() for name, tensor in average.items()}
            self.best_accuracy, self.best_step, self.since = accuracy, step, 0
        else:
            self.since += 1
        return self.exhausted

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"best": self.best, "best_accuracy": self.best_accuracy, "best_step": self.best_step, "since": self.since}

    def load(self, state: dict[str, Any] | None) -> None:
        """From a checkpoint; None is one that had no watch."""
        if state is not None:
            self.best = state["best"]
            self.best_accuracy, self.best_step = float(state["best_accuracy"]), int(state["best_step"])
            self.since = int(state["since"])


class Probe:
    """Fixed images to fit on and to score on: crops uint8[n, 224, 224, 3] with labels uint8[n]."""

    def __init__(
        self,
        fit: tuple[NDArray[np.uint8], NDArray[np.uint8]],
        held_out: tuple[NDArray[np.uint8], NDArray[np.uint8]],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        for name, (_, labels) in (("training", fit), ("held-out", held_out)):
            if len(np.unique(labels)) < 2:
                raise DataError(f"the early stop's {name} images are of one class only")
        self._fit, self._held_out, self._mean, self._std = fit, held_out, mean, std

    def accuracy(self, encoder: nn.Module, weights: dict[str, Tensor]) -> float:
        """Balanced accuracy on the held-out images of a probe on `encoder` with `weights` in place of its own."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score

        model = LogisticRegression(C=0.316, class_weight="balanced", max_iter=1500)
        model.fit(self._embedded(encoder, weights, self._fit[0]), self._fit[1])
        return float(
            balanced_accuracy_score(self._held_out[1], model.predict(self._embedded(encoder, weights, self._held_out[0])))
        )

    def _embedded(self, encoder: nn.Module, weights: dict[str, Tensor], crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        device = next(iter(weights.values())).device
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self._mean, self._std))
        out = []
        with torch.no_grad():
            for start in range(0, len(crops), BATCH):
                images = torch.from_numpy(crops[start : start + BATCH]).to(device).permute(0, 3, 1, 2).float() / 255
                out.append(torch.func.functional_call(encoder, weights, ((images - mean) / std,)).float().cpu().numpy())
        return np.concatenate(out)


def crops_of(images: Iterable[tuple[NDArray[np.uint8], int]], seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(uint8[h, w, 3], label) of each image -> crops uint8[n, 224, 224, 3] after a JPEG of drawn quality, and labels uint8[n]."""
    crops, labels = [], []
    for number, (rgb, label) in enumerate(images):
        quality = int(np.random.default_rng((seed, number, 13)).integers(*QUALITIES))
        crops.append(center_crop(np.asarray(jpeg(Image.fromarray(rgb), quality))))
        labels.append(label)
    if not crops:
        raise DataError("the early stop has no images to look at")
    return np.stack(crops), np.array(labels, np.uint8)
