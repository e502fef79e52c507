"""Selection: which groups a configuration reaches, how many units go, and what a wrong one says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskprop.errors import MaskpropError, OptionError, RatioError, SelectorError
from maskprop.pruning import L1NormPruner, Pruner, prunable_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10)
        self.layer1 = nn.Sequential(nn.Conv2d(10, 20, 3), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(20, 20, 3), nn.ReLU())
        self.fc1, self.fc2 = nn.Linear(20 * 4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.bn1(self.conv1(x)).relu()))
        return self.fc2(self.fc1(x.flatten(1)).relu())


X = torch.zeros(1, 3, 8, 8)


def kept(config: Any, pruner: type[Pruner] = L1NormPruner, **options: Any) -> dict[str, int]:
    """Units kept, of the groups that lose any."""
    made = pruner(Net().eval(), config, dummy_input=X, **options)
    removal = made.prune()
    return {name: n for name, n in removal.kept.items() if n < made.groups[name].size}


ALL_HALVED = {"conv1": 5, "layer1.0": 10, "layer2.0": 10, "fc1": 8}


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (0.5, {}, ALL_HALVED),
        (0.0, {}, {}),
        (0.25, {"ignore": ["layer*"]}, {"conv1": 8, "fc1": 12}),
        (0.5, {"ignore": "fc1"}, {"conv1": 5, "layer1.0": 10, "layer2.0": 10}),
        ({"layer*.0": 0.3}, {}, {"layer1.0": 14, "layer2.0": 14}),
        ({"*": 0.5, "fc1": 0.25}, {}, ALL_HALVED | {"fc1": 12}),
        ([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], {}, {"conv1": 5, "layer1.0": 10, "layer2.0": 10}),
        (
            [{"op_types": ["Conv2d"], "sparsity": 0.5, "exclude_op_names": ["conv1"]}],
            {},
            {"layer1.0": 10, "layer2.0": 10},
        ),
        ([{"op_names": ["fc1"], "sparsity_per_layer": 0.75}], {}, {"fc1": 4}),
        ([{"op_names_re": [r"layer\d\.0"], "sparse_ratio": 0.2}], {}, {"layer1.0": 16, "layer2.0": 16}),
        ([{"op_partial_names": ["layer"], "sparse_ratio": 0.2}], {}, {"layer1.0": 16, "layer2.0": 16}),
        (
            [
                {"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5},
                {"exclude": True, "op_names": ["fc1", "fc2"]},
            ],
            {},
            {"conv1": 5, "layer1.0": 10, "layer2.0": 10},
        ),
        ([{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}], {}, {"conv1": 5}),
        ([{"op_types": ["default"], "sparse_ratio": 0.5}], {}, ALL_HALVED),
        (0.5, {"channel_multiple": 8}, {"conv1": 8, "layer1.0": 16, "layer2.0": 16, "fc1": 8}),
        (0.9, {"min_units": 4}, {"conv1": 4, "layer1.0": 4, "layer2.0": 4, "fc1": 4}),
    ],
)
def test_selection(config: Any, options: dict[str, Any], expected: dict[str, int]) -> None:
    assert kept(config, **options) == expected


def index_score(offset: dict[str, float]) -> Any:
    return lambda group: torch.arange(group.parts, dtype=torch.float64) + offset.get(group.name, 0.0)


def test_global_ranking_takes_the_lowest_of_all() -> None:
    found = kept(0.25, ranking="global", score=index_score({"conv1": 100, "fc1": 100, "layer1.0": 5}))
    assert found == {"layer1.0": 14, "layer2.0": 10}
    assert 20 - found["layer1.0"] + 20 - found["layer2.0"] == int(66 * 0.25)


def test_global_ranking_empties_no_group() -> None:
    score = index_score({"conv1": 1000, "fc1": 1000, "layer1.0": 1000})
    assert kept(0.5, ranking="global", score=score)["layer2.0"] == 1


def test_bounds_within_a_pool() -> None:
    entry = {"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, "global_group_id": 0}
    score = index_score({"conv1": 1000, "fc1": 1000})
    found = kept([entry | {"max_sparse_ratio": 0.6, "min_sparse_ratio": 0.2}], score=score)
    assert found == {"conv1": 8 - 3, "layer1.0": 8, "layer2.0": 8, "fc1": 12}


def test_isomorphic_groups_compete() -> None:
    convs: list[nn.Module] = [nn.Conv2d(10, 10, 1) for _ in range(3)]
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(10, 6), nn.Linear(6, 2))
    score = index_score({"1": 100, "2": 1000})
    pruner = L1NormPruner(model, 0.5, dummy_input=torch.zeros(1, 10, 1, 1), ranking="isomorphic", score=score)
    # "0" and "1" are read by a convolution and compete; "2" and "4" are alone of their kind
    assert pruner.prune().kept == {"0": 1, "1": 9, "2": 5, "4": 3}


def test_total_sparsity_is_a_pool() -> None:
    found = kept([{"op_types": ["Conv2d"], "total_sparsity": 0.5}], score=index_score({"conv1": 100}))
    assert "conv1" not in found
    assert found["layer1.0"] + found["layer2.0"] == 40 - 25


def test_tied_groups_lose_the_same_units() -> None:
    model = Net().eval()
    entry = {"op_names": ["layer1.0", "layer2.0"], "sparse_ratio": 0.5, "dependency_group_id": 1}
    parts = L1NormPruner(model, [entry], dummy_input=X).prune().parts
    assert torch.equal(parts["layer1.0"], parts["layer2.0"])


def test_threshold() -> None:
    entry = {"op_names": ["fc1"], "sparse_threshold": 5.5}
    assert kept([entry], score=index_score({})) == {"fc1": 10}
    with pytest.raises(RatioError, match="sparse_threshold 99 would prune all 16 units of group 'fc1'"):
        kept([entry | {"sparse_threshold": 99}], score=index_score({}))


def test_modules_are_names_too_and_cover_what_is_inside() -> None:
    """As Torch-Pruning's ``ignored_layers`` and ``pruning_ratio_dict``."""
    model = Net()

    def by(config: Any, **options: Any) -> dict[str, int]:
        return L1NormPruner(model, config, dummy_input=X, **options).prune().kept

    assert (
        by(0.5, ignore=[model.layer1, model.fc1])
        == by(0.5, ignore=["layer1", "fc1"])
        == by(0.5, ignore=["layer1.*", "fc1"])
    )
    assert "layer1.0" in by(0.5)
    assert "layer1.0" not in by(0.5, ignore=model.layer1)
    assert by({model.layer1: 0.5}) == by({"layer1": 0.5}) == {"layer1.0": by(0.5)["layer1.0"]}


def test_outputs_are_never_pruned() -> None:
    made = L1NormPruner(Net(), 0.5, dummy_input=X)
    _, masks = made.compress()
    assert "fc2" not in masks


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        (1.0, {}, RatioError, "ratio: the share to prune is 1.0; it must be at least 0 and below 1"),
        (-0.1, {}, RatioError, "the share to prune is -0.1"),
        (float("nan"), {}, RatioError, "the share to prune is nan"),
        ({"conv*": 2}, {}, RatioError, r"conv\*: the share to prune is 2"),
        ({"cov1": 0.5}, {}, SelectorError, "'cov1' matches no module and no group. Did you mean 'conv1'"),
        (
            [{"op_types": ["Conv2D"], "sparse_ratio": 0.5}],
            {},
            SelectorError,
            "names the type 'Conv2D', of which",
        ),
        (
            [{"op_names": ["conv9"], "sparse_ratio": 0.5}],
            {},
            SelectorError,
            r"names 'conv9' \(op_names\), which no module",
        ),
        (
            [{"op_names": ["conv1"], "sparse_ration": 0.5}],
            {},
            SelectorError,
            "unknown key 'sparse_ration'. Did you mean 'sparse_ratio'",
        ),
        (
            [{"op_names": ["conv1"]}],
            {},
            RatioError,
            "entry 0 of the configuration says nothing about how much",
        ),
        ([{"op_names": ["conv1"], "sparse_ratio": 1}], {}, RatioError, "entry 0: the share to prune is 1"),
        (["conv1"], {}, SelectorError, "entry 0 of the configuration is a str; expected a dict"),
        (0.5, {"ignore": ["nothing*"]}, SelectorError, r"'nothing\*' matches no module"),
        (
            0.5,
            {"ranking": "best"},
            SelectorError,
            "ranking is 'best'; expected 'local', 'global' or 'isomorphic'",
        ),
        (0.5, {"granularity": "row"}, SelectorError, "granularity 'row' is unknown"),
        (0.5, {"channel_multiple": 0}, OptionError, "channel_multiple is 0; give a whole number of at least 1"),
        (0.5, {"channel_multiple": 2.5}, OptionError, "channel_multiple is 2.5; give a whole number"),
        (None, {}, SelectorError, "the configuration is a NoneType; expected a ratio"),
        ("0.5", {}, SelectorError, "the configuration is a str; expected a ratio"),
        ({"op_types": ["Conv2d"], "sparse_ratio": 0.5}, {}, SelectorError, "'op_types' is a key of NNI's entries"),
        ([{"op_types": "Conv2d", "sparse_ratio": 0.5}], {}, SelectorError, r"op_types is the text 'Conv2d'; write"),
        ([{"op_names_re": ["conv("], "sparse_ratio": 0.5}], {}, SelectorError, r"'conv\(' .* is no regular expression"),
        (
            [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.2, "min_sparse_ratio": 0.3}],
            {},
            RatioError,
            r"max_sparse_ratio is 0.2; it must be at most 1, and at least min_sparse_ratio \(0.3\)",
        ),
        (0.5, {"ignore": [nn.ReLU()]}, SelectorError, "a ReLU is named that is no part of the model"),
    ],
)
def test_errors(config: Any, options: dict[str, Any], error: type[MaskpropError], message: str) -> None:
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        L1NormPruner(model, config, dummy_input=X, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_groups_of_another_model() -> None:
    groups = prunable_groups(Net(), X)
    with pytest.raises(OptionError, match="the groups are another model's"):
        L1NormPruner(Net(), 0.5, groups=groups)
