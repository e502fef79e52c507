"""Groups: what leaves together, whether it really leaves, and whether the forecast is the measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskprop import ModelSpeedup
from maskprop.errors import DummyInputError, GroupError
from maskprop.pruning import Group, Groups, Removal, measure, prunable_groups
from maskprop.pruning.local import local_groups
from maskprop.pruning.removal import remove


def conv_bn(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, **options), nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.block = nn.Sequential(conv_bn(8, 12), nn.ReLU(), conv_bn(12, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.block(x)).relu().mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation; the sigmoid turns zero into a half, which the product hides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn(3, 8)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.head = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return self.head(x * gate[..., None, None])


class Attention(nn.Module):
    def __init__(self, heads: int = 4, dim: int = 6, kv_heads: int | None = None, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.dim, self.kv, self.fused = heads, dim, kv_heads or heads, fused
        self.repeat = self.heads // self.kv
        if fused:
            self.qkv = nn.Linear(16, 3 * heads * dim)
        else:
            self.q = nn.Linear(16, heads * dim)
            self.k, self.v = nn.Linear(16, self.kv * dim), nn.Linear(16, self.kv * dim)
        self.out = nn.Linear(heads * dim, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).view(b, n, self.heads, self.dim).transpose(1, 2)
            k = self.k(x).view(b, n, self.kv, self.dim).transpose(1, 2)
            v = self.v(x).view(b, n, self.kv, self.dim).transpose(1, 2)
            k, v = k.repeat_interleave(self.repeat, 1), v.repeat_interleave(self.repeat, 1)
        scores = (q @ k.transpose(-1, -2)) / self.dim**0.5
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


def sigmoid_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1))


def no_affine() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, affine=False),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.Flatten(),
        nn.Linear(216, 3),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 12), nn.ReLU(), conv_bn(12, 12, groups=3), nn.ReLU(), conv_bn(12, 6), nn.Conv2d(6, 4, 1)
    )


def depthwise() -> nn.Module:
    return nn.Sequential(conv_bn(3, 12), nn.ReLU6(), conv_bn(12, 12, groups=12), nn.ReLU6(), nn.Conv2d(12, 4, 1))


IMAGE, TOKENS = (3, 3, 8, 8), (3, 5, 16)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, IMAGE),
    "gated": (Gated, IMAGE),
    "sigmoid": (sigmoid_net, IMAGE),
    "no affine": (no_affine, IMAGE),
    "grouped": (grouped, IMAGE),
    "depthwise": (depthwise, IMAGE),
    "attention": (Attention, TOKENS),
    "fused qkv": (lambda: Attention(fused=True), TOKENS),
    "grouped queries": (lambda: Attention(kv_heads=2), TOKENS),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = CASES[name]
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model, torch.randn(shape)


def prune_half(groups: Groups, wanted: Callable[[Group], bool]) -> Removal:
    chosen = {}
    for group in groups:
        if wanted(group):
            _, parts = group.bundle(torch.rand(group.parts))
            gone = torch.zeros(group.parts, dtype=torch.bool)
            gone[parts[: group.size // 2].reshape(-1)] = True
            chosen[group.name] = gone
    return remove(groups, chosen)


def masked_copy_output(model: nn.Module, masks: dict[str, dict[str, Tensor]], x: Tensor) -> Tensor:
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, own in masks.items():
        for key, mask in own.items():
            name = f"{path}.{key}".lstrip(".")
            state[name] = state[name] * mask
    return torch.func.functional_call(model, state, (x,)).detach()


KINDS: dict[str, Callable[[Group], bool]] = {
    "default": lambda g: g.default,
    "rest": lambda g: not g.default,
    "all": lambda g: True,
    "head": lambda g: g.granularity == "head",
    "head dim": lambda g: g.granularity == "head dim",
}
TRIED = [(name, kind) for name in CASES for kind in ("default", "rest", "all") if name != "grouped queries"]
TRIED += [("grouped queries", kind) for kind in ("default", "head", "head dim")]


@pytest.mark.parametrize(("name", "kind"), TRIED)
def test_what_is_masked_leaves_as_forecast(name: str, kind: str) -> None:
    model, x = build(name)
    groups = prunable_groups(model, x)
    removal = prune_half(groups, KINDS[kind])
    for group_name, kept in removal.kept.items():
        assert kept == groups[group_name].size - groups[group_name].size // 2, group_name
    fresh = torch.randn(2, *x.shape[1:])
    expected = masked_copy_output(model, removal.masks, fresh)
    ModelSpeedup(model, x, removal.masks, tracer=groups.tracer).speedup_model()
    assert removal.forecast == measure(model, ((x,), {}))
    assert (model(fresh) - expected).norm() <= 1e-5 * expected.norm()


def test_zero_ratio_forecasts_the_dense_model() -> None:
    model, x = build("residual")
    groups = prunable_groups(model, x)
    assert groups.structure is not None
    assert remove(groups, {}).forecast == groups.structure.dense == measure(model, ((x,), {}))


def test_a_units_cost_is_what_leaves_with_it() -> None:
    model, x = build("residual")
    group = prunable_groups(model, x)["stem.0"]
    stem, inner, head = 3 * 9 + 1 + 2, 12 * 9, 4
    block_out = 12 * 9 + 1 + 2
    assert group.cost.parameters == stem + inner + block_out + head
    positions, batch = 8 * 8, 3
    assert group.cost.flops == 2 * batch * (positions * (3 * 9 + 12 * 9 + 12 * 9) + 4)


def test_names_granularities_and_sizes() -> None:
    found = {
        name: [(g.name, g.granularity, g.size, g.default) for g in prunable_groups(*build(name))] for name in CASES
    }
    assert found["residual"] == [("stem.0", "channel", 8, True), ("block.0.0", "channel", 12, True)]
    assert found["attention"] == [
        ("q:head", "head", 4, True),
        ("q:head dim", "head dim", 6, False),
        ("v:head dim", "head dim", 6, False),
    ]
    assert found["fused qkv"] == [("qkv:head", "head", 4, True), ("qkv:head dim", "head dim", 6, False)]
    assert ("q:query group", "query group", 2, True) in found["grouped queries"]
    assert ("q:head", "head", 2, False) in found["grouped queries"]
    assert ("0.0:channel group", "channel group", 3, False) in found["grouped"]
    assert ("0.0", "channel", 4, True) in found["grouped"]
    assert [size for *_, size, _ in found["depthwise"]] == [12]


def test_a_unit_of_slots_takes_one_part_of_each() -> None:
    model, x = build("fused qkv")
    group = prunable_groups(model, x)["qkv:head dim"]
    assert group.slots.shape == (8, 6)  # per head: the dim of q and k, and the dim of v
    scores, parts = group.bundle(torch.arange(48.0))
    assert scores.tolist() == sorted(scores.tolist())
    assert parts.shape == (6, 8)
    for slot in group.slots:
        assert all(int(torch.isin(slot, unit).sum()) == 1 for unit in parts)


def test_members_say_who_makes_and_who_reads() -> None:
    model, x = build("residual")
    group = prunable_groups(model, x)["stem.0"]
    assert group.modules == ("stem.0", "stem.1", "block.2.0", "block.2.1")
    assert group.consumers == ("block.0.0", "head")
    assert str(group).startswith("stem.0: 8 units (channel)\n  makes stem.0.weight, axis 0\n")
    assert group.members[0].indices(3) == [3]


@pytest.mark.parametrize("name", ["grouped", "fused qkv"])
def test_rows_of_members(name: str) -> None:
    """The values of a fused projection have fewer rows a dim than its queries and keys: zeros fill up."""
    model, x = build(name)
    groups = prunable_groups(model, x)
    for group in groups:
        for member in group.members:
            tensor = group.tensor(member)
            numbers = torch.arange(1, tensor.numel() + 1).reshape(tensor.shape)
            rows = group.rows(member, numbers)
            for part in range(group.parts):
                wanted = numbers[(member.units == part).expand(tensor.shape)]
                assert sorted(rows[part][rows[part] > 0].tolist()) == wanted.tolist()


def test_json_holds_members_and_costs() -> None:
    model, x = build("attention")
    data = json.loads(prunable_groups(model, x).to_json())
    head = data["groups"][0]
    assert head["name"] == "q:head"
    assert head["unit_parameters"] == 3 * 6 * 17 + 6 * 16
    assert head["members"][0] == {
        "parameter": "q.weight",
        "axis": 0,
        "role": "producer",
        "indices": [list(range(6 * h, 6 * h + 6)) for h in range(4)],
    }
    assert {m["parameter"] for m in head["members"] if m["role"] == "consumer"} == {"out.weight"}


def test_prints_as_a_table_and_draws(tmp_path: Path) -> None:
    model, x = build("grouped queries")
    groups = prunable_groups(model, x)
    assert all(g.name in str(groups) for g in groups)
    in_notebook = groups._repr_html_()
    assert all(f">{g.name}</td>" in in_notebook for g in groups)
    assert f">{groups[0].cost.flops:,}</td>" in in_notebook
    for suffix in ("svg", "png"):
        groups.draw(tmp_path / f"groups.{suffix}")
        assert (tmp_path / f"groups.{suffix}").stat().st_size > 1000


def test_outputs_and_normalised_axes_are_no_groups() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    assert [g.name for g in prunable_groups(model, torch.randn(2, 6))] == ["2"]


def test_discovery_leaves_the_model_alone() -> None:
    model, x = build("residual")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    remove(prunable_groups(model, x), {})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_errors() -> None:
    model, x = build("residual")
    with pytest.raises(DummyInputError):
        prunable_groups(model, torch.randn(1, 5))
    with pytest.raises(GroupError, match="there is no group 'nowhere'; print the groups to see their names"):
        prunable_groups(model, x)["nowhere"]
    groups = local_groups(model)
    assert [g.name for g in groups][:2] == ["stem.0", "stem.1"]
    with pytest.raises(GroupError, match="was found without a dummy input"):
        _ = groups[0].cost
    with pytest.raises(GroupError, match="no trace to hand on"):
        _ = groups.tracer


def test_leaks_are_masked_at_the_consumer() -> None:
    """A sigmoid makes a half of zero: masks on the consumer's columns let the unit leave a padded layer."""
    model, x = build("sigmoid")
    removal = prune_half(prunable_groups(model, x), lambda g: g.name == "0")
    assert removal.masks["2"]["weight"].shape == (1, 8, 1, 1)
    model, x = build("residual")
    removal = prune_half(prunable_groups(model, x), lambda g: True)
    assert "head" not in removal.masks  # relu keeps zeros: nothing to hide there


def test_a_shared_trace_is_one_of_its_inputs_alone() -> None:
    """A speedup that is handed a trace still checks at another batch size."""
    model, x = build("residual")
    tracer = prunable_groups(model, x).tracer
    assert callable(tracer)
    first = next(n for n in tracer(model, ((x,), {})).fx.nodes if n.op == "placeholder")
    assert tuple(first.meta["tensor"].shape) == tuple(x.shape)
    larger = torch.cat([x, x])
    second = next(n for n in tracer(model, ((larger,), {})).fx.nodes if n.op == "placeholder")
    assert tuple(second.meta["tensor"].shape) == tuple(larger.shape)
