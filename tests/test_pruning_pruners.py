"""Pruners and schedules: each by what is particular to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskprop import ModelSpeedup
from maskprop import pruning as mp
from maskprop.errors import OptionError, RatioError, ScoreError
from maskprop.pruning import measure
from maskprop.pruning.movement import Gate

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4
DATA = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(216, 4),
    )
    nn.init.normal_(model[1].weight, 1, 0.3)
    nn.init.normal_(model[4].weight, 1, 0.3)
    return model.eval()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


PRUNERS: list[type[mp.Pruner]] = [
    mp.L1NormPruner,
    mp.L2NormPruner,
    mp.FPGMPruner,
    mp.RandomPruner,
    mp.LAMPPruner,
    mp.TaylorPruner,
    mp.FisherPruner,
    mp.OBDPruner,
    mp.WandaPruner,
    mp.ActivationAPoZRankPruner,
    mp.ActivationMeanRankPruner,
    mp.SlimPruner,
    mp.ADMMPruner,
]


@pytest.mark.parametrize("pruner_type", PRUNERS)
def test_compress_then_speed_up(pruner_type: type[mp.Pruner]) -> None:
    model = network()
    pruner = pruner_type(model, 0.5, dummy_input=X, data=DATA, loss=loss)
    wrapped, masks = pruner.compress()
    assert wrapped is model
    masked = model(X).detach()
    pruner.unwrap_model()
    ModelSpeedup(model, X, masks, tracer=pruner.groups.tracer).speedup_model()
    assert pruner.removal is not None
    assert pruner.removal.forecast == measure(model, ((X,), {}))
    assert sum(pruner.removal.kept.values()) == 7
    assert (model(X) - masked).norm() <= 1e-5 * masked.norm()


def test_groups_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pruners, a schedule and the speedup share one discovery and one trace."""
    from maskprop import speedup as engine
    from maskprop.pruning import pruner as base

    def again(*args: Any, **options: Any) -> Any:
        raise AssertionError("traced or discovered again")

    model = network()
    groups = mp.prunable_groups(model, X)
    monkeypatch.setattr(base, "prunable_groups", again)
    kept = [p(model, 0.5, groups=groups).prune().kept for p in (mp.L1NormPruner, mp.L2NormPruner, mp.FPGMPruner)]
    assert kept == [{"0": 4, "3": 3}] * 3
    pruner = mp.L1NormPruner(model, 0.5, groups=groups)
    mp.AGPPruner(pruner, total_times=2).compress()
    pruner.unwrap_model()
    handed: list[Any] = []
    real = engine.trace
    monkeypatch.setattr(engine, "trace", lambda *args: handed.append(real(*args)) or handed[-1])
    ModelSpeedup(model, X, pruner.masks, tracer=groups.tracer).speedup_model()
    assert model[0].out_channels == 4
    assert all(graph is groups.graph for graph in handed)
    assert handed


def test_a_pruner_of_ones_own() -> None:
    class LastPruner(mp.Pruner):
        """Prunes the last units."""

        def score(self, group: mp.Group) -> Tensor:
            return -torch.arange(group.parts)

    _, masks = LastPruner(network(), 0.25, dummy_input=X).compress()
    assert masks["0"]["weight"].reshape(-1).tolist() == [True] * 6 + [False] * 2


def test_local_groups_without_dummy_input() -> None:
    """As in NNI: every module's own rows; the masks of coupled modules need not agree."""
    model = network()
    _, masks = mp.L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]).compress()
    assert set(masks) == {"0", "3"}
    assert {k: int(m.sum()) for k, m in masks["0"].items()} == {"weight": 4, "bias": 4}


def test_slim_competes_and_has_a_penalty() -> None:
    model = network()
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(1.0, 9.0))
        model[4].weight.copy_(torch.arange(1.0, 7.0) / 100)
    pruner = mp.SlimPruner(model, 0.25, dummy_input=X, regular_scale=0.1)
    torch.testing.assert_close(pruner.penalty(), torch.tensor(0.1 * (36 + 0.21)))
    assert pruner.prune().parts["3"].tolist() == [True] * 3 + [False] * 3
    pruner.penalty().backward()
    assert model[1].weight.grad is not None


def test_level_prunes_single_weights() -> None:
    model = network()
    pruner = mp.LevelPruner(model, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.75}])
    weight = model[3].weight.detach().abs().clone()
    _, masks = pruner.compress()
    keep = masks["3"]["weight"]
    assert int((~keep).sum()) == int(0.75 * weight.numel())
    assert weight[keep].min() >= weight[~keep].max()
    assert set(masks["3"]) == {"weight"}


def test_level_over_all_weights() -> None:
    model = network()
    _, masks = mp.LevelPruner(model, 0.5, ranking="global").compress()
    kept = sum(int(m["weight"].sum()) for m in masks.values())
    total = sum(m["weight"].numel() for m in masks.values())
    assert kept == total - total // 2


def test_movement_needs_gradients_and_uses_them() -> None:
    model = network()
    pruner = mp.MovementPruner(model, 0.5, dummy_input=X)
    with pytest.raises(ScoreError, match=r"MovementPruner has seen no gradient. Call pruner.step"):
        pruner.compress()
    for batch in DATA:
        model.zero_grad()
        loss(model, batch).backward()
        pruner.step()
    weight = model[3].weight.detach().double()  # which reads the units of "0"
    gradient = sum(torch.autograd.grad(loss(model, b), model[3].weight)[0].double() for b in DATA)
    expected = -(weight * gradient).sum((0, 2, 3))
    torch.testing.assert_close(pruner.score(pruner.groups["0"]), expected, rtol=1e-4, atol=1e-7)


def fine_tune(model: nn.Module, pruner: mp.MovementPruner, target: Callable[[Tensor], Tensor], steps: int) -> None:
    """Regression: the output is to follow a function of the four hidden units, which are the inputs."""
    optimizer = torch.optim.SGD(model[1].parameters(), 0.05)
    for step in range(steps):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.mse_loss(model(x), target(x)).backward()
        pruner.step()
        optimizer.step()


def passing() -> nn.Sequential:
    """Units 0 and 1 are small and 2 and 3 large where they are read."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([[0.2, 0.2, 1.0, 1.0]]))
    return model


def test_movement_keeps_what_grows() -> None:
    """Where fine-tuning wants the small units, movement keeps them, and magnitude does not."""
    model = passing()
    pruner = mp.MovementPruner(model, 0.5, dummy_input=torch.zeros(1, 4), warmup_step=2, cooldown_begin_step=10)
    fine_tune(model, pruner, lambda x: x[:, :1] + x[:, 1:2], 30)
    assert pruner.share == 1.0
    gate = mp.applied_masks(model)["1.weight"]
    assert gate.tolist() == [[True, True, False, False]]
    hidden = model[1].parametrizations["weight"].original.detach()[0, 2:]
    assert bool((model[1].weight[0, 2:] == 0).all())
    assert bool((hidden.abs() > 0.1).all())  # as it was when it was hidden
    assert pruner.prune().parts["0"].tolist() == [False, False, True, True]
    assert mp.L1NormPruner(passing(), 0.5, dummy_input=torch.zeros(1, 4), score=by_reader).prune().parts[
        "0"
    ].tolist() == [True, True, False, False]
    _, masks = pruner.compress()
    assert not any(isinstance(m, Gate) for m in model.modules())
    assert set(masks) == {"0"}


def by_reader(group: mp.Group) -> Tensor:
    return torch.stack([group.rows(m).abs().sum(1) for m in group.members if m.consumes]).sum(0)


def test_movement_brings_back() -> None:
    """What is hidden goes on learning how much it is missed."""
    model = passing()
    pruner = mp.MovementPruner(model, 0.5, dummy_input=torch.zeros(1, 4), cooldown_begin_step=1)
    fine_tune(model, pruner, lambda x: x[:, :1] + x[:, 1:2], 4)
    assert mp.applied_masks(model)["1.weight"].tolist() == [[True, True, False, False]]
    fine_tune(model, pruner, lambda x: 3 * x[:, 2:3] + 3 * x[:, 3:], 40)
    assert mp.applied_masks(model)["1.weight"].tolist() == [[False, False, True, True]]


def test_movement_has_its_own_schedule() -> None:
    with pytest.raises(OptionError, match="warmup_step is 5 and cooldown_begin_step 5; the first is at least 0"):
        mp.MovementPruner(network(), 0.5, dummy_input=X, warmup_step=5, cooldown_begin_step=5)
    with pytest.raises(OptionError, match=r"is a schedule of its own\. Leave it out"):
        mp.AGPPruner(mp.MovementPruner(network(), 0.5, dummy_input=X, cooldown_begin_step=5))
    model = network()
    pruner = mp.MovementPruner(model, 0.5, dummy_input=X)
    schedule = mp.LinearPruner(pruner, total_times=2)
    for batch in DATA:
        model.zero_grad()
        loss(model, batch).backward()
        pruner.step()
        schedule.step()
    assert units_kept(schedule) == 7


def test_admm_draws_weights_to_their_projection() -> None:
    model = network()
    pruner = mp.ADMMPruner(model, 0.5, dummy_input=X, rho=1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner.step()
    gone = pruner.prune().parts["0"]
    before = model[0].weight.detach()[gone].norm()
    for step in range(60):
        optimizer.zero_grad()
        pruner.penalty().backward()
        optimizer.step()
        if step % 10 == 9:
            pruner.step()
    assert model[0].weight.detach()[gone].norm() < 0.5 * before
    assert torch.equal(pruner.prune().parts["0"], gone)


# -- schedules ----------------------------------------------------------------------------------


def units_kept(schedule: mp.Schedule) -> int:
    assert schedule.pruner.removal is not None
    return sum(schedule.pruner.removal.kept.values())


def test_linear_schedule() -> None:
    model = network()
    pruner = mp.L1NormPruner(model, {"0": 0.5}, dummy_input=X)
    schedule = mp.LinearPruner(pruner, interval_steps=2, total_times=4, warmup_steps=1)
    seen = []
    for _ in range(11):
        changed = schedule.step()
        seen.append(int(model[0].weight.flatten(1).any(1).sum()) if changed else None)
    assert seen == [None, None, 7, None, 6, None, 5, None, 4, None, None]
    assert schedule.done


def test_agp_schedule() -> None:
    schedule = mp.AGPPruner(mp.L1NormPruner(network(), 0.5, dummy_input=X), total_times=2)
    assert [schedule.share(p) for p in (0.0, 0.5, 1.0)] == [0.0, 0.875, 1.0]


def test_what_is_pruned_stays_pruned() -> None:
    model = network()
    pruner = mp.RandomPruner(model, {"0": 0.75}, dummy_input=X)
    schedule = mp.LinearPruner(pruner, total_times=3)
    gone = torch.zeros(8, dtype=torch.bool)
    for _ in range(3):
        schedule.step()
        assert pruner.removal is not None
        now = pruner.removal.parts["0"]
        assert bool((now | ~gone).all())
        gone = now
    assert int(gone.sum()) == 6


def test_lottery_ticket_rewinds() -> None:
    model = network()
    first = copy.deepcopy(model.state_dict())
    pruner = mp.L1NormPruner(model, {"0": 0.75}, dummy_input=X)
    schedule = mp.LotteryTicketPruner(pruner, interval_steps=3, total_times=2)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    kept = []
    for _ in range(6):
        optimizer.zero_grad()
        loss(model, DATA[0]).backward()
        optimizer.step()
        if schedule.step():
            kept.append(units_kept(schedule))
            schedule_state = {k: v for k, v in model.state_dict().items() if not k.endswith(".mask")}
            plain = mp.plain_state_dict(schedule_state, bake=False)
            assert all(torch.equal(plain[k], first[k]) for k in first)
    assert kept == [4, 2]


def test_a_schedule_goes_on_where_it_stopped() -> None:
    model = network()
    schedule = mp.LinearPruner(mp.RandomPruner(model, 0.5, dummy_input=X), total_times=4)
    schedule.step()
    schedule.step()
    state = schedule.state_dict()
    again = mp.LinearPruner(mp.RandomPruner(network(), 0.5, dummy_input=X), total_times=4)
    again.load_state_dict(state)
    assert mp.applied_masks(again.model)["0.weight"].equal(mp.applied_masks(model)["0.weight"])
    assert [again.step() for _ in range(3)] == [True, True, False]


def test_schedule_of_single_weights() -> None:
    model = network()
    schedule = mp.LinearPruner(mp.LevelPruner(model, {"7": 0.8}), total_times=2)
    counts = []
    for _ in range(2):
        schedule.step()
        counts.append(int((model[7].weight == 0).sum()))
    assert counts == [int(0.4 * 864), int(0.8 * 864)]


def test_errors() -> None:
    """Each says what is wrong, and leaves the model without masks and as it was."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match="total_times is 0; give at least 1"):
        mp.LinearPruner(mp.L1NormPruner(model, 0.5, dummy_input=X), total_times=0)
    with pytest.raises(OptionError, match="Pruner has no score"):
        mp.Pruner(model, 0.5, dummy_input=X).compress()
    with pytest.raises(ScoreError, match="Taylor is computed from data and has seen none"):
        mp.TaylorPruner(model, 0.5, dummy_input=X).compress()
    with pytest.raises(ScoreError, match=r"returned \(2,\) for group '0'; expected a tensor of shape \(8,\)"):
        mp.Pruner(model, 0.5, dummy_input=X, score=lambda group: torch.zeros(2)).compress()
    infinite = mp.Pruner(model, 0.5, dummy_input=X, score=lambda group: torch.full((group.parts,), torch.inf))
    with pytest.raises(ScoreError, match=r"of group '0' is inf at part 0 \(8 of 8 are not finite\)"):
        infinite.compress()
    with pytest.raises(RatioError, match=r"sparse_threshold 1e\+09 would prune all 8 units of group '0'"):
        mp.L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_threshold": 1e9}], dummy_input=X).compress()
    with pytest.raises(RatioError, match="LevelPruner prunes by 'sparse_ratio'"):
        mp.LevelPruner(model, [{"op_types": ["Linear"], "sparse_threshold": 0.1}]).compress()
    assert not mp.applied_masks(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
