"""Small convolutional networks, one for each pattern that couples channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..specimen import Zoo, images

CONVNETS = Zoo()


def conv_bn(inp: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


@CONVNETS(images(16))
class MLP(nn.Module):
    """Three linear layers."""

    def __init__(self, inp: int = 16, hidden: int = 24, out: int = 5) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(inp, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, out),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(torch.tanh(self.fc2(F.relu(self.fc1(x)))))


@CONVNETS(images(1, 28, 28))
class LeNet(nn.Module):
    """The LeNet of NNI's speedup tests: its flatten joins 4 x 4 pixels of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, 1), nn.Conv2d(32, 64, 3, 1)
        self.dropout1, self.dropout2 = nn.Dropout2d(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = self.dropout2(F.relu(self.fc1(torch.flatten(x, 1))))
        return F.log_softmax(self.fc2(x), dim=1)


@CONVNETS(images(3, 16, 16))
class VGG(nn.Module):
    """Convolution, batch norm, ReLU, max pooling; a flatten with 4 x 4 pixels before the classifier."""

    def __init__(self, widths: tuple[int, ...] = (8, 16)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inp, out in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(inp, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(widths[-1] * 16, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


class BasicBlock(nn.Module):
    """ResNet's basic block with a projection where shapes change."""

    def __init__(self, inp: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or inp != out:
            self.downsample = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += identity
        return F.relu(y)


@CONVNETS(images(3, 16, 16))
class ResNet(nn.Module):
    """Stem, two stages of basic blocks, global pooling."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_bn(3, width)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width))
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.layer2(self.layer1(self.stem(x))), 1).flatten(1))


@CONVNETS(images(3, 12, 12))
class PreActivation(nn.Module):
    """Pre-activation residual chain: the batch norms read the sum, nobody else rescales it."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.fc = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.relu(norm(x)))
        return self.fc(x.mean((2, 3)))


@CONVNETS(images(3, 12, 12))
class GroupedConvs(nn.Module):
    """A ResNeXt bottleneck: grouped convolution between two pointwise ones, and a residual."""

    def __init__(self, width: int = 16, groups: int = 4) -> None:
        super().__init__()
        self.stem = conv_bn(3, width)
        self.reduce = conv_bn(width, width, 1)
        self.grouped = conv_bn(width, width, 3, groups=groups)
        self.expand = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.fc = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(x + self.expand(self.grouped(self.reduce(x))))
        return self.fc(x.mean((2, 3)))


@CONVNETS(images(3, 12, 12))
class GroupedUneven(nn.Module):
    """Grouped convolutions that change the width inside the groups, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 24, 3, groups=3)
        self.conv3 = nn.Conv2d(24, 8, 3, groups=4)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


@CONVNETS(images(3, 12, 12))
class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, padded depthwise, linear bottleneck, residual."""

    def __init__(self, width: int = 8, expansion: int = 3) -> None:
        super().__init__()
        hidden = width * expansion
        self.stem = conv_bn(3, width)
        self.block = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.fc = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.fc((x + self.block(x)).mean((2, 3)))


@CONVNETS(images(3, 12, 12))
class DepthMultiplier(nn.Module):
    """A depthwise convolution with two outputs a channel."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.depthwise = nn.Conv2d(width, 2 * width, 3, groups=width)
        self.fc = nn.Linear(2 * width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.depthwise(F.relu(self.conv(x)))).mean((2, 3)))


@CONVNETS(images(3, 12, 12))
class SqueezeExcite(nn.Module):
    """MobileNetV3's gate: pooled, reduced, expanded, hard sigmoid, broadcast over space."""

    def __init__(self, width: int = 16, reduced: int = 6) -> None:
        super().__init__()
        self.stem = conv_bn(3, width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(width, reduced, 1), nn.Conv2d(reduced, width, 1)
        self.gate = nn.Hardsigmoid()
        self.project = nn.Sequential(nn.Conv2d(width, 8, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x * self.gate(self.fc2(F.relu(self.fc1(self.pool(x)))))
        return self.fc(self.project(x).mean((2, 3)))


@CONVNETS(images(3, 12, 12))
class DenseNet(nn.Module):
    """Batch norms over growing concatenations: one channel feeds several norms."""

    def __init__(self, width: int = 8, growth: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        widths = [width + i * growth for i in range(depth)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(nn.Conv2d(w, growth, 3, padding=1, bias=False) for w in widths)
        self.norm = nn.BatchNorm2d(width + depth * growth)
        self.fc = nn.Linear(width + depth * growth, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.fc(F.relu(self.norm(torch.cat(features, 1))).mean((2, 3)))


@CONVNETS(images(3, 12, 12))
class Inception(nn.Module):
    """Parallel branches concatenated, among them a pooling one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_bn(3, width)
        self.b1 = conv_bn(width, 6, 1)
        self.b2 = nn.Sequential(conv_bn(width, 4, 1), conv_bn(4, 8))
        self.b3 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(width, 4, 1))
        self.fc = nn.Linear(18, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.fc(torch.cat([self.b1(x), self.b2(x), self.b3(x)], 1).mean((2, 3)))


def channel_shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """View, transpose, view."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2).contiguous()
    return x.view(batch, channels, height, width)


@CONVNETS(images(3, 12, 12))
class ShuffleNet(nn.Module):
    """ShuffleNetV2's units: chunk, one branch convolved, concat, channel shuffle; twice."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        half = width // 2
        self.stem = conv_bn(3, width)
        self.branches = nn.ModuleList(
            nn.Sequential(
                conv_bn(half, half, 1),
                nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False),
                nn.BatchNorm2d(half),
                conv_bn(half, half, 1),
            )
            for _ in range(2)
        )
        self.last = conv_bn(width, 12, 1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for branch in self.branches:
            left, right = x.chunk(2, dim=1)
            x = channel_shuffle(torch.cat((left, branch(right)), dim=1), 2)
        return self.fc(self.last(x).mean((2, 3)))


@CONVNETS(images(3, 12, 12))
class ChannelShuffleModule(nn.Module):
    """``nn.ChannelShuffle`` between two grouped convolutions."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 1, groups=3), nn.Conv2d(width, width, 3, groups=3)
        self.shuffle = nn.ChannelShuffle(3)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv2(self.shuffle(F.relu(self.conv1(F.relu(self.stem(x)))))).mean((2, 3)))


@CONVNETS(images(3, 13, 13))
class SqueezeNet(nn.Module):
    """A fire module and a convolution as the classifier, pooled by adaptive pooling of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2), nn.ReLU(True), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.squeeze = nn.Conv2d(12, 6, 1)
        self.expand1, self.expand3 = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.squeeze(self.stem(x)))
        return self.classifier(torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)).flatten(1)


@CONVNETS(images(3, 16, 16))
class UNet(nn.Module):
    """Encoder, decoder by transposed convolutions, skips by concatenation."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = (
            conv_bn(3, width),
            conv_bn(width, 2 * width),
            conv_bn(2 * width, 4 * width),
        )
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.dec2 = conv_bn(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.dec1 = conv_bn(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        d1 = self.down1(x)
        d2 = self.down2(F.max_pool2d(d1, 2))
        x = self.middle(F.max_pool2d(d2, 2))
        x = self.dec2(torch.cat([self.up2(x), d2], 1))
        x = self.dec1(torch.cat([self.up1(x), d1], 1))
        return self.head(x)


@CONVNETS(images(3, 8, 8))
class SuperResolution(nn.Module):
    """PixelShuffle: four rows of the convolution make one channel."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.conv3 = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(self.shuffle(F.relu(self.conv2(F.relu(self.conv1(x))))))


@CONVNETS(images(3, 16, 16))
class CrossStagePartial(nn.Module):
    """YOLO's C2f: chunked channels, a chain of residual bottlenecks, everything concatenated."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        half = width // 2
        self.stem = conv_bn(3, width)
        self.cv1 = conv_bn(width, width, 1)
        self.blocks = nn.ModuleList(nn.Sequential(conv_bn(half, half), conv_bn(half, half)) for _ in range(2))
        self.cv2 = conv_bn(4 * half, 10, 1)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = list(self.cv1(self.stem(x)).chunk(2, 1))
        for block in self.blocks:
            y.append(y[-1] + block(y[-1]))
        return self.fc(self.cv2(torch.cat(y, 1)).mean((2, 3)))
