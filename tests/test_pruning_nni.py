"""Scripts written for NNI, version 3 and version 2: what their documentation does, on a small network."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskprop import ModelSpeedup
from maskprop import pruning as mp
from maskprop.errors import MaskpropError, OptionError, ScoreError, SelectorError
from maskprop.pruning import nni2
from tests.test_pruning_pruners import DATA, X, loss, network

CONVOLUTIONS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class Residual(nn.Module):
    """Two coupled convolutions: alone, they would not agree on what goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(x + self.bn2(self.conv2(x))).mean((2, 3)))


def training_func(
    model: nn.Module,
    optimizers: Any,
    training_step: Any,
    lr_schedulers: Any = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
) -> None:
    """The form that NNI's documentation has."""
    steps = 0
    for _ in range(max_epochs or 100):
        model.train()
        for batch in DATA:
            optimizers.zero_grad()
            result = training_step(batch, model)
            (result[0] if isinstance(result, tuple) else result).backward()
            optimizers.step()
            steps += 1
            if max_steps and steps >= max_steps:
                return


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", ["TaylorPruner", "ActivationAPoZRankPruner", "ActivationMeanRankPruner"])
def test_nni_evaluator(name: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = mp.trace(torch.optim.Adam)(model.parameters(), lr=1e-3)
    evaluator = mp.TorchEvaluator(training_func, optimizer, training_step, dummy_input=X)
    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = getattr(mp, name)(model, config_list, evaluator, training_steps=2)
    _, masks = pruner.compress()
    assert "step" not in optimizer.__dict__
    model = pruner.unwrap_model(bake=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    native = getattr(mp, name)(network(), config_list, dummy_input=X, data=DATA, loss=loss)
    native_masks = native.compress()[1]
    assert all(torch.equal(m, native_masks[p][k]) for p, own in masks.items() for k, m in own.items())


def test_nni_pruners_that_train_first() -> None:
    for make in (
        lambda m, e, c: mp.SlimPruner(m, [{"op_types": ["BatchNorm2d"], "total_sparsity": 0.5}], e, training_steps=4),
        lambda m, e, c: mp.MovementPruner(m, c, e, warmup_step=1, cooldown_begin_step=5, training_steps=6),
        lambda m, e, c: mp.ADMMPruner(m, c, e, iterations=2, training_epochs=1),
    ):
        model = network()
        before = model[0].weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        evaluator = mp.TorchEvaluator(training_func, optimizer, training_step, dummy_input=X)
        pruner = make(model, evaluator, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
        _, masks = pruner.compress()
        pruner.unwrap_model(bake=False)
        assert not torch.equal(model[0].weight, before)
        assert sum(pruner.removal.kept.values()) == 7
        ModelSpeedup(model, X, masks).speedup_model()


@pytest.mark.parametrize(("name", "after_one"), [("LinearPruner", 7), ("AGPPruner", 6), ("LotteryTicketPruner", 7)])
def test_nni_schedules(name: str, after_one: int) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    evaluator = mp.TorchEvaluator(training_func, optimizer, training_step, dummy_input=X)
    sub_pruner = mp.TaylorPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator, training_steps=1)
    before = model[0].weight.detach().clone()
    scheduled = getattr(mp, name)(sub_pruner, interval_steps=2, total_times=3)
    kept = []
    update = sub_pruner.update
    sub_pruner.update = lambda share: kept.append(int(update(share)["0"]["weight"].sum())) or sub_pruner.masks
    _, masks = scheduled.compress(max_steps=2 * 3, max_epochs=None)
    assert (scheduled.steps, scheduled.times) == (6, 3)
    assert (kept[0], kept[-1]) == (after_one, 4)
    assert int(masks["0"]["weight"].sum()) == 4
    rewound = torch.equal(scheduled.unwrap_model(bake=False)[0].weight, before)
    assert rewound == (name == "LotteryTicketPruner")


def test_nni_training_time_in_epochs() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    evaluator = mp.TorchEvaluator(training_func, optimizer, training_step, dummy_input=X)
    pruner = mp.MovementPruner(model, 0.5, evaluator, warmup_step=1, cooldown_begin_step=5)
    _, masks = pruner.compress(max_steps=None, max_epochs=3)
    assert pruner._steps == 3 * len(DATA)
    assert masks


@pytest.mark.parametrize("name", ["L1NormPruner", "L2NormPruner", "FPGMPruner", "LevelPruner"])
def test_nni_quickstart(name: str) -> None:
    config_list = [
        {"op_types": ["Linear", "Conv2d"], "exclude_op_names": ["7"], "sparse_ratio": 0.5},
    ]
    model = network()
    pruner = getattr(mp, name)(model, config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    ModelSpeedup(model, torch.rand(3, 3, 8, 8), masks).speedup_model()
    assert (model[0].weight.shape[0] < 8) == (name != "LevelPruner")  # which masks single weights
    assert sum(int((~m.bool()).sum()) for m in masks["3"].values()) > 0


def evaluating_func(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float(sum((model(x).argmax(1) == y).sum() for x, y in DATA)) / 8


def train_and_evaluate(
    model: nn.Module, optimizer: Any, step: Any, scheduler: Any, max_steps: Any, max_epochs: Any
) -> None:
    """Evaluates within training, as NNI's examples do."""
    assert max_steps is not None or max_epochs is not None
    max_steps = max_steps or max_epochs * len(DATA)
    steps = 0
    while True:
        model.train()
        for batch in DATA:
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()
            steps += 1
            if steps >= max_steps:
                evaluating_func(model)
                return
        evaluating_func(model)


@pytest.mark.parametrize(
    "name", ["L1NormPruner", "FPGMPruner", "TaylorPruner", "SlimPruner", "AGPPruner", "LinearPruner"]
)
def test_nni_3_examples_know_what_is_coupled(name: str) -> None:
    """config_list -> auto_set_denpendency_group_ids -> pruner -> speedup, without a dummy input for the pruner."""
    torch.manual_seed(0)
    model = Residual()
    config_list = mp.auto_set_denpendency_group_ids(model, CONVOLUTIONS, X)
    optimizer = mp.trace(torch.optim.Adam)([p for p in model.parameters() if p.requires_grad], lr=0.001)
    evaluator = mp.TorchEvaluator(train_and_evaluate, optimizer, training_step)
    pruner: Any
    if name in ("AGPPruner", "LinearPruner"):
        sub_pruner = mp.TaylorPruner(model, config_list, evaluator, training_steps=2)
        pruner = getattr(mp, name)(sub_pruner, interval_steps=2, total_times=3)
        _, masks = pruner.compress(max_steps=2 * 3, max_epochs=None)
    else:
        pruner = getattr(mp, name)(model, copy.deepcopy(config_list), evaluator, training_steps=3)
        _, masks = pruner.compress()
    assert masks is pruner.get_masks()
    pruner.unwrap_model()
    model = ModelSpeedup(model, X, masks).speedup_model()
    assert (model.conv1.out_channels, model.conv2.out_channels, model.bn2.num_features) == (4, 4, 4)
    train_and_evaluate(model, mp.trace(torch.optim.Adam)(model.parameters()), training_step, None, None, 1)


def test_what_is_seen_while_evaluating_does_not_count() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train(model: nn.Module, optimizer: Any, step: Any, *rest: Any) -> None:
        for x, y in DATA:
            model(x * 100)
            model.train()
            step((x, y), model).backward()
            optimizer.step()

    evaluator = mp.TorchEvaluator(train, optimizer, training_step, dummy_input=X)
    scores = [
        mp.ActivationMeanRankPruner(network(), 0.5, dummy_input=X, data=DATA),
        mp.ActivationMeanRankPruner(model, 0.5, evaluator),
    ]
    for pruner in scores:
        pruner.calibrate()
    assert torch.equal(scores[0].score(scores[0].groups["0"]), scores[1].score(scores[1].groups["0"]))


def test_a_pruner_that_finds_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, masks = mp.L1NormPruner(network(), {"7": 0.5}, dummy_input=X).compress()
    assert not masks
    assert "L1NormPruner prunes nothing" in caplog.text
    with pytest.raises(SelectorError, match=r"and none of the 2 groups that .* Give dummy_input"):
        mp.SlimPruner(network(), CONVOLUTIONS)


# -- version 2 ----------------------------------------------------------------------------------


def trainer(model: nn.Module, optimizer: Any, criterion: Any) -> None:
    """NNI 2.8: one epoch."""
    model.train()
    for data, target in DATA:
        optimizer.zero_grad()
        criterion(model(data), target).backward()
        optimizer.step()


def training_func_2(
    model: nn.Module,
    optimizers: Any,
    criterion: Any,
    lr_schedulers: Any = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """NNI 2.9."""
    steps = 0
    for _ in range(max_epochs or 3):
        for data, target in DATA:
            optimizers.zero_grad()
            criterion(model(data), target).backward()
            optimizers.step()
            steps += 1
            if max_steps and steps == max_steps:
                return
        lr_schedulers.step()


LEGACY = [{"op_types": ["Conv2d"], "total_sparsity": 0.5}]
VERSION_2: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "TaylorFOWeightPruner": (LEGACY, {"training_batches": 2}, {"training_steps": 2}),
    "ActivationAPoZRankPruner": (LEGACY, {"training_batches": 2}, {"training_steps": 2, "activation": "relu6"}),
    "ActivationMeanRankPruner": (LEGACY, {"training_batches": 2}, {"training_steps": 2}),
    "SlimPruner": (
        [{"op_types": ["BatchNorm2d"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.9}],
        {"training_epochs": 1, "scale": 0.0001, "mode": "global"},
        {"training_epochs": 1},
    ),
    "ADMMPruner": (
        [{"op_types": ["Conv2d"], "sparsity": 0.5}],
        {"iterations": 2, "training_epochs": 1, "granularity": "coarse-grained"},
        {"iterations": 2, "training_epochs": 1},
    ),
    "MovementPruner": (
        [{"op_types": ["Conv2d"], "sparsity": 0.5}],
        {"training_epochs": 3, "warm_up_step": 1, "cool_down_beginning_step": 5},
        {"warm_up_step": 1, "cool_down_beginning_step": 5, "training_epochs": 3},
    ),
}


@pytest.mark.parametrize("form", ["trainer", "evaluator"])
@pytest.mark.parametrize("name", VERSION_2)
def test_nni_2_examples(name: str, form: str) -> None:
    config_list, by_trainer, by_evaluator = VERSION_2[name]
    model = network()
    before = model[0].weight.detach().clone()
    traced_optimizer = nni2.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    kind = getattr(nni2, name)
    criterion = nn.CrossEntropyLoss()
    if form == "trainer":
        pruner = kind(model, config_list, trainer, traced_optimizer, criterion, **by_trainer)
    else:
        scheduler = nni2.trace(torch.optim.lr_scheduler.StepLR)(traced_optimizer, step_size=1, gamma=0.5)
        evaluator = nni2.TorchEvaluator(
            training_func=training_func_2,
            optimizers=traced_optimizer,
            criterion=criterion,
            lr_schedulers=scheduler,
            dummy_input=X,
            evaluating_func=evaluating_func,
        )
        pruner = kind(model, config_list=config_list, evaluator=evaluator, **by_evaluator)
    _, masks = pruner.compress()
    assert max(pruner.show_pruned_weights().values()) >= 0.5
    pruner._unwrap_model()
    trains = name in ("SlimPruner", "ADMMPruner", "MovementPruner")
    kept = masks["1" if name == "SlimPruner" else "0"]["weight"].flatten()
    changed = not torch.equal(model[0].weight[kept], before[kept])
    assert changed == trains
    assert sum(pruner.removal.kept.values()) == 7
    ModelSpeedup(model, dummy_input=X, masks_file=masks).speedup_model()
    flops, params, results = nni2.count_flops_params(model, X)
    assert params == sum(p.numel() for p in model.parameters()) == sum(r["params"] for r in results)
    assert 2 * flops == mp.measure(model, ((X,), {})).flops


def finetuner(model: nn.Module) -> None:
    trainer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), nn.CrossEntropyLoss())


@pytest.mark.parametrize("name", ["LinearPruner", "AGPPruner", "LotteryTicketPruner"])
def test_nni_2_iterative_examples(name: str) -> None:
    model = network()
    first = model[0].weight.detach().clone()
    seen: list[int] = []

    def tune(model: nn.Module) -> None:
        if name == "LotteryTicketPruner" and len(seen) < 3:
            assert torch.equal(mp.plain_state_dict(model.state_dict(), bake=False)["0.weight"], first)
        seen.append(int(model[0].weight.flatten(1).any(1).sum()))
        finetuner(model)

    config_list = [{"op_types": ["Conv2d"], "sparsity": 0.5}]
    options = {"reset_weight": True} if name == "LotteryTicketPruner" else {}
    pruner = getattr(nni2, name)(
        model, config_list, pruning_algorithm="l1", total_iteration=3, evaluator=None, finetuner=tune,
        speedup=True, dummy_input=X, **options,
    )  # fmt: skip
    with pytest.raises(OptionError, match="there is no result yet"):
        pruner.get_best_result()
    pruner.compress()
    iteration, model, masks, score, _ = pruner.get_best_result()
    assert (iteration, masks, score) == (3, {}, None)
    assert seen == {"LinearPruner": [7, 6, 4, 4], "AGPPruner": [6, 5, 4, 4], "LotteryTicketPruner": [7, 6, 4, 4]}[name]
    assert model[0].out_channels == 4
    assert not mp.applied_masks(model)


def test_nni_2_takes_the_best_iteration() -> None:
    scores = iter([0.1, 0.9, 0.3])
    optimizer = torch.optim.SGD((model := network()).parameters(), lr=0.01)
    evaluator = nni2.TorchEvaluator(
        trainer_with_length, optimizer, nn.CrossEntropyLoss(), None, X, lambda m: next(scores)
    )
    params = {"evaluator": evaluator, "training_steps": 1}
    pruner = nni2.LinearPruner(model, CONVOLUTIONS, "taylorfo", 3, evaluator=evaluator, pruning_params=params)
    pruner.compress()
    iteration, best, masks, score, _ = pruner.get_best_result()
    assert (iteration, score) == (2, 0.9)
    assert int(masks["0"]["weight"].sum()) == int(best[0].weight.flatten(1).any(1).sum()) == 6


def trainer_with_length(
    model: nn.Module,
    optimizer: Any,
    criterion: Any,
    scheduler: Any = None,
    max_steps: Any = None,
    max_epochs: Any = None,
) -> None:
    trainer(model, optimizer, criterion)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: nni2.TaylorFOWeightPruner(m, LEGACY, trainer, None), r"takes \(model, config_list, evaluator"),
        (lambda m: nni2.L1NormPruner(m, LEGACY, mode="dependency_aware"), "'dependency_aware' needs a dummy_input"),
        (lambda m: nni2.L1NormPruner(m, LEGACY, mode="global"), "mode is 'global'; expected 'normal'"),
        (lambda m: nni2.AGPPruner(m, LEGACY, "l3"), "pruning_algorithm is 'l3'"),
        (lambda m: nni2.AGPPruner(m, LEGACY, speedup=True), "speedup=True needs a dummy_input"),
        (
            lambda m: nni2.ActivationAPoZRankPruner(m, LEGACY, trainer, None, None, 2, "gelu"),
            "activation is 'gelu'; NNI 2 knows 'relu', 'relu6'",
        ),
    ],
)  # fmt: skip
def test_nni_2_errors(make: Any, message: str) -> None:
    with pytest.raises(MaskpropError, match=message):
        make(network())


def test_a_training_function_without_batches() -> None:
    evaluator = mp.TorchEvaluator(lambda *args: None, torch.optim.SGD((model := network()).parameters()), training_step)
    with pytest.raises(ScoreError, match="never called what computes the loss"):
        mp.TaylorPruner(model, CONVOLUTIONS, evaluator, 2).compress()
    assert not mp.applied_masks(model)
