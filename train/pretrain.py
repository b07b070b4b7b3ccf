"""Trains the encoder: CoDE's contrastive loss, optionally with cross entropy, resumable at any step.

One process, or several under torchrun (DistributedDataParallel; each rank draws its own records and the loss sees all of them).
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.model import VisionTransformer
from train import checkpoints
from train.early_stop import Probe, Watch
from train.initial import whitened_filters
from train.losses import code_loss, gathered_rows
from train.pretrain_errors import NonFiniteLossError, PretrainError, RankLostError
from train.ranks import Ranks
from train.recipe import Recipe
from train.sources import open_source
from train.trainee import MEAN, STD, Trainee, by_class, parameter_groups, start_as_identities
from train.views import VIEWS, Batch, loader

FEW_TOKENS = 64

__all__ = ["NonFiniteLossError", "PretrainError", "Progress", "RankLostError", "Run", "learning_rate", "train"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress line shows: means over the steps since the last line; `waited_share` of the time for the loader."""

    step: int
    steps: int
    loss: float
    contrastive: float
    cross_entropy: float
    accuracy: float
    aligned_accuracy: float
    learning_rate: float
    views_per_s: float
    waited_share: float


class Run:
    """A pretraining run in a folder: state, step, checkpoint.

    data: folder of a pixel store or of an index of shards. Raises DataError where it cannot be drawn from.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Path,
        folder: Path,
        device: str = "cpu",
        encoder: VisionTransformer | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.recipe, self.data, self.folder = recipe, data, folder
        self.ranks = ranks or Ranks.alone(device)
        self.device = self.ranks.device
        if recipe.deterministic and self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.manual_seed(recipe.seed)
        self.trainee = Trainee(encoder or VisionTransformer()).to(self.device)
        source = open_source(data, recipe, self.ranks.world_size)
        self.data_digest = source.digest
        if recipe.whitened_filters:
            filters = whitened_filters(source, recipe.whitened_filters, recipe.seed, MEAN, STD)
            with torch.no_grad():
                self.trainee.encoder.patch_embed.proj.weight[: len(filters)] = torch.from_numpy(filters)
        start_as_identities(self.trainee.encoder, recipe.phases[0].depth)
        self.average = {name: p.detach().clone() for name, p in self.trainee.named_parameters()}
        self.optimiser = torch.optim.AdamW(
            parameter_groups(self.trainee, recipe.weight_decay),
            lr=recipe.learning_rate,
            betas=(0.9, recipe.beta2),
            fused=self.device.type == "cuda",
        )
        self.watch = Watch(recipe.patience)
        self.skipped: dict[str, str] = {}
        self.step = 0
        self.train_seconds = 0.0
        self._forward: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = self.trainee
        self._prepared_depth = 0

    def start_classifier(self, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        """Begins with a linear head, float32[d] and [], that was fitted on this encoder, instead of a random one."""
        with torch.no_grad():
            for parameters in (dict(self.trainee.named_parameters()), self.average):
                parameters["classifier.weight"].copy_(torch.from_numpy(np.array(weight, np.float32))[None])
                parameters["classifier.bias"].copy_(torch.from_numpy(np.array(bias, np.float32).reshape(1)))

    @property
    def checkpoint(self) -> Path:
        return self.folder / "last.pt"

    def resume(self, other_world_size: bool = False) -> bool:
        """Loads the folder's checkpoint if there is one. Raises PretrainError if it belongs to another recipe, to other data, or
        (unless `other_world_size`) to another number of processes, with which the run would not be the same one."""
        if not self.ranks.agree(int(self.checkpoint.exists())):
            raise PretrainError(f"{self.checkpoint}: not every process sees it; --out must be a folder that all nodes share")
        if not self.checkpoint.exists():
            return False
        state = checkpoints.read(self.checkpoint, self.device)
        if state["recipe"] != self.recipe.digest:
            raise PretrainError(f"{self.checkpoint}: made by another recipe; give another --out or remove it")
        if state.get("data", self.data_digest) != self.data_digest:
            raise PretrainError(f"{self.checkpoint}: made from other data; give another --out or remove it")
        world_size = int(state.get("world_size", self.ranks.world_size))
        if world_size != self.ranks.world_size and not other_world_size:
            raise PretrainError(
                f"{self.checkpoint}: made by {world_size} processes, not {self.ranks.world_size}: each draws its own records, so "
                "the run would not be the same; --other-world-size goes on all the same"
            )
        self.trainee.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.train_seconds = int(state["step"]), float(state["train_seconds"])
        self.watch.load(state.get("watch"))
        self.skipped = dict(state.get("skipped", {}))
        if "generators" in state:
            checkpoints.restore_generators(state["generators"])
        if not self.ranks.agree(self.step):
            raise PretrainError(f"{self.checkpoint}: processes read different steps; --out must be a folder that all nodes share")
        return True

    def save(self) -> None:
        """Writes the checkpoint, on rank 0 alone. The data position is the step: batches depend on (seed, rank, step)."""
        if self.ranks.rank:
            return
        checkpoints.write(
            self.checkpoint,
            {
                "recipe": self.recipe.digest,
                "data": self.data_digest,
                "world_size": self.ranks.world_size,
                "model": self.trainee.state_dict(),
                "average": self.average,
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
                "train_seconds": self.train_seconds,
                "watch": self.watch.state(),
                "skipped": self.skipped,
                "generators": checkpoints.generators(),
            },
        )

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; raises NonFiniteLossError before it when loss or gradient is not finite on any rank."""
        phase, _ = self.recipe.phase_at(self.step)
        rate = learning_rate(self.recipe, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        numbers = self.gradients(batch)
        norm = nn.utils.clip_grad_norm_(self.trainee.parameters(), self.recipe.clip_norm or math.inf)
        self._refuse_non_finite("gradient's norm", norm)
        self.optimiser.step()
        self.step += 1
        self._update_average()
        aligned = round(phase.aligned * batch.records)
        correct = numbers.pop("correct")
        return {name: number.item() for name, number in numbers.items()} | {
            "accuracy": correct.mean().item(),
            "aligned_accuracy": correct[:, :, :aligned].mean().item() if aligned else math.nan,
            "learning_rate": rate,
        }

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Forward and backward of a batch: leaves the gradient of the joined batch of all ranks in the parameters.

        Returns loss, contrastive, cross_entropy (scalars) and correct, float32[4, 2, records].
        """
        recipe = self.recipe
        phase, _ = recipe.phase_at(self.step)
        self._prepare(phase.depth)
        patches, index = self._views(batch)
        self.optimiser.zero_grad(set_to_none=True)
        with self._attention(), torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bf16):
            embedding, logits = self._forward(patches, index, phase.depth)
        # One exchange for all views: rows are records, so that the ranks' records stand behind each other.
        sides = len(VIEWS) * 2
        joined = gathered_rows(embedding.reshape(sides, batch.records, -1).transpose(0, 1))
        real, fake = by_class(joined.transpose(0, 1), len(joined))
        pi = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        contrastive = code_loss(real, fake, recipe.loss, generator=pi, temperature=recipe.temperature)
        labels = torch.tensor([0.0, 1.0], device=self.device).repeat_interleave(batch.records).repeat(len(VIEWS))
        cross_entropy = functional.binary_cross_entropy_with_logits(logits.float(), labels)
        loss = contrastive + recipe.cross_entropy_weight * cross_entropy
        self._refuse_non_finite("loss", loss)
        torch.autograd.backward(loss)
        correct = ((logits > 0) == (labels > 0.5)).float().view(len(VIEWS), 2, batch.records)
        return {"loss": loss, "contrastive": contrastive, "cross_entropy": cross_entropy, "correct": correct}

    def _attention(self) -> AbstractContextManager[None]:
        """On a CPU attention is written out: the backward of torch's fused kernel takes two fifths of a step of a few tokens."""
        few = self.device.type == "cpu" and self.recipe.phase_at(self.step)[0].tokens <= FEW_TOKENS
        return sdpa_kernel(SDPBackend.MATH) if few else nullcontext()

    def _views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.recipe.augment_on == "device":
            from train.device_views import views_of

            images = batch.patches.to(self.device, non_blocking=True)
            return views_of(images, batch.index, self.recipe, batch.step, self.ranks.rank)
        return batch.patches.to(self.device, non_blocking=True), batch.index.to(self.device, non_blocking=True)

    def _prepare(self, depth: int) -> None:
        """Wraps the trainee for a phase's depth; a phase that is as deep as the last keeps the wrapping."""
        if depth == self._prepared_depth:
            return
        self.trainee.train_blocks(depth)
        self._forward = self.trainee
        if self.ranks.world_size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            self._forward = nn.parallel.DistributedDataParallel(self.trainee, device_ids=devices, gradient_as_bucket_view=True)
        if self.recipe.compile:
            self._forward = torch.compile(self._forward)
        self._prepared_depth = depth

    def _refuse_non_finite(self, what: str, value: Tensor) -> None:
        finite = bool(torch.isfinite(value))
        if not self.ranks.any(not finite):
            return
        said = f"the {what} is {value.item()}" if not finite else f"the {what} is not finite on another rank"
        raise NonFiniteLossError(f"step {self.step}: {said}; nothing was stepped. {self._kept()}")

    def _kept(self) -> str:
        """Saves the state before the step, unless its weights are broken already; says what there is to go back to."""
        if all(bool(torch.isfinite(p).all()) for p in self.trainee.parameters()):
            self.save()
            return f"{self.checkpoint} holds the state before this step; a lower learning rate or clip_norm may help"
        if self.checkpoint.exists():
            return f"The weights are not finite either; {self.checkpoint} holds the last state that was saved"
        return "The weights are not finite either, and no checkpoint was saved yet"

    def _update_average(self) -> None:
        # The warm-up of the decay keeps the random start out of a short run's average.
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step)) if self.recipe.ema_decay else 0.0
        named = dict(self.trainee.named_parameters())
        with torch.no_grad():
            torch._foreach_lerp_([self.average[name] for name in named], list(named.values()), 1 - decay)

    def probed(self, probe: Probe | None) -> bool:
        """Probes the averaged encoder on rank 0 and remembers the best; True on every rank when patience is at its end."""
        accuracy = probe.accuracy(self.trainee.encoder, self.encoder_parameters()) if probe is not None else 0.0
        # Every rank keeps the same memory, and rank 0's is the one that counts: its accuracy is the only one.
        done = self.watch.note(accuracy, self.step, self.average) if probe is not None else False
        return self.ranks.any(done)

    @property
    def views(self) -> int:
        """Views seen so far, over all ranks."""
        seen, left = 0, self.step
        for phase in self.recipe.phases:
            seen += min(left, phase.steps) * phase.records * 2 * len(VIEWS) * self.ranks.world_size
            left = max(0, left - phase.steps)
        return seen

    def encoder_parameters(self) -> dict[str, Tensor]:
        """The averaged encoder's tensors under timm's names, where they lie."""
        prefix = "encoder."
        return {name[len(prefix) :]: p for name, p in self.average.items() if name.startswith(prefix)}

    def encoder_weights(self) -> dict[str, Tensor]:
        """The encoder to export, float32 on the CPU: the averaged one, or where probes watched the run the best of them."""
        best = self.watch.best
        chosen = self.encoder_parameters() if best is None else {n[8:]: p for n, p in best.items() if n.startswith("encoder.")}
        return {name: p.float().cpu().contiguous() for name, p in chosen.items()}


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up from 1e-6, then half a cosine to the final rate."""
    if step < recipe.warmup_steps:
        return 1e-6 + (recipe.learning_rate - 1e-6) * step / recipe.warmup_steps
    gone = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.final_learning_rate + (recipe.learning_rate - recipe.final_learning_rate) * (1 + math.cos(math.pi * gone)) / 2


def train(
    run: Run,
    *,
    workers: int = 1,
    checkpoint_every_s: float = 180.0,
    line_every_s: float = 20.0,
    on_progress: Callable[[Progress], None] | None = None,
    on_skipped: Callable[[str, str], None] | None = None,
    on_probe: Callable[[int, float], None] | None = None,
    probe: Probe | None = None,
    stop_after: int | None = None,
) -> int:
    """Trains to the recipe's end, or the probe's patience, or to `stop_after` steps, or until SIGINT or SIGTERM reaches any rank;
    saves at the end in every case. `probe` is given on rank 0 where the recipe wants one.

    Returns the step reached.
    """
    recipe = run.recipe
    end = min(recipe.steps, stop_after if stop_after is not None else recipe.steps)
    began = last_save = time.monotonic()
    trained_before, meter = run.train_seconds, _Meter(run)
    done = run.ranks.any(run.watch.exhausted)
    batches = loader(run.data, recipe, run.step, run.ranks.rank, workers, run.ranks.world_size, pin=run.device.type == "cuda")
    with _stop_signals() as stopped, closing(batches):  # type: ignore[type-var]
        while run.step < end and not done and not run.ranks.any(bool(stopped)):
            asked = time.monotonic()
            batch = next(batches)
            meter.waited_s += time.monotonic() - asked
            _note_skipped(run, batch, on_skipped)
            meter.add(run.train_step(batch), batch)
            run.train_seconds = trained_before + time.monotonic() - began
            if recipe.probe_every and run.step % recipe.probe_every == 0:
                done = run.probed(probe)
                if on_probe is not None and run.watch.last is not None:
                    on_probe(run.step, run.watch.last)
            if on_progress is not None and (meter.age_s >= line_every_s or run.step == end or done):
                on_progress(meter.progress())
            if time.monotonic() - last_save >= checkpoint_every_s:
                run.save()
                last_save = time.monotonic()
    run.save()
    return run.step


class _Meter:
    """Means of the numbers of steps, and views a second, since the last progress."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._clear()

    def _clear(self) -> None:
        self._began, self._views, self.waited_s = time.monotonic(), 0, 0.0
        self._numbers: list[dict[str, float]] = []

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._began

    def add(self, numbers: dict[str, float], batch: Batch) -> None:
        self._numbers.append(numbers)
        self._views += batch.records * 2 * len(VIEWS) * self._run.ranks.world_size

    def progress(self) -> Progress:
        """What has gathered since the last call, which begins anew."""
        span = max(self.age_s, 1e-9)
        means: dict[str, Any] = {n: math.fsum(step[n] for step in self._numbers) / len(self._numbers) for n in self._numbers[0]}
        run, rate, waited = self._run, self._views / span, self.waited_s / span
        self._clear()
        return Progress(run.step, run.recipe.steps, views_per_s=rate, waited_share=waited, **means)


def _note_skipped(run: Run, batch: Batch, on_skipped: Callable[[str, str], None] | None) -> None:
    for name, reason in batch.skipped:
        if name not in run.skipped:
            run.skipped[name] = reason
            if on_skipped is not None:
                on_skipped(name, reason)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that fills when SIGINT or SIGTERM arrives, so that a step is never cut; handlers are put back afterwards."""
    received: list[int] = []
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda got, _frame: received.append(got))
    except ValueError:  # Not the main thread (a test, a notebook): signals stay with their owner.
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
