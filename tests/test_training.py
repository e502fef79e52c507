"""What only training runs, such as auxiliary heads, follows the units that stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo.check import masked_reference, relative_error
from benchmarks.zoo.randomise import randomise
from maskprop import ModelSpeedup
from maskprop.graph.trace import of_torch
from tests.small import TOLERANCE


class DeepSupervision(nn.Module):
    """A trunk whose stages have heads of their own in training: convolutional, flattening, and a shared one."""

    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 12, 3, padding=1)
        self.skip = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 4)
        self.aux_conv = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.aux_fc = nn.Linear(6 * 4, 4)
        self.late = nn.Linear(12 * 2 * 2, 4)
        self.pool = nn.AdaptiveAvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        y = self.body(x).relu() + self.skip(x)
        out = self.head(y.mean((2, 3)))
        if not self.training:
            return out
        early = self.aux_fc(nn.functional.dropout(self.pool(self.aux_conv(x)).flatten(1), 0.0, self.training))
        return out, early, self.late(self.pool(y).flatten(1))


def half(model: nn.Module, *layers: str, kept: bool = False) -> dict[str, Tensor]:
    """Masks on the rows of layers, with all that belongs to them; ``kept`` leaves their biases, so constants remain."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in layers and not (kept and name.endswith("bias")):
            mask = torch.ones(parameter.shape[0])
            mask[1::2] = 0
            found[name] = mask.reshape(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape)
    return found


def training(model: nn.Module, *, layers: bool = True) -> nn.Module:
    """In training mode; ``layers`` says whether torch's own layers are, too."""
    for module in model.train().modules():
        module.training = layers or not of_torch(type(module))
    return model


def check_training(model: nn.Module, reference: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        wanted = training(reference, layers=False)(x)
        for a, b in zip(training(model, layers=False)(x), wanted, strict=True):
            assert relative_error(a, b) <= TOLERANCE


TRUE_ZEROS = ("stem", "norm", "body", "skip")


@pytest.mark.parametrize("kept", [False, True], ids=["zeros", "constants"])
def test_heads_of_training_follow(kept: bool) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = randomise(DeepSupervision().eval(), (x,))
    masks = half(model, *TRUE_ZEROS, kept=kept)
    reference = masked_reference(model, masks)
    ModelSpeedup(model, x, masks).speedup_model()
    assert model.stem.out_channels == 4 + kept, "a padded convolution's constants need a carrier"
    assert model.aux_conv[0].weight.shape == (6, model.stem.out_channels, 1, 1)
    assert model.aux_fc.weight.shape == (4, 24)
    assert model.late.weight.shape == (4, 24)
    for batch in (2, 3):
        check_training(model, reference, torch.randn(batch, 3, 8, 8))
    outputs = training(model)(torch.randn(3, 3, 8, 8))
    sum(o.square().sum() for o in outputs).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_the_plan_and_a_second_run_know_them() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = randomise(DeepSupervision().eval(), (x,))
    dense, masks = copy.deepcopy(model), half(model, *TRUE_ZEROS)
    speedup = ModelSpeedup(model, x, masks)
    speedup.speedup_model()
    assert {"aux_conv.0.weight", "late.weight"} <= speedup.plan.keep.keys()
    again = ModelSpeedup(model, x, {n: (p != 0).float() for n, p in model.named_parameters()})
    again.speedup_model()
    assert again.plan.empty
    assert sum(p.numel() for p in dense.parameters()) > sum(p.numel() for p in model.parameters())


class TiesOthers(DeepSupervision):
    """Training adds two values of which other units left, so that no smaller head could follow."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        if self.training:
            x = self.aux_conv(x + self.body(x)[:, :8])
        return self.head(self.body(x[:, :8]).mean((2, 3)))


def test_what_cannot_follow_stays_and_is_named() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = randomise(TiesOthers().eval(), (x,))
    masks = half(model, "stem", "norm")
    masks |= {n: m.flip(0) for n, m in half(model, "body").items()}
    reference = masked_reference(model, masks)
    speedup = ModelSpeedup(model, x, masks)
    speedup.speedup_model()
    assert model.aux_conv[0].in_channels == 8
    assert "aux_conv" in speedup.report.idle
    fresh = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(model.eval()(fresh), reference.eval()(fresh)) <= TOLERANCE


def test_googlenet_trains_with_its_auxiliary_heads() -> None:
    from maskprop._torchvision import import_torchvision

    import_torchvision()
    from torchvision.models import googlenet

    x = torch.randn(2, 3, 64, 64)
    model = randomise(googlenet(num_classes=10, init_weights=False).eval(), (x,))
    masks = half(model, *(name for name, m in model.named_modules() if name.startswith(("inception4", "conv3"))))
    reference = masked_reference(model, masks)
    speedup = ModelSpeedup(model, x, masks)
    speedup.speedup_model()
    assert speedup.report.auxiliary == ["aux1", "aux2"]
    assert model.aux1.conv.conv.in_channels == 256
    for net in (model, reference):
        for module in net.modules():
            module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
    fresh = torch.randn(3, 3, 64, 64)
    check_training(model, reference, fresh)
    sum(o.square().sum() for o in training(model)(fresh)).backward()
