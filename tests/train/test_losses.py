"""CoDE's loss against a slow implementation from the formula; gradients; two processes against one."""

from __future__ import annotations

import math
import multiprocessing
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from train.losses import ViewEmbeddings, class_loss, code_loss, gathered, info_nce  # noqa: E402


def _views(seed: int, n: int = 5, d: int = 8) -> ViewEmbeddings:
    g = torch.Generator().manual_seed(seed)
    return ViewEmbeddings(*(torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_() for _ in range(4)))


def _unit(v: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v]


def _slow_info_nce(query, positive, negatives, tau: float) -> float:  # type: ignore[no-untyped-def]
    """-log( exp(q.k+/tau) / (exp(q.k+/tau) + sum exp(q.k-/tau)) ), row by row in plain Python."""
    total = 0.0
    for q, k in zip(query.tolist(), positive.tolist(), strict=True):
        q, k = _unit(q), _unit(k)
        top = math.exp(sum(a * b for a, b in zip(q, k, strict=True)) / tau)
        rest = sum(math.exp(sum(a * b for a, b in zip(q, _unit(m), strict=True)) / tau) for m in negatives.tolist())
        total -= math.log(top / (top + rest))
    return total / len(query)


def _slow_class(own: ViewEmbeddings, other: ViewEmbeddings, order: list[int], tau: float) -> float:
    first = _slow_info_nce(own.plain, own.augmented[order], other.augmented, tau)
    return 0.5 * (first + _slow_info_nce(own.local, own.whole, other.whole, tau))


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_info_nce_against_the_formula(tau: float) -> None:
    a, b = _views(1), _views(2, n=7)
    assert info_nce(a.plain, a.local, b.plain, tau).item() == pytest.approx(
        _slow_info_nce(a.plain, a.local, b.plain, tau), abs=1e-5
    )


def test_class_loss_permutes_positives_and_takes_negatives_of_the_other_class_only() -> None:
    own, other, order = _views(3), _views(4), [2, 0, 1, 4, 3]
    got = class_loss(own, other, torch.tensor(order)).item()
    assert got == pytest.approx(_slow_class(own, other, order, 0.1), abs=1e-5)


def _orders(seed: int, n: int) -> tuple[list[int], list[int]]:
    g = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=g).tolist(), torch.randperm(n, generator=g).tolist()


def test_paper_is_the_sum_and_as_released_is_twice_the_real_loss() -> None:
    real, fake = _views(5), _views(6)
    o_real, o_fake = _orders(9, 5)
    l_real, l_fake = _slow_class(real, fake, o_real, 0.1), _slow_class(fake, real, o_fake, 0.1)
    paper = code_loss(real, fake, "paper", generator=torch.Generator().manual_seed(9)).item()
    released = code_loss(real, fake, "as_released", generator=torch.Generator().manual_seed(9)).item()
    assert paper == pytest.approx(l_real + l_fake, abs=1e-5)
    assert released == pytest.approx(2 * l_real, abs=1e-5)


def test_l_fake_has_a_gradient_that_as_released_lacks() -> None:
    """Fake plain views are queries of L_fake alone: without it nothing reaches them."""
    gradients = {}
    for variant in ("paper", "as_released"):
        real, fake = _views(5), _views(6)
        code_loss(real, fake, variant, generator=torch.Generator().manual_seed(9)).backward()
        gradients[variant] = fake.plain.grad
    assert gradients["paper"].abs().max() > 1e-3
    assert gradients["as_released"] is None or gradients["as_released"].abs().max() == 0


def _joined(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=g, dtype=torch.float64), torch.randn(6, 4, generator=g, dtype=torch.float64)


def _embed(x: torch.Tensor, weight: torch.Tensor) -> tuple[ViewEmbeddings, ViewEmbeddings]:
    """Four views of reals and fakes as fixed functions of inputs [n, 6] through one weight [6, 4]."""
    parts = [ViewEmbeddings(*(torch.tanh((x + c + k) @ weight) for k in (0.0, 0.3, -0.2, 0.7))) for c in (0.0, 1.1)]
    return parts[0], parts[1]


def _rank(rank: int, rendezvous: str, results: str) -> None:
    import torch.distributed as distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    x, weight = _joined(11)
    weight.requires_grad_()
    real, fake = _embed(x[rank * 4 : rank * 4 + 4], weight)
    loss = code_loss(gathered(real), gathered(fake), generator=torch.Generator().manual_seed(3))
    loss.backward()
    distributed.all_reduce(weight.grad)
    torch.save((loss.detach(), weight.grad / 2), f"{results}.{rank}")
    distributed.barrier()  # nobody leaves while the other still talks to it
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group: at a regular exit their destructors then abort the process


def test_two_processes_equal_one_with_the_joined_batch(tmp_path: Path) -> None:
    x, weight = _joined(11)
    weight.requires_grad_()
    expected = code_loss(*_embed(x, weight), generator=torch.Generator().manual_seed(3))
    expected.backward()
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=_rank, args=(r, str(tmp_path / "meet"), str(tmp_path / "out"))) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
    assert [process.exitcode for process in ranks] == [0, 0]
    for r in range(2):
        loss, gradient = torch.load(f"{tmp_path / 'out'}.{r}", weights_only=True)
        torch.testing.assert_close(loss, expected.detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(gradient, weight.grad, atol=1e-6, rtol=0)
