"""Small networks that use Python, or PyTorch's machinery, in ways that a tracer has to survive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from ..specimen import Inputs, Zoo, images, sequences, tokens

PYTHON = Zoo()


@PYTHON(images(12))
class SharedModule(nn.Module):
    """One layer called three times, once on something else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.shared, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.embed(x))
        x = x + F.relu(self.shared(x))
        return self.head(F.relu(self.shared(self.shared(x))))


@PYTHON(images(12))
class TwoNames(nn.Module):
    """One submodule under two names, and a parameter shared by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        self.again = nn.Sequential(self.first, nn.ReLU())
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.right.weight = self.left.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.right(F.relu(self.left(self.again(x)))) + self.first(x)))


@PYTHON(tokens(20, 6), stretches=True)
class TiedHead(nn.Module):
    """The embedding is the head, the way in has a projection and the way out another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.bias = nn.Parameter(torch.zeros(20))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(self.down(torch.tanh(self.up(self.embed(ids)))), self.embed.weight, self.bias)


@PYTHON(images(3, 8, 8))
class RawParameters(nn.Module):
    """Parameters and buffers of the root module: weights, scale, shift, a normalisation of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.zeros(8, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.register_buffer("steps", torch.tensor(3), persistent=False)
        self.matrix = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d((x - self.mean) * 2, self.weight, padding=1) * self.scale + self.shift
        return F.relu(x).mean((2, 3)) @ self.matrix


@PYTHON(images(3, 8, 8))
class BatchNormByHand(nn.Module):
    """A functional batch norm over its own buffers, frozen (torchvision's detection models)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return self.head(F.relu(self.conv(x) * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)))


@PYTHON(images(12))
class ReadsValue(nn.Module):
    """Branches on a parameter's value and on an input's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("temperature", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.abs().sum().item() > 1e9:
            raise ValueError("inputs out of range")
        x = F.relu(self.fc1(x))
        if float(self.temperature) > 0.0:
            x = self.fc2(x) / self.temperature.item()
        return self.fc3(torch.tanh(x))


class Pair(NamedTuple):
    """A named tuple in the output."""

    low: torch.Tensor
    high: torch.Tensor | None


@PYTHON(images(12))
class NestedOutputs(nn.Module):
    """Dicts, lists, named tuples, None and plain numbers around the outputs; one output appears twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 16), nn.Linear(16, 6), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        h = F.relu(self.fc1(x))
        low = self.fc2(h)
        return {
            "pair": Pair(low, None),
            "list": [self.fc3(h), low, (h.sum(1),)],
            "classes": 5,
            "name": "nested",
        }


@dataclass
class Output:
    """A dataclass output that is no pytree of its own accord."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None


torch.utils._pytree.register_dataclass(Output)


@PYTHON(images(12))
class DataclassOutput(nn.Module):
    """Returns a dataclass whose second field is the hidden layer itself, which therefore cannot shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> Output:
        hidden = F.relu(self.fc2(F.relu(self.fc1(x))))
        return Output(logits=self.fc3(hidden), hidden=hidden)


def nested_inputs(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
    """A tensor, a None and a dict of a tuple, by position and by keyword."""
    first, second, third = (torch.randn(batch, 12, generator=generator) for _ in range(3))
    return first, None, {"extra": {"pair": (second, third)}, "flag": True}


@PYTHON(nested_inputs)
class NestedInputs(nn.Module):
    """Optional, keyword and nested inputs, and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, *, extra: dict[str, Any], flag: bool = False
    ) -> torch.Tensor:
        first, second = extra["pair"]
        h = F.relu(self.fc1(x)) + F.relu(self.fc2(first - second))
        if mask is not None:
            h = h * mask
        return self.fc3(h) if flag else h


@PYTHON(images(3, 8, 8))
class DeadBranch(nn.Module):
    """A branch whose result is thrown away, a layer never called, an auxiliary head for training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused, self.wasted = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3)
        self.auxiliary, self.head = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x))
        self.wasted(x)
        pooled = x.mean((2, 3))
        if self.training:
            return self.head(pooled) + self.auxiliary(pooled).sum()
        return self.head(pooled)


@PYTHON(images(12))
class WeightNorm(nn.Module):
    """Weight norm and spectral norm, by parametrisation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = parametrizations.weight_norm(nn.Linear(12, 16))
        self.fc2 = nn.Linear(16, 16)
        self.fc3 = parametrizations.spectral_norm(nn.Linear(16, 10))
        self.fc4 = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc4(F.relu(self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))))


class Symmetric(nn.Module):
    """A parametrisation that couples rows and columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


@PYTHON(images(12))
class Parametrised(nn.Module):
    """A weight computed out of a parameter at each call, twice over."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        parametrize.register_parametrization(self.fc2, "weight", Symmetric())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


@PYTHON(images(3, 8, 8))
class WeightStandardised(nn.Module):
    """The convolution's weight is standardised in ``forward`` (BiT, NFNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.gain, self.head = nn.Parameter(torch.ones(12, 1, 1, 1)), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.conv2.weight
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = self.gain * (weight - mean) / (variance + 1e-5).sqrt()
        return self.head(F.relu(F.conv2d(F.relu(self.conv1(x)), weight, self.conv2.bias)).mean((2, 3)))


@PYTHON(sequences(5, 12), stretches=True)
class Checkpointed(nn.Module):
    """Activation checkpointing, of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = x + checkpoint(block, x, use_reentrant=bool(i))
        return self.head(x)


class SignedSquare(torch.autograd.Function):
    """``x * |x|`` with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x.abs()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * grad * x.abs()


@PYTHON(images(12))
class CustomFunction(nn.Module):
    """A custom autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(SignedSquare.apply(self.fc2(SignedSquare.apply(self.fc1(x)))))


@torch.library.custom_op("maskprop_zoo::smooth_clip", mutates_args=())
def smooth_clip(x: torch.Tensor, limit: float) -> torch.Tensor:
    """An elementwise op that only its author knows."""
    return limit * torch.tanh(x / limit)


@smooth_clip.register_fake
def _(x: torch.Tensor, limit: float) -> torch.Tensor:
    return torch.empty_like(x)


def _save_input(ctx: Any, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.limit = inputs[1]


def _smooth_clip_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    (output,) = ctx.saved_tensors
    return grad * (1 - (output / ctx.limit) ** 2), None


smooth_clip.register_autograd(_smooth_clip_backward, setup_context=_save_input)


@PYTHON(images(3, 8, 8))
class LibraryOp(nn.Module):
    """An op of ``torch.library``: nobody wrote a rule for it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = smooth_clip(self.conv2(smooth_clip(self.conv1(x), 2.0)), 1.5)
        return self.head(x.mean((2, 3)))


@PYTHON(images(3, 8, 8))
class RareOps(nn.Module):
    """Ops that few rule books hold: a norm over space, cumulative sums, sorting, clamping, comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = x / (1 + torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True))
        x = self.conv2(x.cumsum(3).clamp(-2, 2) * (x > 0))
        return self.head(x.flatten(2).sort(2).values[..., :3].mean(2) + x.std((2, 3)))
