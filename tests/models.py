"""Small networks for the tests of reports, storage, export and the command line."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskprop import ModelSpeedup


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1)
        self.norm = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.norm(self.conv1(x)))))


class ConvNet(nn.Module):
    """Stem, residual block, pooling, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block(8, 12)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class LeNet(nn.Module):
    """A number of features stands in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 5)
        self.fc1 = nn.Linear(6 * 4 * 4, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.view(-1, 96))))


class Transformer(nn.Module):
    """Patches or tokens, encoder layers of ``torch.nn``, head; a buffer that ``state_dict`` leaves out."""

    def __init__(self, tokens: int = 0) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Embedding(tokens, 16) if tokens else nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)
        self.register_buffer("position", torch.linspace(-1, 1, 16 * 16).reshape(1, 16, 16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x if x.dim() == 3 else x.flatten(2).transpose(1, 2)
        x = self.encoder(x + self.position[:, : x.shape[1]])
        return self.head(self.norm(x).mean(1))


def randomise(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random biases, affines and running statistics, so that errors show."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or name == "position":
                continue
            made = torch.rand(tensor.shape, generator=generator) - 0.5
            is_scale = name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight"))
            tensor.copy_(made + 1.0 if is_scale else made)
    return model.eval()


def rows(model: nn.Module, name: str, pruned: list[int]) -> dict[str, Tensor]:
    """Masks that prune rows of a module's weight, and of its bias."""
    module = model.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, Tensor)
    mask = torch.ones(weight.shape[0])
    mask[pruned] = 0
    masks = {f"{name}.weight": mask.reshape(-1, *[1] * (weight.ndim - 1))}
    if getattr(module, "bias", None) is not None:
        masks[f"{name}.bias"] = mask
    return masks


def masks_for(model: nn.Module) -> dict[str, Tensor]:
    """Masks that take units out of every kind of axis of these networks."""
    if isinstance(model, ConvNet):
        return {
            **rows(model, "block.conv1", [0, 3, 5]),
            **rows(model, "stem", [1]),
            **rows(model, "block.conv2", [1, 2]),
        }
    if isinstance(model, LeNet):
        return {**rows(model, "conv", [0, 4]), **rows(model, "fc1", [3, 7, 8])}
    masks: dict[str, Tensor] = {}
    for i in (0, 1):
        attention = f"encoder.layers.{i}.self_attn"
        head = torch.ones(48)
        head[[4 * i + k + part * 16 for part in range(3) for k in range(4)]] = 0
        masks[f"{attention}.in_proj_weight"] = head[:, None]
        masks[f"{attention}.in_proj_bias"] = head
        masks.update(rows(model, f"encoder.layers.{i}.linear1", [2, 9, 11 + i]))
    return masks


def example(model: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
    """An input of the network."""
    if isinstance(model, Transformer):
        if isinstance(model.embed, nn.Embedding):
            return torch.randint(0, model.embed.num_embeddings, (batch, 9), generator=generator)
        return torch.randn(batch, 3, 16, 16, generator=generator)
    shape = (1, 12, 12) if isinstance(model, LeNet) else (3, 10, 10)
    return torch.randn(batch, *shape, generator=generator)


def sped_up(model: nn.Module, generator: torch.Generator) -> ModelSpeedup:
    """The network, randomised, masked and sped up; ``speedup.model`` is the compact one."""
    randomise(model, generator)
    speedup = ModelSpeedup(model, example(model, 2, generator), masks_for(model))
    speedup.speedup_model()
    return speedup
