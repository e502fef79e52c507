"""Half of every layer of the usual networks: what is left, worked out by hand, and the masked one's numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo.check import count_parameters, masked_reference
from benchmarks.zoo.randomise import randomise
from maskprop import ModelSpeedup
from maskprop._torchvision import import_torchvision
from tests.small import TOLERANCE, error

import_torchvision()
from torchvision import models as tv  # noqa: E402

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg11_bn": lambda: tv.vgg11_bn(num_classes=10),
    "resnet18": lambda: tv.resnet18(num_classes=10),
    "resnet50": lambda: tv.resnet50(num_classes=10),
    "resnext50_32x4d": lambda: tv.resnext50_32x4d(num_classes=10),
    "regnet_y_400mf": lambda: tv.regnet_y_400mf(num_classes=10),
    "mobilenet_v2": lambda: tv.mobilenet_v2(num_classes=10),
    "mobilenet_v3_small": lambda: tv.mobilenet_v3_small(num_classes=10),
    "densenet121": lambda: tv.densenet121(num_classes=10),
    "googlenet": lambda: tv.googlenet(num_classes=10, aux_logits=False, init_weights=False),
    "shufflenet_v2_x0_5": lambda: tv.shufflenet_v2_x0_5(num_classes=10),
    "squeezenet1_1": lambda: tv.squeezenet1_1(num_classes=10),
}
LAYERS = (nn.Conv2d, nn.Linear)


def network(name: str) -> tuple[nn.Module, str]:
    """The network, and the name of its last layer, whose outputs are the model's."""
    torch.manual_seed(0)
    model = randomise(NETWORKS[name]().eval(), images(2))
    return model, [n for n, m in model.named_modules() if isinstance(m, LAYERS)][-1]


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


def check_equal(model: nn.Module, expected: nn.Module) -> None:
    for batch in (1, 3):
        assert error(model, expected, images(batch)) <= TOLERANCE


def half(size: int) -> int:
    return (size + 1) // 2


def left(model: nn.Module, last: str) -> int:
    """Parameters where each layer keeps every other output, and each input that a kept output feeds."""
    count = 0
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            out = m.out_channels if name == last else half(m.out_channels)
            depthwise = m.groups == m.in_channels
            into = 3 if m.in_channels == 3 else 1 if depthwise else half(m.in_channels) // m.groups
            count += out * into * m.kernel_size[0] * m.kernel_size[1] + (out if m.bias is not None else 0)
        elif isinstance(m, nn.Linear):
            out = m.out_features if name == last else half(m.out_features)
            count += out * half(m.in_features) + out
        elif isinstance(m, nn.BatchNorm2d):
            count += 2 * half(m.num_features)
    return count


# Units that are shuffled among others, of which other units left, change their order: that is not undone.
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"shufflenet_v2_x0_5"}))
def test_every_other_unit_of_every_layer(name: str) -> None:
    model, last = network(name)
    masks = {}
    for path, module in model.named_modules():
        if isinstance(module, (*LAYERS, nn.BatchNorm2d)) and path != last:
            for key, tensor in module.named_parameters(recurse=False):
                mask = torch.zeros_like(tensor)
                mask[::2] = 1
                masks[f"{path}.{key}"] = mask
    expected, count = masked_reference(model, masks), left(model, last)
    ModelSpeedup(model, images(2), masks).speedup_model()
    assert count_parameters(model) == count
    check_equal(model, expected)


def test_inside_of_shuffled_units() -> None:
    model, _ = network("shufflenet_v2_x0_5")
    masks, saved = {}, 0
    for path, branch in model.named_modules():
        if path.endswith("branch2"):
            into, out = branch[0].in_channels, branch[5].out_channels
            saved += into * out // 2 + out + 9 * out // 2 + out + out * out // 2
            for layer in (0, 1, 3, 4):
                for key, tensor in branch[layer].named_parameters():
                    masks[f"{path}.{layer}.{key}"] = torch.zeros_like(tensor)
                    masks[f"{path}.{layer}.{key}"][::2] = 1
    expected, before = masked_reference(model, masks), count_parameters(model)
    ModelSpeedup(model, images(2), masks).speedup_model()
    assert before - count_parameters(model) == saved
    check_equal(model, expected)


class Shuffled(nn.Module):
    """Grouped convolutions around a channel shuffle, as in ShuffleNet (Zhang et al., 2018)."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.groups = groups
        self.reduce = nn.Conv2d(3 * groups, width, 1, groups=groups)
        self.spatial = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.expand = nn.Conv2d(width, 2 * groups, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x).relu()
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.expand(self.spatial(x))


# Channel i of group g comes out at place i * groups + g, and half of the places are in either group of the last layer.
@pytest.mark.parametrize(
    ("groups", "removed", "left"),
    [
        (2, [0, 2, 4, 6], 4),  # of each group two, and of what each becomes two
        (2, [0, 3, 4, 7], 4),
        (2, [0, 4], 8),  # both are in the last layer's first group
        (2, [0, 1, 4, 5], 8),  # which is that group whole, and would leave its outputs nothing to read
        (2, [0, 2, 5, 7], 8),  # a channel leaves in all groups or in none
        (3, [0, 2, 4, 6, 8, 10, 12, 14, 16], 9),
    ],
)
def test_groups_before_and_behind_a_shuffle(groups: int, removed: list[int], left: int) -> None:
    width = 8 if groups == 2 else 18
    model = randomise(Shuffled(groups, width).eval(), (torch.randn(2, 3 * groups, 5, 5),))
    keep = torch.ones(width).index_fill_(0, torch.tensor(removed), 0)
    masks = {"reduce.weight": keep[:, None, None, None], "reduce.bias": keep}
    expected = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 3 * groups, 5, 5), masks).speedup_model()
    assert model.reduce.out_channels == model.spatial.groups == left
    for batch in (1, 3):
        assert error(model, expected, torch.randn(batch, 3 * groups, 6, 5)) <= TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_another_half_in_every_layer(name: str) -> None:
    """Masks that conflict wherever layers meet, with constants left behind."""
    model, last = network(name)
    generator = torch.Generator().manual_seed(1)
    masks = {
        f"{path}.weight": (torch.rand(len(module.weight), generator=generator) < 0.5)
        .reshape(-1, *[1] * (module.weight.ndim - 1))
        .expand(module.weight.shape)
        .float()
        for path, module in model.named_modules()
        if isinstance(module, LAYERS) and path != last
    }
    expected, before = masked_reference(model, masks), count_parameters(model)
    ModelSpeedup(model, images(2), masks).speedup_model()
    assert count_parameters(model) < before
    check_equal(model, expected)
