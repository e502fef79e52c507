"""A branch whose last layer is masked whole leaves with all its parameters; the model's own forward stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskprop
from benchmarks.zoo.check import count_parameters, masked_reference
from benchmarks.zoo.randomise import randomise
from maskprop import ModelSpeedup
from maskprop.rewrite.constant import Constant
from tests.small import TOLERANCE, error


class Residual(nn.Module):
    def __init__(self, width: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 12, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += F.max_pool2d(x, 1, self.stride)
        return F.relu_(out)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Residual(), Residual(stride=2), Residual())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class PreNorm(nn.Module):
    """Attention and MLP, each a branch of its own."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def convolutional() -> nn.Module:
    return randomise(Convolutional().eval(), (torch.randn(2, 3, 8, 8),))


def transformer() -> nn.Module:
    return randomise(nn.Sequential(PreNorm(), PreNorm(), nn.Linear(16, 3)).eval(), (torch.randn(2, 5, 16),))


def whole(model: nn.Module, *names: str) -> dict[str, Tensor]:
    return {name: torch.zeros_like(model.get_parameter(name)) for name in names}


def check_equal(compact: nn.Module, reference: nn.Module, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        assert error(compact, reference, torch.randn(shape)) <= TOLERANCE


IMAGES = ((1, 3, 8, 8), (3, 3, 10, 12))
TOKENS = ((1, 5, 16), (3, 7, 16))


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_residual_branch_of_convolutions(block: int) -> None:
    model = convolutional()
    masks = whole(model, f"blocks.{block}.conv2.weight")
    reference, before = masked_reference(model, masks), count_parameters(model)
    ModelSpeedup(model, torch.randn(2, 3, 8, 8), masks).speedup_model()
    check_equal(model, reference, *IMAGES)
    # two convolutions and the inner norm, and the weight of the outer norm, whose bias is the constant
    assert before - count_parameters(model) == 2 * 8 * 12 * 9 + 2 * 12 + 8
    assert type(model.blocks[block]) is Residual
    assert set(model.state_dict()) < set(reference.state_dict())


def test_a_branch_of_zeros_leaves_nothing() -> None:
    model = convolutional()
    masks = whole(model, "blocks.0.bn2.weight", "blocks.0.bn2.bias")
    reference, before = masked_reference(model, masks), count_parameters(model)
    ModelSpeedup(model, torch.randn(2, 3, 8, 8), masks).speedup_model()
    check_equal(model, reference, *IMAGES)
    assert before - count_parameters(model) == 2 * 8 * 12 * 9 + 2 * 12 + 2 * 8
    assert not list(model.blocks[0].parameters())


class Looked(nn.Module):
    """What is looked up enters by a layer that may be masked whole."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.enter, self.direct = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.enter(self.table(x[:, 0].round().long().clamp(0, 6))) + self.direct(x)


def test_what_only_a_dead_layer_read_shrinks() -> None:
    model = randomise(Looked().eval(), (torch.randn(3, 4),))
    masks = whole(model, "enter.weight")
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(3, 4), masks).speedup_model()
    check_equal(model, reference, (5, 4))
    assert model.table.weight.shape == (7, 1)


class ChannelGate(nn.Module):
    """A convolution along the channels, which are then its space."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Conv2d(3, 8, 3), nn.Conv1d(1, 1, 3, padding=1, bias=False), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        gate = self.gate(y.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        return self.b(y * gate[:, :, None, None])


def test_a_constant_is_as_large_as_what_it_is_given() -> None:
    model = randomise(ChannelGate().eval(), (torch.randn(2, 3, 8, 8),))
    masks = whole(model, "gate.weight") | {"a.weight": (torch.arange(8) % 2).float().reshape(8, 1, 1, 1)}
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 3, 8, 8), masks).speedup_model()
    check_equal(model, reference, *IMAGES)
    assert model.a.weight.shape == (4, 3, 3, 3)


def test_attention_and_mlp_branches() -> None:
    model = transformer()
    masks = whole(model, "0.proj.weight", "1.fc2.weight", "1.fc2.bias")
    reference, before = masked_reference(model, masks), count_parameters(model)
    speedup = ModelSpeedup(model, torch.randn(2, 5, 16), masks)
    speedup.speedup_model()
    check_equal(model, reference, *TOKENS)
    attention = 2 * 16 + (16 + 1) * 48 + 16 * 16  # the projection's bias stays
    mlp = 2 * 16 + (16 + 1) * 32 + (32 + 1) * 16
    assert before - count_parameters(model) == attention + mlp
    assert set(speedup.report.repair.removed) == {
        *("0.norm1", "0.qkv", "0.proj"),
        *("1.norm2", "1.fc1", "1.fc2"),
    }


def test_beside_ordinary_pruning() -> None:
    """Other masks narrow what the constant is added to."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Residual(), nn.Conv2d(8, 4, 3)).eval()
    model = randomise(model, (torch.randn(2, 3, 8, 8),))
    rows = torch.ones(8)
    rows[[1, 4, 6]] = 0
    masks = whole(model, "1.conv2.weight")
    for name in ("0.weight", "0.bias", "1.bn2.weight", "1.bn2.bias"):
        shape = model.get_parameter(name).shape
        masks[name] = rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 3, 8, 8), masks).speedup_model()
    check_equal(model, reference, (1, 3, 8, 8), (3, 3, 9, 7))
    assert count_parameters(model) == (3 * 9 + 1) * 5 + 5 + (5 * 9 + 1) * 4


class Beside(nn.Module):
    """Eight units, read by a branch and by a layer beside it; what both give is read by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(10, 3)
        self.branch = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        return self.head(torch.cat([self.wide(h), self.branch(h).sigmoid()], -1))


@pytest.mark.parametrize("bias", [True, False])
def test_what_a_dead_branch_read_and_what_reads_it_shrink(bias: bool) -> None:
    """Four units that only the branch reads leave, and so do the constants that it gives, into the head's bias."""
    model = randomise(Beside().eval(), (torch.randn(2, 6),))
    masks = whole(model, "branch.2.weight", *(["branch.2.bias"] if bias else []))
    masks["wide.weight"] = (torch.arange(8) < 4).float().expand(5, 8)
    reference = masked_reference(model, masks)
    speedup = ModelSpeedup(model, torch.randn(2, 6), masks)
    speedup.speedup_model()
    check_equal(model, reference, (1, 6), (3, 6))
    assert {path for path, module in model.named_modules() if isinstance(module, Constant)} == {"branch.0", "branch.2"}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("branch.")}
    left = {"stem.weight": (4, 6), "stem.bias": (4,), "wide.weight": (5, 4), "wide.bias": (5,)}
    assert shapes == {**left, "head.weight": (3, 5 + model.branch[2].size), "head.bias": (3,)}
    assert model.branch[2].size == 1, "an axis keeps at least one unit"
    assert speedup.report.flops[1] == 2 * 2 * (6 * 4 + 4 * 5 + 6 * 3)
    assert "same for every input" in str(speedup.explain("branch.0"))


def test_a_layer_that_is_constant_where_it_matters() -> None:
    """Squeeze-excite whose scale varies in no channel that is not zero."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 2)
            self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
            return self.head((self.norm(self.conv(x)) * scale[:, :, None, None]).mean((2, 3)))

    model = randomise(Scaled().eval(), (torch.randn(2, 3, 4, 4),))
    masks = {"norm.weight": torch.tensor([1.0, 1, 1, 0, 0, 0]), "norm.bias": torch.tensor([1.0, 1, 1, 0, 0, 0])}
    masks["fc2.weight"] = torch.tensor([0.0, 0, 0, 1, 1, 1])[:, None]
    reference = masked_reference(model, masks)
    speedup = ModelSpeedup(model, torch.randn(2, 3, 4, 4), masks)
    speedup.speedup_model()
    check_equal(model, reference, (1, 3, 4, 4), (3, 3, 5, 6))
    assert speedup.report.repair.removed == ["fc1", "fc2"]
    assert count_parameters(model) == 3 * 3 + 3 + 2 * 3 + 3 + (3 + 1) * 2  # of fc2 the bias is left


def test_a_generated_forward_calls_the_constant() -> None:
    """The number in ``forward`` that must change stands beside the dead branch."""

    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.dead, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Linear(24, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.adaptive_avg_pool2d(self.conv(x) + self.dead(x), 2)
            return self.head(ways[0](h))

    ways = [lambda h: h.reshape(-1, 24)]  # which of the author's code is running cannot be told
    model = randomise(Hard().eval(), (torch.randn(2, 3, 4, 4),))
    rows = torch.tensor([1.0, 0, 1, 1, 0, 1])
    masks = {**whole(model, "dead.weight"), "conv.weight": rows[:, None, None, None], "conv.bias": rows}
    masks["dead.bias"] = rows
    reference = masked_reference(model, masks)
    speedup = ModelSpeedup(model, torch.randn(2, 3, 4, 4), masks)
    speedup.speedup_model()
    check_equal(model, reference, (1, 3, 4, 4), (3, 3, 4, 4))
    assert speedup.report.repair.removed == ["dead"]
    assert list(speedup.report.repair.generated) == [""]
    assert (model.conv.out_channels, model.dead.size, model.head.in_features) == (4, 4, 16)


def test_a_layer_whose_weight_others_read_stays() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc3(x + self.fc2(F.relu(self.fc1(x)))) + self.fc1.weight.sum()

    model = randomise(Reads().eval(), (torch.randn(2, 6),))
    masks = whole(model, "fc2.weight")
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 6), masks).speedup_model()
    check_equal(model, reference, (1, 6), (3, 6))
    assert model.fc1.weight.shape == (6, 6)


def test_a_forward_that_looks_at_what_would_leave_is_left_alone() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc3(x + self.fc2(F.relu(self.fc1(x.to(self.fc1.weight.dtype)))))

    model = randomise(Looks().eval(), (torch.randn(2, 6),))
    masks = whole(model, "fc2.weight")
    reference = masked_reference(model, masks)
    speedup = ModelSpeedup(model, torch.randn(2, 6), masks)
    speedup.speedup_model()
    check_equal(model, reference, (1, 6), (3, 6))
    assert speedup.report.repair.removed == []
    assert model.fc1.weight.shape == (1, 6)


def test_the_result_lives_on(tmp_path: Path) -> None:
    """It trains, copies, compiles to a graph, stores and loads, and a second run finds nothing."""
    model = transformer()
    masks = whole(model, "0.proj.weight", "1.fc2.weight")
    reference = masked_reference(model, masks)
    x = torch.randn(2, 5, 16)
    ModelSpeedup(model, x, masks).speedup_model()
    check_equal(copy.deepcopy(model), reference, *TOKENS)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    check_equal(program.module(), reference, (3, 5, 16))
    maskprop.save(model, tmp_path / "saved")
    loaded = maskprop.load(tmp_path / "saved", transformer)
    y = torch.randn(3, 7, 16)
    assert torch.equal(loaded.eval()(y), model(y))
    before = count_parameters(model)
    again = ModelSpeedup(model, x, {name: torch.ones_like(p) for name, p in model.named_parameters()})
    again.speedup_model()
    assert count_parameters(model) == before
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("shape", [(), (6,)])
def test_a_branch_behind_a_scale_of_zero(shape: tuple[int, ...]) -> None:
    """As in ReZero (one number, Bachlechner et al., 2021) and in LayerScale (one a channel)."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(shape) + 1)
            self.branch, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.scale * self.branch(x))

    model = Scaled().eval()
    masks = {"scale": torch.zeros(shape)}
    masked = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 6), masks).speedup_model()
    x = torch.randn(3, 6)
    assert error(masked, model, x) < TOLERANCE
    assert count_parameters(model) == model.scale.numel() + count_parameters(model.head)


class PerChannel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width, 1, 1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize("last", [PerChannel(6), nn.Conv2d(6, 6, 1, bias=False)], ids=["scale", "convolution"])
def test_a_layer_without_a_bias_gets_one_for_its_constant(last: nn.Module, tmp_path: Path) -> None:
    """Of the branch six numbers are left, less three of the channels that leave."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), nn.Linear(6, 2)
            self.branch = nn.Sequential(
                nn.Conv2d(3, 5, 3, padding=1), nn.SiLU(), nn.Conv2d(5, 6, 1), copy.deepcopy(last)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x) + self.branch(x)).mean((2, 3)))

    model = randomise(Net().eval(), (torch.randn(2, 3, 4, 4),))
    first = (torch.arange(6) < 3).float()  # the second group of the norm puts out its bias alone
    masks = {**whole(model, "branch.2.weight"), "norm.weight": first, "conv.weight": first[:, None, None, None]}
    reference = masked_reference(model, masks)
    speedup = ModelSpeedup(model, torch.randn(2, 3, 4, 4), masks)
    speedup.speedup_model()
    check_equal(model, reference, (1, 3, 4, 4), (3, 3, 5, 6))
    assert speedup.report.repair.removed == ["branch.0", "branch.2", "branch.3"]
    assert [(n, p.shape) for n, p in model.branch.named_parameters()] == [("3.bias", (3,))]
    again = ModelSpeedup(model, torch.randn(2, 3, 4, 4), {n: p != 0 for n, p in model.named_parameters()})
    again.speedup_model()
    assert again.plan.empty
    assert not again.report.repair.removed
    maskprop.save(model, tmp_path / "saved")
    torch.manual_seed(0)
    check_equal(maskprop.load(tmp_path / "saved", lambda: Net().eval()), reference, (2, 3, 4, 4))


def test_attention_that_leaves_with_nothing_else() -> None:
    """Its constants are narrow, and the number of dims in ``forward`` follows them."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8, bias=False) for _ in range(4))
            self.head_dim = 4

        def forward(self, x: Tensor) -> Tensor:
            heads = (*x.shape[:2], -1, self.head_dim)
            q, k, v = (f(x).view(heads).transpose(1, 2) for f in (self.q, self.k, self.v))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return x + self.out(mixed.reshape(*x.shape[:2], -1))

    model = nn.Sequential(nn.Linear(5, 8), Attention(), nn.Linear(8, 2)).eval()
    masks = whole(model, "1.out.weight")
    reference = masked_reference(model, masks)
    speedup = ModelSpeedup(model, torch.randn(2, 3, 5), masks)
    speedup.speedup_model()
    check_equal(model, reference, (2, 3, 5), (1, 4, 5))
    assert not list(model[1].parameters())


class Pooling(nn.Module):
    """As many rows as there are queries, whatever the input's length."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.weight = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.query @ x.mT).softmax(-1) @ x) @ self.weight


class Turning(nn.Module):
    """The axes of length and width change places."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).mT


class Affine(nn.Module):
    """An author's layer whose output is as long as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize(("layer", "leaves"), [(Pooling, False), (Turning, False), (Affine, True)])
def test_an_authors_layer_leaves_if_its_output_follows_its_input(layer: type[nn.Module], leaves: bool) -> None:
    """At the dummy's length all are alike."""
    model = nn.Sequential(nn.Linear(6, 6), layer(), nn.Tanh()).eval()
    masks = whole(model, "1.weight")
    reference = masked_reference(model, masks)
    length = 6 if layer is Turning else 5
    ModelSpeedup(model, torch.randn(2, length, 6), masks, verify=False).speedup_model()
    assert isinstance(model[1], Constant) is leaves
    for length in (6, 9):
        x = torch.randn(2, length, 6)
        assert torch.equal(model(x), reference(x))


def test_the_model_itself_stays_of_its_class() -> None:
    model = Affine().eval()
    ModelSpeedup(model, torch.randn(2, 6), whole(model, "weight"), verify=False).speedup_model()
    assert type(model) is Affine
    assert torch.equal(model(torch.randn(3, 6)), torch.zeros(3, 6))


def test_the_fused_encoder_layer_misses_no_weights() -> None:
    """Outside a trace its kernel reads the weights of all layers, also of those that the layer never calls."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 20, batch_first=True), 2).eval()
    randomise(model, (torch.randn(2, 5, 12),))
    masks = whole(model, "layers.0.linear1.weight")
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 5, 12), masks, verify=False).speedup_model()
    check_equal(model, reference, (2, 5, 12), (3, 7, 12))
    assert isinstance(model.layers[0].linear1, Constant)


def test_writes_that_a_dead_layer_alone_read() -> None:
    """They are gone from the compact model's trace."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            out = torch.empty_like(h)
            out[:, :4], out[:, 4:] = h[:, 4:], h[:, :4].relu()
            return self.b(out) + x[:, :1]

    model = randomise(Writes().eval(), (torch.randn(2, 3, 4, 4),))
    masks = whole(model, "b.weight")
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 3, 4, 4), masks).speedup_model()
    check_equal(model, reference, (1, 3, 4, 4), (3, 3, 5, 6))


def test_sizes_in_a_branch_that_left_are_mended() -> None:
    """The constant that stands for the queries has fewer units than before, though no parameter shrinks."""

    class Rotates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, v = (layer(x).view(*x.shape[:2], -1, 4) for layer in (self.q, self.v))
            turned = torch.view_as_complex(q[..., :2].unflatten(-1, (1, 2)).contiguous()) * 1j
            q = torch.cat([torch.view_as_real(turned).flatten(-2), q[..., 2:]], -1).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, q, v.transpose(1, 2)).transpose(1, 2)
            return self.o(y.reshape(*x.shape[:2], -1))

    model = randomise(Rotates().eval(), (torch.randn(2, 5, 16),))
    masks = whole(model, "v.weight")
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 5, 16), masks, verify=False).speedup_model()
    check_equal(model, reference, (1, 5, 16), (3, 7, 16))


def test_zeros_take_images_of_any_size() -> None:
    """A scale of zero whose channels no class of torch names: its parameter does."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Residual(6), PerChannel(6), nn.Conv2d(6, 2, 1)).eval()
    model = randomise(model, (torch.randn(2, 3, 4, 4),))
    masks = whole(model, "2.scale")
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 3, 4, 4), masks).speedup_model()
    assert isinstance(model[2], Constant)
    check_equal(model, reference, (1, 3, 4, 4), (3, 3, 6, 5))


@pytest.mark.parametrize("pool", [lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)])
def test_a_mean_over_what_varies_towards_the_borders(pool: Callable[[Tensor], Tensor]) -> None:
    """Behind padding a constant layer makes a map of the image's size, whose mean is no constant."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.o = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(pool(self.b(self.a(x)).relu()))

    model = randomise(Pooled().eval(), (torch.randn(2, 3, 6, 6),))
    masks = whole(model, "a.weight")
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 3, 6, 6), masks, verify=False).speedup_model()
    assert isinstance(model.a, Constant)
    check_equal(model, reference, (1, 3, 6, 6), (3, 3, 9, 7))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x[:, [7, 1, 2, 3, 4, 5, 6, 0]],
        lambda x: x.index_select(1, torch.arange(8)),
        lambda x: F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1),
        lambda x: F.group_norm(x, 2),
        lambda x: F.conv2d(x, torch.arange(64.0).reshape(8, 8, 1, 1)),
        lambda x: x.movedim(1, -1) @ torch.arange(64.0).reshape(8, 8),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.max_pool2d(x, 2),
        lambda x: x.scatter(1, torch.zeros(1, 1, 1, 1, dtype=torch.int64), 2.0),
        lambda x: x.cumsum(1),
    ],
    ids=["index", "index_select", "layer_norm", "group_norm", "conv", "matmul", "resize", "pool", "scatter", "cumsum"],
)
def test_shares_of_constants_depend_on_how_many_there_are(between: Callable[[Tensor], Tensor]) -> None:
    """What is uniform stays so through ops that are run on constants: the softmax is another one for another width."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(between(self.a(x)).transpose(2, 3).softmax(2).amax(2)[..., :8, 0]) + x.mean()

    model = randomise(Shares().eval(), (torch.randn(2, 3, 8, 8),))
    masks = whole(model, "a.weight")
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 3, 8, 8), masks, verify=False).speedup_model()
    check_equal(model, reference, (1, 3, 8, 8), (3, 3, 9, 12))


# --- users' own replacements ------------------------------------------------------------------------------


def test_a_replacement_elsewhere_spares_no_branch() -> None:
    x, masks = torch.randn(2, 3, 8, 8), whole(convolutional(), "blocks.0.bn2.weight", "blocks.0.bn2.bias")
    model = convolutional()
    reference, replaced = masked_reference(model, masks), copy.deepcopy(model)
    ModelSpeedup(model, x, masks).speedup_model()
    ModelSpeedup(replaced, x, masks, customized_replace_func={nn.Linear: lambda module, leaf: module}).speedup_model()
    assert count_parameters(replaced) == count_parameters(model) < count_parameters(reference)
    check_equal(replaced, reference, (2, 3, 8, 8), (1, 3, 12, 10))


class TakeLayer:
    """A replacer that takes over one layer of the branch that leaves."""

    def __init__(self, path: str) -> None:
        self.path, self.seen = path, []

    def replace_modules(self, speedup: ModelSpeedup) -> None:
        module = speedup.model.get_submodule(self.path)
        assert isinstance(module, nn.Conv2d), "it is as it was"
        self.seen.append(tuple(module.weight.shape))
        (given,), output, _ = speedup.masks_of(self.path)
        sizes = [int((mask != 0).any(0).flatten(1).any(1).sum()) for mask in (given, output)]
        new = nn.Conv2d(*sizes, module.kernel_size, module.stride, module.padding, bias=False)
        speedup.replace_module(self.path, new)


@pytest.mark.parametrize("layer", ["conv1", "conv2"])
def test_what_is_replaced_stays_and_other_branches_leave(layer: str) -> None:
    model = convolutional()
    masks = whole(model, *(f"blocks.{i}.bn2.{name}" for i in (0, 2) for name in ("weight", "bias")))
    reference = masked_reference(model, masks)
    taken = TakeLayer(f"blocks.0.{layer}")
    speedup = ModelSpeedup(model, torch.randn(2, 3, 8, 8), masks, customized_replacers=[taken])
    speedup.speedup_model()
    assert all(isinstance(getattr(model.blocks[2], name), Constant) for name in ("conv1", "bn1", "conv2", "bn2"))
    assert isinstance(model.get_submodule(taken.path), nn.Conv2d)
    check_equal(model, reference, (2, 3, 8, 8), (1, 3, 12, 10))


class Windows(nn.Module):
    """Pools windows of four; the dummy input is too short for one."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled, self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.pooled(x)[:, : x.shape[1] // 4 * 4].unflatten(1, (-1, 4))
        pooled = windows.mean(2) if windows.shape[1] else windows.new_zeros(len(x), 0, 8)
        return torch.cat([pooled, self.fc2(F.relu(self.fc1(x)))], 1)


def test_what_is_empty_for_the_dummy_input_needs_its_layer() -> None:
    torch.manual_seed(0)
    model = Windows().eval()
    masks = {"fc1.weight": torch.tensor([0.0, 1, 1, 1, 0, 0, 1, 1])[:, None]}
    masks["fc1.bias"] = masks["fc1.weight"][:, 0]
    masked = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 3, 8), masks).speedup_model()
    assert model.fc1.weight.shape == (5, 8)
    assert error(model, masked, torch.randn(2, 9, 8)) <= TOLERANCE
