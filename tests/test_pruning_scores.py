"""Scores: held against their formulas, written out plainly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskprop.errors import OptionError, ScoreError
from maskprop.pruning import Pruner, prunable_groups, scores
from maskprop.pruning.scores import Score, checked
from maskprop.pruning.statistics import collect


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 16, 3),
    ).eval()


X = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
DATA = [(torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(3)) for i in range(3)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def of_first(score: Score, model: nn.Sequential) -> Tensor:
    groups = prunable_groups(model, X)
    if score.needs:
        score.statistics = collect(model, groups, score.needs, DATA, loss)
    return score(groups["0"])


def test_norms() -> None:
    model = network()
    rows = model[0].weight.detach().double().flatten(1)
    torch.testing.assert_close(of_first(scores.L1(), model), rows.abs().sum(1))
    torch.testing.assert_close(of_first(scores.L2(), model), rows.square().sum(1).sqrt())


def test_geometric_median() -> None:
    model = network()
    rows = model[0].weight.detach().double().flatten(1)
    expected = torch.stack([sum((a - b).norm() for b in rows) for a in rows])
    torch.testing.assert_close(of_first(scores.FPGM(), model), expected, rtol=1e-6, atol=1e-6)


def test_lamp() -> None:
    model = network()
    squares = model[0].weight.detach().double().flatten(1).square().sum(1)
    expected = torch.stack([s / squares[squares >= s].sum() for s in squares])
    torch.testing.assert_close(of_first(scores.LAMP(), model), expected)


def test_batch_norm_scale() -> None:
    model = network()
    nn.init.normal_(model[1].weight)
    torch.testing.assert_close(of_first(scores.BatchNormScale(), model), model[1].weight.detach().abs().double())


def gradients(model: nn.Sequential, *parameters: nn.Parameter) -> list[list[Tensor]]:
    return [[g.double() for g in torch.autograd.grad(loss(model, batch), parameters)] for batch in DATA]


def test_taylor_is_what_silence_changes_to_first_order() -> None:
    """With a batch norm: by its affine. Without: by the rows and their bias."""
    model, score = network(), scores.Taylor()
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    groups = prunable_groups(model, X)
    score.statistics = collect(model, groups, score.needs, DATA, loss)
    for name, (weight, bias) in {"0": model[1].parameters(), "3": model[3].parameters()}.items():
        w, b = (
            weight.detach().double().flatten(1) if weight.ndim > 1 else weight.detach().double()[:, None],
            bias.detach(),
        )
        changes = [(w * g.reshape(w.shape)).sum(1) + b * h for g, h in gradients(model, weight, bias)]
        expected = torch.stack(changes).square().mean(0)
        torch.testing.assert_close(score(groups[name]), expected, rtol=1e-5, atol=1e-9)


def test_fisher() -> None:
    model = network()
    w = model[0].weight.detach().double()
    squares = torch.stack([g.square() for (g,) in gradients(model, model[0].weight)]).mean(0)
    found = of_first(scores.Fisher(), model)
    torch.testing.assert_close(found, (w.square() * squares).flatten(1).sum(1), rtol=1e-5, atol=1e-9)


def test_hessian_diagonal_of_a_quadratic() -> None:
    """Where the Hessian is diagonal, one vector of signs gives it exactly."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    curvature = torch.rand(4, 3)
    score = scores.OBD()
    groups = prunable_groups(model, torch.randn(2, 3))
    score.statistics = collect(
        model, groups, score.needs, [None], lambda m, _: (curvature * m[0].weight.square()).sum()
    )
    expected = (model[0].weight.detach().double().square() * curvature).sum(1)
    torch.testing.assert_close(score(groups["0"]), expected, rtol=1e-5, atol=1e-8)


def test_hessian_through_fused_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model, x = Attention(), torch.randn(2, 5, 8)
    groups, score = prunable_groups(model, x), scores.OBD()
    score.statistics = collect(model, groups, score.needs, [x], lambda m, b: m(b).square().mean())
    assert bool(score(groups["q:head"]).isfinite().all())


def test_activations() -> None:
    model = network()
    out = torch.cat([model[1](model[0](x)).relu() for x, _ in DATA]).detach().double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(of_first(scores.ActivationMean(), model), out.mean(1), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(of_first(scores.ActivationAPoZ(), model), (out != 0).double().mean(1))


@pytest.mark.parametrize("convolution", [nn.Conv2d(2, 6, 3), nn.Conv2d(2, 6, 3, groups=2)])
def test_wanda(convolution: nn.Conv2d) -> None:
    model = network()
    model[0] = convolution
    norms = torch.cat([x for x, _ in DATA]).double().movedim(1, 0).flatten(1).square().mean(1).sqrt()
    w = convolution.weight.detach().double().abs()
    columns = norms.reshape(1, 2) if convolution.groups == 1 else norms.repeat_interleave(3).reshape(6, 1)
    expected = (w * columns[..., None, None]).flatten(1).sum(1)
    score, groups = scores.Wanda(), prunable_groups(model, X)
    score.statistics = collect(model, groups, score.needs, DATA)
    found = torch.cat([score(g) for g in groups if g.modules[0] == "0" and g.granularity == "channel"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_wanda_of_an_embedding_looks_at_what_else_makes_the_unit() -> None:
    """Token ids are no features: the table of a residual stream has no say, the layer that adds to it has."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return self.head(self.table(ids) + self.inner(x))

    model, ids, x = Net(), torch.arange(5)[None], torch.randn(1, 5, 3)
    groups, score = prunable_groups(model, (ids, x)), scores.Wanda()
    score.statistics = collect(model, groups, score.needs, [None], lambda m, _: m(ids, x).sum())
    norms = x[0].double().square().mean(0).sqrt()
    expected = (model.inner.weight.detach().double().abs() * norms).sum(1)
    torch.testing.assert_close(score(groups["table"]), expected, rtol=1e-5, atol=1e-8)


def test_random_is_its_own() -> None:
    model, before = network(), torch.random.get_rng_state()
    group = prunable_groups(model, X)["0"]
    assert torch.equal(scores.Random(3)(group), scores.Random(3)(group))
    assert not torch.equal(scores.Random(3)(group), scores.Random(4)(group))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("mean", (3.0, 5.0)),
        ("sum", (6.0, 10.0)),
        ("max", (4.0, 9.0)),
        ("min", (2.0, 1.0)),
        ("first", (2.0, 9.0)),
        ("prod", (8**0.5, 3.0)),
    ],
)
def test_reductions_over_coupled_producers(reduce: str, expected: tuple[float, float]) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(1, 2), nn.Linear(1, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c((self.a(x) + self.b(x)).relu())

    model = Sum()
    with torch.no_grad():
        model.a.weight.copy_(torch.tensor([[2.0], [9.0]]))
        model.b.weight.copy_(torch.tensor([[4.0], [1.0]]))
    found = scores.L1(reduce=reduce)(prunable_groups(model, torch.randn(2, 1))["a"])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("normalize", "check"),
    [
        ("mean", lambda s: s.mean() - 1),
        ("max", lambda s: s.max() - 1),
        ("sum", lambda s: s.sum() - 1),
        ("l2", lambda s: s.norm() - 1),
        ("standard", lambda s: s.mean().abs() + (s.std(correction=0) - 1).abs()),
        ("rank", lambda s: s.max() - 5 / 6),
    ],
)
def test_normalizers(normalize: str, check: Callable[[Tensor], Tensor]) -> None:
    model = network()
    found, plain = of_first(scores.L1(normalize=normalize), model), of_first(scores.L1(), model)
    assert abs(float(check(found))) < 1e-9
    assert torch.equal(found.argsort(), plain.argsort())


def test_all_members_count_the_readers_too() -> None:
    model = network()
    made, read = model[0].weight.detach().double(), model[3].weight.detach().double()
    expected = (made.abs().flatten(1).sum(1) + read.abs().sum((0, 2, 3))) / 2
    torch.testing.assert_close(of_first(scores.L1(members="all"), model), expected)


def test_collecting_leaves_the_model_alone() -> None:
    model = network().train()
    loss(model, DATA[0]).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    rng = torch.random.get_rng_state()
    needs = frozenset({"taylor", "squared_gradient", "hessian", "activation_mean", "activation_nonzero", "input_norm"})
    collect(model, prunable_groups(model, X), needs, DATA, loss)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True) if p.grad is not None)
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_a_function_is_a_score() -> None:
    model = network()
    pruner = Pruner(model, 0.5, dummy_input=X, score=lambda group: torch.arange(group.parts))
    assert pruner.prune().parts["0"].tolist() == [True] * 3 + [False] * 3


def test_errors() -> None:
    model = network()
    groups = prunable_groups(model, X)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ScoreError, match="Taylor is computed from data and has seen none"):
        scores.Taylor()(groups["0"])
    with pytest.raises(ScoreError, match="needs gradients, and there is no loss"):
        collect(model, groups, frozenset({"taylor"}), DATA)
    with pytest.raises(ScoreError, match=r"the loss returned shape \(3, 3\); a scalar tensor is expected"):
        collect(model, groups, frozenset({"taylor"}), DATA, lambda m, b: m(b[0]))
    with pytest.raises(ScoreError, match="the loss does not depend on any parameter"):
        collect(model, groups, frozenset({"taylor"}), DATA, lambda m, b: m(b[0]).detach().sum())
    with pytest.raises(ScoreError, match="gave no batch"):
        collect(model, groups, frozenset({"input_norm"}), [])
    with pytest.raises(ScoreError, match=r"returned \(2,\) for group '0'; expected a tensor of shape \(6,\)"):
        checked(lambda g: torch.zeros(2), groups["0"])
    with pytest.raises(OptionError, match="reduce is 'median'; expected one of 'mean', 'sum'"):
        scores.L1(reduce="median")
    with pytest.raises(ScoreError, match="BatchNormScale finds nothing to score in group '3'"):
        scores.BatchNormScale()(groups["3"])
    with torch.no_grad():
        model[0].weight[2] = torch.nan
    with pytest.raises(ScoreError, match=r"score 'L1' of group '0' is nan at part 2 \(1 of 6 are not finite\)"):
        checked(scores.L1(), groups["0"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k != "0.weight")
