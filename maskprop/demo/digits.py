"""What the demo works on: handwritten digits, a small residual network, its training, and masks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskprop._extras import require
from maskprop.measure import evaluating

_BATCH_SIZE = 64


class Digits(NamedTuple):
    """scikit-learn's digits: images `(N, 1, 8, 8)` in [0, 1] and labels `(N,)`."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(generator: torch.Generator) -> Digits:
    """The 1797 digits that ship with scikit-learn, a random fifth of them held out as the test set."""
    bunch = require("sklearn.datasets", "report", "maskprop demo").load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[len(order) // 5 :], order[: len(order) // 5]
    return Digits(images[train], labels[train], images[test], labels[test])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut: projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, outputs, H / stride, W / stride)`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class DigitNet(nn.Module):
    """A residual network of three stages for 8x8 images."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128), classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential(
            nn.Sequential(ResidualBlock(widths[0], widths[0]), ResidualBlock(widths[0], widths[0])),
            nn.Sequential(ResidualBlock(widths[0], widths[1], 2), ResidualBlock(widths[1], widths[1])),
            nn.Sequential(ResidualBlock(widths[1], widths[2], 2), ResidualBlock(widths[2], widths[2])),
        )
        self.head = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(N, 1, 8, 8)` to logits `(N, classes)`."""
        x = self.stages(F.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def train(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    generator: torch.Generator,
    advance: Callable[[], object],
    *,
    learning_rate: float = 0.1,
    weight_decay: float = 0.08,
) -> None:
    """Train with SGD, one cycle of the learning rate, and cross entropy.

    Args:
        model: left in eval mode.
        digits: the data.
        epochs: passes over the training images.
        generator: decides the order of the images.
        advance: called after every step.
        learning_rate: the peak of the cycle.
        weight_decay: strong by default, since it shrinks the channels that the network can do without; that
            is what makes their norms tell them apart.
    """
    steps = epochs * steps_per_epoch(digits)
    optimizer = torch.optim.SGD(
        model.parameters(), learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(digits.images), generator=generator).split(_BATCH_SIZE):
            optimizer.zero_grad()
            _loss(model(digits.images[index]), digits.labels[index]).backward()
            optimizer.step()
            schedule.step()
            advance()
    model.eval()


def steps_per_epoch(digits: Digits) -> int:
    """Number of batches in one pass over the training images."""
    return -(-len(digits.images) // _BATCH_SIZE)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits `(N, classes)` in eval mode."""
    with evaluating(model), torch.no_grad():
        return model(images)  # type: ignore[no-any-return]


def training_loss(model: nn.Module, digits: Digits) -> float:
    """What `train` minimises, in eval mode and over all training images."""
    return float(_loss(predict(model, digits.images), digits.labels))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the test images that the model names correctly."""
    return float((predict(model, digits.test_images).argmax(1) == digits.test_labels).float().mean())


def l1_masks(model: DigitNet, sparsity: float) -> dict[str, dict[str, Tensor]]:
    """Mask the rows (output channels) of the convolutions that have the smallest L1 norms.

    Convolutions that add into one residual stream share their scores, the mean of their relative norms: a
    channel of a sum leaves only when all of its terms do. Streams are pruned half as much as the convolutions
    inside a block, as they carry everything.

    Args:
        model: the trained network.
        sparsity: the share of rows that is pruned inside a block.

    Returns:
        Masks `(rows, 1, 1, 1)` of zeros and ones, `{module: {"weight": mask}}`.
    """
    inner: list[list[str]] = []
    streams = [["conv"]]
    for name, block in model.named_modules():
        if isinstance(block, ResidualBlock):
            inner.append([f"{name}.conv1"])
            if isinstance(block.shortcut, nn.Sequential):  # a projection starts a new stream
                streams.append([f"{name}.shortcut.0"])
            streams[-1].append(f"{name}.conv2")
    masks = {}
    for names, share in [(names, sparsity) for names in inner] + [(names, sparsity / 2) for names in streams]:
        norms = torch.stack([model.get_parameter(f"{n}.weight").detach().abs().sum((1, 2, 3)) for n in names])
        score = (norms / norms.mean(1, keepdim=True)).mean(0)
        mask = torch.ones_like(score)
        mask[score.argsort()[: int(share * len(score))]] = 0
        masks.update({name: {"weight": mask.reshape(-1, 1, 1, 1)} for name in names})
    return masks
