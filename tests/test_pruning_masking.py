"""Masks that stay on while a model trains: plain loops, amp, compile, several processes, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from maskprop import ModelSpeedup
from maskprop.errors import GroupError, MaskingError, MaskShapeError
from maskprop.pruning import (
    ADMMPruner,
    AGPPruner,
    L1NormPruner,
    LevelPruner,
    LinearPruner,
    LotteryTicketPruner,
    MovementPruner,
    Pruner,
    Schedule,
    TaylorPruner,
    applied_masks,
    apply_masks,
    masked_state_dict,
    plain_state_dict,
    prunable_groups,
    remove_masks,
)

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(216, 4),
    )


def train(model: nn.Module, steps: int = 3, after: Any = None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        if after is not None:
            after()


def test_masks_hold_through_optimizer_steps() -> None:
    model = network()
    pruner = L1NormPruner(model, 0.5, dummy_input=X)
    _, masks = pruner.compress()
    before = model[0].weight.detach().clone()
    train(model)
    keep = masks["0"]["weight"].expand_as(before)
    assert bool((model[0].weight[~keep] == 0).all())
    assert not torch.equal(model[0].weight[keep], before[keep])
    model.eval()
    masked = model(X).detach()
    pruner.unwrap_model()
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert torch.equal(model(X), masked)
    ModelSpeedup(model, X, masks, tracer=pruner.groups.tracer).speedup_model()
    assert model[0].weight.shape[0] == 4
    assert (model(X) - masked).norm() <= 1e-5 * masked.norm()


def test_parameters_stay_the_same_objects() -> None:
    model = network()
    before = {id(p) for p in model.parameters()}
    values = copy.deepcopy(model.state_dict())
    L1NormPruner(model, 0.5, dummy_input=X).compress()
    assert {id(p) for p in model.parameters()} == before
    masks = remove_masks(model, bake=False)
    assert {id(p) for p in model.parameters()} == before
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert set(masks) == {"0", "1", "3"}


def test_masks_are_replaced_in_place() -> None:
    model = network()
    row = torch.ones(8, 1, 1, 1)
    row[0] = 0
    apply_masks(model, {"0.weight": row})
    buffer = applied_masks(model)["0.weight"]
    apply_masks(model, {"0.weight": row.flip(0)})
    assert applied_masks(model)["0.weight"] is buffer
    assert model[0].weight[0].abs().sum() > 0
    assert model[0].weight[7].abs().sum() == 0
    apply_masks(model, {"0.bias": torch.ones(8)})  # a mask that is not named any more keeps everything
    assert model[0].weight[7].abs().sum() > 0
    apply_masks(model, {"0.weight": (torch.arange(216) % 2).reshape(8, 3, 3, 3)})  # of another shape
    assert applied_masks(model)["0.weight"].shape == (8, 3, 3, 3)


def test_checkpoints(tmp_path: Path) -> None:
    model = network()
    L1NormPruner(model, 0.5, dummy_input=X).compress()
    train(model)
    torch.save(model.state_dict(), tmp_path / "masked.pt")
    state = torch.load(tmp_path / "masked.pt", weights_only=True)
    again = network()
    apply_masks(again, {k: torch.ones_like(v) for k, v in applied_masks(model).items()})
    again.load_state_dict(state)
    assert torch.equal(again.eval()(X), model.eval()(X))
    plain = network()
    plain.load_state_dict(plain_state_dict(state))
    assert torch.equal(plain.eval()(X), model(X))
    hidden = plain_state_dict(state, bake=False)["0.weight"]
    assert torch.equal(hidden, model[0].parametrizations["weight"].original)
    other = network()
    apply_masks(other, applied_masks(model))
    other.load_state_dict(masked_state_dict(plain.state_dict(), other))
    assert torch.equal(other.eval()(X), model(X))


# What changes masks while a model trains: made on the plain model, and driven by one call a step.
DRIVERS: dict[str, Callable[[nn.Module], Schedule | Pruner]] = {
    "linear": lambda m: LinearPruner(L1NormPruner(m, 0.5, dummy_input=X), total_times=2),
    "agp": lambda m: AGPPruner(L1NormPruner(m, 0.5, dummy_input=X), total_times=2),
    "lottery": lambda m: LotteryTicketPruner(L1NormPruner(m, 0.5, dummy_input=X), total_times=2),
    "admm": lambda m: ADMMPruner(m, 0.5, dummy_input=X, rho=0.1),
    "movement": lambda m: MovementPruner(m, 0.5, dummy_input=X, cooldown_begin_step=2),
    "taylor": lambda m: LinearPruner(TaylorPruner(m, 0.5, dummy_input=X, data=own_data(), loss=loss), total_times=2),
}


def own_data() -> list[tuple[Tensor, Tensor]]:
    """Of several processes each scores by its own images."""
    rows = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3) if dist.is_initialized() else slice(None)
    return [(X[rows], Y[rows])]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", [*DRIVERS, "level"])
def test_resumed_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    """In a new process, from other weights: the same masks and weights as without a break."""
    make = DRIVERS.get(name, lambda m: LinearPruner(LevelPruner(m, 0.5), total_times=2))

    def step(model: nn.Module, driver: Schedule | Pruner, count: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(count):
            optimizer.zero_grad()
            penalty = driver.penalty() if isinstance(driver, ADMMPruner) else 0
            (F.cross_entropy(model(X), Y) + penalty).backward()
            if isinstance(driver, MovementPruner):
                driver.step()
            optimizer.step()
            if not isinstance(driver, MovementPruner):
                driver.step()

    model = network()
    driver = make(model)
    step(model, driver, 1)
    torch.save({"model": model.state_dict(), "driver": driver.state_dict()}, tmp_path / "checkpoint.pt")
    step(model, driver, 2)
    other = network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)
    again = make(other)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(state["model"])
    again.load_state_dict(state["driver"])
    step(other, again, 2)
    for (key, value), now in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, now), key
    masks, now_masks = driver.compress()[1], again.compress()[1]
    assert all(torch.equal(m, now_masks[path][key]) for path, own in masks.items() for key, m in own.items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(torch.relu(self.up(x))))


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(6).reshape(2, 3)
    pruner = L1NormPruner(model, 0.5, dummy_input=tokens)
    pruner.compress()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    for share in (0.25, 0.5):
        apply_masks(model, pruner.update(share * 2))
        model(tokens).square().sum().backward()
        optimizer.step()
        assert torch.equal(model.head.weight, model.embedding.weight)
        assert int((model.head.weight == 0).all(0).sum()) == 8 * share
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert model.head.weight is model.embedding.weight
    ModelSpeedup(model, tokens, masks).speedup_model()
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.shape == (20, 4)


def test_frozen_parameters_are_scored_and_stay_frozen() -> None:
    model = network()
    for parameter in [*model[0].parameters(), *model[1].parameters()]:
        parameter.requires_grad_(False)
    kept = TaylorPruner(model, 0.5, dummy_input=X, data=[(X, Y)], loss=loss).prune()
    twin = TaylorPruner(network(), 0.5, dummy_input=X, data=[(X, Y)], loss=loss).prune()
    assert all(torch.equal(gone, twin.parts[name]) for name, gone in kept.parts.items())
    apply_masks(model, kept.masks)
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 4


def test_a_model_that_changed_is_refused() -> None:
    model = network().eval()
    pruner = L1NormPruner(model, 0.5, dummy_input=X)
    _, masks = pruner.compress()
    with pytest.raises(MaskingError, match=r"'0\.weight' has a mask on"):
        L1NormPruner(model, 0.5, dummy_input=X)
    with pytest.raises(MaskingError, match=r"'0\.weight' has a mask on"):
        prunable_groups(model, X)
    pruner.unwrap_model()
    ModelSpeedup(model, X, masks).speedup_model()
    with pytest.raises(GroupError, match=r"which is \(4, 3, 3, 3\) now: the model was changed. Make a new pruner"):
        pruner.compress()


@pytest.mark.parametrize("first", [0, 1])
def test_copies_are_independent(first: int) -> None:
    """A moving average is a deep copy: each keeps its masks when they are taken off the other."""
    model = network()
    _, masks = L1NormPruner(model, 0.5, dummy_input=X).compress()
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9))
    train(model)
    average.update_parameters(model)
    twins = [model, average.module]
    remove_masks(twins[first])
    other = twins[1 - first]
    assert bool((other[0].weight[~masks["0"]["weight"].flatten()] == 0).all())
    other(X).sum().backward()
    assert applied_masks(copy.deepcopy(other)).keys() == {f"{p}.{k}" for p, own in masks.items() for k in own}
    remove_masks(other)
    for twin in twins:
        assert type(twin[0]) is nn.Conv2d
        copy.deepcopy(twin)(X)


def drive(
    model: nn.Module,
    driver: Schedule | Pruner,
    forward: Callable[[Tensor], Tensor],
    rows: slice = slice(None),
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Three steps of a training loop."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    for _ in range(3):
        optimizer.zero_grad()
        with torch.amp.autocast("cpu", dtype=torch.bfloat16, enabled=scaler.is_enabled()):
            loss = F.cross_entropy(forward(X[rows]), Y[rows])
        if isinstance(driver, ADMMPruner):
            loss = loss + driver.penalty()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if isinstance(driver, MovementPruner):  # reads gradients
            driver.step()
        scaler.step(optimizer)
        scaler.update()
        if not isinstance(driver, MovementPruner):
            driver.step()


def assert_half_leaves(model: nn.Module, driver: Schedule | Pruner) -> None:
    _, masks = driver.compress()
    model.eval()
    masked = model(X).detach()
    driver.unwrap_model()
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    ModelSpeedup(model, X, masks).speedup_model()
    assert (model[0].out_channels, model[3].out_channels) == (4, 3)
    assert (model(X) - masked).norm() <= 1e-5 * masked.norm()


@pytest.mark.parametrize("name", DRIVERS)
def test_under_amp(name: str) -> None:
    model = network()
    driver = DRIVERS[name](model)
    drive(model, driver, model, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert model[0].weight.dtype == torch.float32
    assert_half_leaves(model, driver)


@pytest.mark.parametrize("name", DRIVERS)
def test_under_compile(name: str) -> None:
    """Compiled once, the model follows every change of the masks."""
    model = network()
    driver = DRIVERS[name](model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    twin = network()
    uncompiled = DRIVERS[name](twin)
    drive(model, driver, compiled)
    drive(twin, uncompiled, twin)
    for (key, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=key)
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(MaskingError, match="the model is wrapped in OptimizedModule"):
        apply_masks(compiled, {"0.bias": torch.ones(8)})  # type: ignore[arg-type]
    assert_half_leaves(model, driver)


def _two_processes(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    found: dict[str, Any] = {}
    for name, make in DRIVERS.items():
        model = network()
        driver = make(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        drive(model, driver, wrapped, slice(3 * rank, 3 * rank + 3))
        refused = ""
        try:
            apply_masks(wrapped, driver.masks)
        except MaskingError as error:
            refused = str(error)
        found[name] = {"state": model.state_dict(), "refused": refused, "masks": driver.compress()[1]}
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_under_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes that see different data keep the same weights and choose the same masks."""
    port = 20000 + hash(str(tmp_path)) % 20000
    mp.spawn(_two_processes, (port, str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in DRIVERS:
        first, second = (found[name] for found in both)
        assert "is wrapped in DistributedDataParallel" in first["refused"]
        trained = [k for k in first["state"] if "running" not in k]
        assert all(torch.equal(first["state"][k], second["state"][k]) for k in trained), name
        masks = {(path, key): mask for path, own in first["masks"].items() for key, mask in own.items()}
        assert int(masks["0", "weight"].sum()) == 4
        assert all(torch.equal(mask, second["masks"][path][key]) for (path, key), mask in masks.items()), name


def test_errors_change_nothing() -> None:
    model = network()
    prune.l1_unstructured(model[3], "weight", 0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MaskShapeError):
        apply_masks(model, {"0.weight": torch.ones(8), "0.bias": torch.ones(3)})
    parametrize.register_parametrization(model[6], "weight", nn.Identity())
    with pytest.raises(Exception, match="which no parameter holds: a parametrization or a hook computes it"):
        apply_masks(model, {"6.weight": torch.ones(4, 216)})
    assert not applied_masks(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items() if k in model.state_dict())


def test_the_batch_norm_of_a_pruned_unit_stays_zero_in_training() -> None:
    model = network().train()
    _, masks = L1NormPruner(model, 0.5, dummy_input=X).compress()
    out: Tensor = model[1](model[0](X))
    gone = ~masks["1"]["weight"]
    assert bool((out[:, gone] == 0).all())
