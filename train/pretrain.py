"""Trains the encoder: CoDE's contrastive loss, optionally with cross entropy, resumable at any step.

One process, or several under torchrun (DistributedDataParallel; each rank draws its own records and the loss sees all of them).
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as functional
from torch import Tensor, nn

from engine.model import VisionTransformer
from train.initial import whitened_filters
from train.losses import ViewEmbeddings, code_loss, gathered
from train.recipe import Recipe
from train.store import PixelStore
from train.views import VIEWS, Batch, loader

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CHECKPOINT_FORMAT = "code-pretrain/1"


class PretrainError(Exception):
    """Training cannot start or go on; one line that says why."""


class NonFiniteLossError(PretrainError):
    """The loss was not a finite number; nothing was stepped and the last checkpoint stands."""


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


class Trainee(nn.Module):
    """The encoder and a linear classifier that exists only while training."""

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.dim, 1)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, patches: Tensor, index: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor]:
        """uint8[n, k, 3, 16, 16], int64[n, k] -> embeddings float32[n, d], logits float32[n] (larger: fake)."""
        mean = torch.tensor(MEAN, device=patches.device).view(3, 1, 1)
        std = torch.tensor(STD, device=patches.device).view(3, 1, 1)
        embedding = self.encoder.forward_patches((patches.float() / 255 - mean) / std, index, depth).float()
        return embedding, self.classifier(embedding)[:, 0]


class Run:
    """A pretraining run in a folder: state, step, checkpoint."""

    def __init__(
        self, recipe: Recipe, store: Path, folder: Path, device: str = "cpu", encoder: VisionTransformer | None = None
    ) -> None:
        self.recipe, self.store, self.folder, self.device = recipe, store, folder, torch.device(device)
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        torch.manual_seed(recipe.seed)
        self.trainee = Trainee(encoder or VisionTransformer()).to(self.device)
        if recipe.whitened_filters:
            filters = whitened_filters(PixelStore(store), recipe.whitened_filters, recipe.seed, MEAN, STD)
            with torch.no_grad():
                self.trainee.encoder.patch_embed.proj.weight[: len(filters)] = torch.from_numpy(filters)
        _start_as_identities(self.trainee.encoder, recipe.phases[0].depth)
        self.average = {name: p.detach().clone() for name, p in self.trainee.named_parameters()}
        self.optimiser = torch.optim.AdamW(
            _groups(self.trainee, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, recipe.beta2)
        )
        self.step = 0
        self.train_seconds = 0.0
        self._forward: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = self.trainee
        if self.world_size > 1:
            self._forward = nn.parallel.DistributedDataParallel(self.trainee)
        if recipe.compile:
            self._forward = torch.compile(self._forward)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "last.pt"

    def resume(self) -> bool:
        """Loads the folder's checkpoint if there is one; raises PretrainError if it belongs to another recipe."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state.get("format") != CHECKPOINT_FORMAT or state["recipe"] != self.recipe.digest:
            raise PretrainError(f"{self.checkpoint}: made by another recipe; give another --out or remove it")
        self.trainee.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.train_seconds = int(state["step"]), float(state["train_seconds"])
        return True

    def save(self) -> None:
        """Writes the checkpoint whole or not at all. The data position is the step: batches depend on (seed, rank, step)."""
        if self.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "format": CHECKPOINT_FORMAT,
                "recipe": self.recipe.digest,
                "model": self.trainee.state_dict(),
                "average": self.average,
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
                "train_seconds": self.train_seconds,
            },
            partial,
        )
        partial.replace(self.checkpoint)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; raises NonFiniteLossError before stepping when the loss or its gradient is not finite."""
        recipe = self.recipe
        rate = learning_rate(recipe, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        phase, _ = recipe.phase_at(self.step)
        patches, index = batch.patches.to(self.device), batch.index.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bf16):
            embedding, logits = self._forward(patches, index, phase.depth)
        real, fake = (gathered(views) for views in by_class(embedding, batch.records))
        pi = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        contrastive = code_loss(real, fake, recipe.loss, generator=pi, temperature=recipe.temperature)
        labels = torch.tensor([0.0, 1.0], device=self.device).repeat_interleave(batch.records).repeat(len(VIEWS))
        cross_entropy = functional.binary_cross_entropy_with_logits(logits.float(), labels)
        loss = contrastive + recipe.cross_entropy_weight * cross_entropy
        if not bool(torch.isfinite(loss)):
            raise NonFiniteLossError(f"step {self.step}: the loss is {loss.item()}; last checkpoint: {self.checkpoint}")
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        limit = recipe.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.trainee.parameters(), limit)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteLossError(
                f"step {self.step}: the gradient's norm is {norm.item()}; last checkpoint: {self.checkpoint}"
            )
        self.optimiser.step()
        self.step += 1
        self._update_average()
        correct = ((logits > 0) == (labels > 0.5)).float().view(len(VIEWS), 2, batch.records)
        aligned = round(phase.aligned * batch.records)
        return {
            "loss": loss.item(),
            "contrastive": contrastive.item(),
            "cross_entropy": cross_entropy.item(),
            "accuracy": correct.mean().item(),
            "aligned_accuracy": correct[:, :, :aligned].mean().item() if aligned else math.nan,
            "learning_rate": rate,
        }

    def _update_average(self) -> None:
        # The warm-up of the decay keeps the random start out of a short run's average.
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step)) if self.recipe.ema_decay else 0.0
        with torch.no_grad():
            for name, parameter in self.trainee.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)

    @property
    def views(self) -> int:
        """Views seen so far, over all ranks."""
        seen, left = 0, self.step
        for phase in self.recipe.phases:
            seen += min(left, phase.steps) * phase.records * 2 * len(VIEWS) * self.world_size
            left = max(0, left - phase.steps)
        return seen

    def encoder_weights(self) -> dict[str, Tensor]:
        """The averaged encoder under timm's names, float32 on the CPU."""
        prefix = "encoder."
        return {name[len(prefix) :]: p.float().cpu().contiguous() for name, p in self.average.items() if name.startswith(prefix)}


def _start_as_identities(encoder: VisionTransformer, depth: int) -> None:
    """Zeroes what blocks beyond `depth` add to their input: they change nothing until a later phase trains them."""
    with torch.no_grad():
        for block in list(encoder.blocks)[depth:]:
            for name, parameter in block.named_parameters():
                if name.startswith(("attn.proj.", "mlp.fc2.")):
                    parameter.zero_()


def by_class(embedding: Tensor, records: int) -> tuple[ViewEmbeddings, ViewEmbeddings]:
    """float[4 * 2 * records, d] in a batch's order -> the views of the reals and of the fakes."""
    views = embedding.reshape(len(VIEWS), 2, records, -1)
    real, fake = (ViewEmbeddings(*(views[v, side] for v in range(len(VIEWS)))) for side in (0, 1))
    return real, fake


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up from 1e-6, then half a cosine to the final rate."""
    if step < recipe.warmup_steps:
        return 1e-6 + (recipe.learning_rate - 1e-6) * step / recipe.warmup_steps
    gone = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.final_learning_rate + (recipe.learning_rate - recipe.final_learning_rate) * (1 + math.cos(math.pi * gone)) / 2


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed = [p for p in module.parameters() if p.ndim >= 2 and p.shape[0] > 1]
    rest = [p for p in module.parameters() if p.ndim < 2 or p.shape[0] <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def train(
    run: Run,
    *,
    workers: int = 1,
    checkpoint_every_s: float = 180.0,
    line_every_s: float = 20.0,
    on_progress: Callable[[Progress], None] | None = None,
    stop_after: int | None = None,
) -> int:
    """Trains to the recipe's end, or to `stop_after` steps, or until SIGINT or SIGTERM; saves at the end in every case.

    Returns the step reached.
    """
    end = min(run.recipe.steps, stop_after if stop_after is not None else run.recipe.steps)
    began = last_line = last_save = time.monotonic()
    trained_before, views, waited = run.train_seconds, 0, 0.0
    since: list[dict[str, float]] = []
    with _stop_signals() as stopped:
        batches = iter(loader(run.store, run.recipe, run.step, run.rank, workers))
        while run.step < end and not stopped:
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            since.append(run.train_step(batch))
            views += len(batch.patches)
            now = time.monotonic()
            run.train_seconds = trained_before + now - began
            if on_progress is not None and (now - last_line >= line_every_s or run.step == end):
                span = max(now - last_line, 1e-9)
                means = {name: math.fsum(numbers[name] for numbers in since) / len(since) for name in since[0]}
                on_progress(Progress(run.step, run.recipe.steps, views_per_s=views / span, waited_share=waited / span, **means))
                last_line, views, waited, since = now, 0, 0.0, []
            if now - last_save >= checkpoint_every_s:
                run.save()
                last_save = now
    run.save()
    return run.step


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


@contextmanager
def process_group() -> Iterator[int]:
    """Joins torchrun's processes (gloo without CUDA, else nccl) and gives this one's rank; 0 in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()
