"""Every pruner on handwritten digits: accuracy masked, compact, and after one epoch of fine-tuning.

    python -m benchmarks.pruners [--seeds 3] [--write]

A small residual CNN and a small vision transformer are trained once a seed on scikit-learn's digits;
each pruner then takes the same share of every group, so that all compact models of a kind cost the same.
``--write`` puts the tables into docs/pruners.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskprop import ModelSpeedup
from maskprop import pruning as mp
from maskprop.demo.digits import DigitNet, Digits, load_digits
from maskprop.pruning.scores import Random

from .insert import put

ROOT = Path(__file__).parent.parent
RATIOS = {"cnn": 0.2, "vit": 0.25}
ONE_BY_ONE = ("Taylor", "Fisher")  # the gradients of a batch cancel in a trained model, those of an image do not
STRUCTURED: dict[str, type[mp.Pruner]] = {
    "random": mp.RandomPruner,
    "L1": mp.L1NormPruner,
    "L2": mp.L2NormPruner,
    "FPGM": mp.FPGMPruner,
    "LAMP": mp.LAMPPruner,
    "batch norm scale (Slim)": mp.SlimPruner,
    "ADMM": mp.ADMMPruner,
    "Taylor": mp.TaylorPruner,
    "Fisher": mp.FisherPruner,
    "Hessian diagonal (OBD)": mp.OBDPruner,
    "Wanda": mp.WandaPruner,
    "APoZ": mp.ActivationAPoZRankPruner,
    "mean activation": mp.ActivationMeanRankPruner,
    "movement": mp.MovementPruner,
}
SEES_DATA = {"Taylor", "Fisher", "Hessian diagonal (OBD)", "Wanda", "APoZ", "mean activation", "movement"}


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads, self.dim = heads, width // heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).view(*y.shape[:2], self.heads, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.relu(self.fc1(self.norm2(x))))


class DigitViT(nn.Module):
    """A vision transformer for 8x8 images in patches of 2x2."""

    def __init__(self, width: int = 48, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def small_cnn() -> nn.Module:
    return DigitNet((32, 48, 64))


def train(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    seed: int,
    rate: float = 5e-3,
    penalty: Callable[[], Tensor] | None = None,
    before_step: Callable[[], object] | None = None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    steps = epochs * -(-len(digits.images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(digits.images), generator=generator).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(digits.images[index]), digits.labels[index])
            (loss if penalty is None else loss + penalty()).backward()
            if before_step is not None:
                before_step()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, digits: Digits) -> float:
    with torch.no_grad():
        return float((model(digits.test_images).argmax(1) == digits.test_labels).float().mean())


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def prune(name: str, ratio: float, model: nn.Module, digits: Digits, seed: int) -> tuple[dict[str, float], mp.Cost]:
    dummy = digits.images[:2]
    index = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(seed)).split(64)[:8]
    if name in ONE_BY_ONE:
        index = [i for batch in index[:4] for i in batch.split(1)]
    data = [(digits.images[i], digits.labels[i]) for i in index]
    options: dict[str, Any] = {"dummy_input": dummy, "data": data, "loss": loss_of}
    if name == "random":
        options["score"] = Random(seed)
    if name == "batch norm scale (Slim)":
        options["ranking"] = "local"
    if name == "movement":  # hides more and more units over the middle of the epoch that it trains
        steps = -(-len(digits.images) // 64)
        options |= {"warmup_step": steps // 10, "cooldown_begin_step": 7 * steps // 10}
    pruner = STRUCTURED[name](model, ratio, **options)
    if isinstance(pruner, mp.MovementPruner):  # these two train a little first: one epoch
        train(model, digits, 1, seed, 1e-3, before_step=pruner.step)
    if isinstance(pruner, mp.ADMMPruner):
        pruner.rho = 1e-2
        train(model, digits, 1, seed, 1e-3, penalty=pruner.penalty)
        pruner.step()
    _, masks = pruner.compress()
    found = {"masked": accuracy(model, digits)}
    pruner.unwrap_model()
    ModelSpeedup(model, dummy, masks, tracer=pruner.groups.tracer).speedup_model()
    found["compact"] = accuracy(model, digits)
    cost = mp.measure(model, ((dummy,), {}))
    assert pruner.removal is not None
    assert cost == pruner.removal.forecast
    train(model, digits, 1, seed, 1e-3)
    found["tuned"] = accuracy(model, digits)
    return found, cost


def table(make: Callable[[], nn.Module], ratio: float, seeds: int, epochs: int) -> list[str]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in STRUCTURED}
    dense, costs = [], {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        digits = load_digits(torch.Generator().manual_seed(seed))
        model = make()
        train(model, digits, epochs, seed)
        dense.append(accuracy(model, digits))
        before = mp.measure(model, ((digits.images[:2],), {}))
        has_norms = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        for name in STRUCTURED:
            if has_norms or name != "batch norm scale (Slim)":
                found, costs[name] = prune(name, ratio, copy.deepcopy(model), digits, seed)
                results[name].append(found)
                print(seed, name, found, costs[name], file=sys.stderr, flush=True)
    assert len(set(costs.values())) == 1, "the pruners are compared at the same cost"
    after = next(iter(costs.values()))
    lines = [
        f"Ratio {ratio} of every group. Dense: {statistics.mean(dense):.1%} accurate, "
        f"{before.parameters:,} parameters, {before.flops // 2:,} FLOPs an image. "
        f"Compact, all pruners: {after.parameters:,} parameters, {after.flops // 2:,} FLOPs.",
        "",
        "| pruner | sees data | masked | compact | after one epoch |",
        "|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        if runs:
            mean = {k: statistics.mean(r[k] for r in runs) for k in runs[0]}
            sees = "yes" if name in SEES_DATA else ""
            lines.append(f"| {name} | {sees} | {mean['masked']:.1%} | {mean['compact']:.1%} | {mean['tuned']:.1%} |")
    worse = [n for n in SEES_DATA if results[n] and _mean(results[n]) <= _mean(results["random"])]
    verdict = f"No better than random without tuning: {', '.join(sorted(worse))}." if worse else ""
    return [*lines, "", verdict or "Every score that sees data beats random."]


def _mean(runs: list[dict[str, float]]) -> float:
    return statistics.mean(r["compact"] for r in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--only", choices=("cnn", "vit"))
    parser.add_argument("--write", action="store_true", help="put the tables into docs/pruners.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kinds = {"cnn": ("A small residual CNN", small_cnn), "vit": ("A small vision transformer", DigitViT)}
    page = ROOT / "docs" / "pruners.md"
    for kind in [arguments.only] if arguments.only else kinds:
        title, make = kinds[kind]
        text = "\n".join([f"### {title}", "", *table(make, RATIOS[kind], arguments.seeds, arguments.epochs), ""])
        print(text)
        if arguments.write:
            put(page, kind, text)


if __name__ == "__main__":
    main()
