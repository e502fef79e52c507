"""One small network around every kind of ``torch.nn`` leaf."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..specimen import InputMaker, Specimen, Zoo, images, sequences, tokens

LAYERS = Zoo()


class Around(nn.Module):
    """A layer between a producer and a consumer, with activations between them."""

    def __init__(self, producer: nn.Module, layer: nn.Module, consumer: nn.Module) -> None:
        super().__init__()
        self.producer, self.layer, self.consumer = producer, layer, consumer

    def forward(self, x: torch.Tensor) -> Any:
        return self.consumer(F.silu(self.layer(F.relu(self.producer(x)))))


def _around(name: str, make: InputMaker, parts: Any, **options: Any) -> None:
    LAYERS.add(Specimen(name, lambda: Around(*parts()), make, **options))


def _between_convs(name: str, layer: Any, after: int = 12) -> None:
    """``layer`` maps 8 channels to ``after`` of them, in a plane."""
    _around(name, images(3, 10, 10), lambda: (nn.Conv2d(3, 8, 3), layer(), nn.Conv2d(after, 4, 3, padding=1)))


conv, transposed = partial(nn.Conv2d, 8, 12, 3), partial(nn.ConvTranspose2d, 8, 12, 3)
_between_convs("conv_valid", conv)
_between_convs("conv_padded", partial(conv, padding=1))
_between_convs("conv_same", partial(conv, padding="same", dilation=2))
_between_convs("conv_strided", partial(conv, stride=2, padding=2))
_between_convs("conv_dilated", partial(conv, dilation=3, padding=2))
_between_convs("conv_oblong", lambda: nn.Conv2d(8, 12, (1, 5), padding=(0, 2)))
_between_convs("conv_reflect", partial(conv, padding=1, padding_mode="reflect"))
_between_convs("conv_replicate", partial(conv, padding=1, padding_mode="replicate"))
_between_convs("conv_circular", partial(conv, padding=1, padding_mode="circular"))
_between_convs("conv_depthwise_padded", lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), 8)
_between_convs("conv_grouped_padded", partial(conv, padding=1, groups=4))
_between_convs("transposed", transposed)
_between_convs("transposed_strided", partial(transposed, stride=2, padding=1, output_padding=1))
_between_convs("transposed_grouped", partial(transposed, stride=2, groups=4))
_between_convs("transposed_pointwise", lambda: nn.ConvTranspose2d(8, 12, 1))
_between_convs("group_norm", lambda: nn.GroupNorm(4, 8), 8)
_between_convs("group_norm_single", lambda: nn.GroupNorm(1, 8), 8)
_between_convs("instance_norm", lambda: nn.InstanceNorm2d(8, affine=True), 8)
_between_convs("instance_norm_tracked", lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), 8)
_between_convs("batch_norm_plain", lambda: nn.BatchNorm2d(8, affine=False), 8)
_between_convs("batch_norm_no_stats", lambda: nn.BatchNorm2d(8, track_running_stats=False), 8)
_between_convs("prelu", lambda: nn.PReLU(8), 8)
_between_convs("prelu_single", nn.PReLU, 8)
_between_convs("avg_pool_padded", lambda: nn.AvgPool2d(3, 2, 1), 8)
_between_convs("avg_pool_uncounted", lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), 8)
_between_convs("max_pool", lambda: nn.MaxPool2d(3, 2, 1), 8)
_between_convs("lp_pool", lambda: nn.LPPool2d(2, 2), 8)
_between_convs("adaptive_max_pool", lambda: nn.AdaptiveMaxPool2d(3), 8)
_between_convs("upsample_nearest", lambda: nn.Upsample(scale_factor=2), 8)
_between_convs("upsample_bilinear", lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), 8)
_between_convs("upsample_bicubic", lambda: nn.Upsample(size=(13, 9), mode="bicubic"), 8)
_between_convs("pad_zero", lambda: nn.ZeroPad2d((1, 2, 0, 1)), 8)
_between_convs("pad_constant", lambda: nn.ConstantPad2d(1, 0.7), 8)
_between_convs("pad_reflect", lambda: nn.ReflectionPad2d(2), 8)
_between_convs("pad_circular", lambda: nn.CircularPad2d(1), 8)
_between_convs("pixel_shuffle", lambda: nn.PixelShuffle(2), 2)
_between_convs("pixel_unshuffle", lambda: nn.PixelUnshuffle(2), 32)
_between_convs("channel_shuffle", lambda: nn.ChannelShuffle(4), 8)
_between_convs("softmax2d", nn.Softmax2d, 8)
_between_convs("local_response_norm", lambda: nn.LocalResponseNorm(3), 8)
_between_convs("dropout", lambda: nn.Sequential(nn.Dropout2d(0.3), nn.AlphaDropout(0.3)), 8)
_between_convs("glu", lambda: nn.GLU(1), 4)
_between_convs("hardtanh", lambda: nn.Sequential(nn.Hardtanh(), nn.ELU(), nn.Softplus(), nn.Mish()), 8)
_around(
    "conv1d",
    images(3, 20),
    lambda: (
        nn.Conv1d(3, 8, 3),
        nn.Sequential(nn.Conv1d(8, 12, 5, stride=2, padding=2), nn.BatchNorm1d(12)),
        nn.Conv1d(12, 4, 1),
    ),
)
_around(
    "conv3d",
    images(2, 6, 6, 6),
    lambda: (
        nn.Conv3d(2, 8, 3),
        nn.Sequential(nn.Conv3d(8, 12, 3, padding=1), nn.BatchNorm3d(12), nn.MaxPool3d(2)),
        nn.Conv3d(12, 4, 1),
    ),
)
_around(
    "transposed1d",
    images(3, 10),
    lambda: (
        nn.Conv1d(3, 8, 3),
        nn.ConvTranspose1d(8, 12, 4, stride=3, padding=1, output_padding=2),
        nn.Conv1d(12, 4, 3),
    ),
)
_around(
    "transposed3d",
    images(2, 4, 4, 4),
    lambda: (nn.Conv3d(2, 8, 1), nn.ConvTranspose3d(8, 6, 2, stride=2), nn.Conv3d(6, 2, 1)),
)
_around(
    "fold_unfold",
    images(3, 8, 8),
    lambda: (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(nn.Unfold(2, stride=2), nn.Fold((8, 8), 2, stride=2)),
        nn.Conv2d(8, 4, 3),
    ),
)
_around(
    "flatten_spatial",
    images(3, 6, 6),
    lambda: (
        nn.Conv2d(3, 8, 3),
        nn.Sequential(nn.Flatten(), nn.Linear(128, 20), nn.Unflatten(1, (5, 4))),
        nn.Linear(4, 3),
    ),
)
_around("layer_norm", images(12), lambda: (nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 4)))
_around("rms_norm", images(12), lambda: (nn.Linear(12, 16), nn.RMSNorm(16), nn.Linear(16, 4)))
_around(
    "layer_norm_sandwich",
    sequences(5, 12),
    lambda: (
        nn.Linear(12, 16),
        nn.Sequential(nn.Linear(16, 20), nn.LayerNorm(20, bias=False), nn.Linear(20, 16)),
        nn.Linear(16, 4),
    ),
    stretches=True,
)
_around("batch_norm_1d", images(12), lambda: (nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)))
_around("sync_batch_norm", images(3, 8, 8), lambda: (nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8), nn.Conv2d(8, 4, 3)))
_around(
    "embedding",
    tokens(20, 6),
    lambda: (FloatEmbedding(), nn.Linear(16, 16), nn.Linear(16, 4)),
    stretches=True,
)


class FloatEmbedding(nn.Module):
    """An embedding with a padding index and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16, padding_idx=0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids) * 4.0


@LAYERS(tokens(20, 6), stretches=True)
class BagOfWords(nn.Module):
    """``nn.EmbeddingBag`` by mean."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.fc1, self.fc2 = nn.EmbeddingBag(20, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(self.bag(ids))))


@LAYERS(images(12))
class BilinearForm(nn.Module):
    """``nn.Bilinear`` of two projections of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 8), nn.Linear(12, 10)
        self.bilinear, self.head = nn.Bilinear(8, 10, 14), nn.Linear(14, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.bilinear(F.relu(self.left(x)), torch.tanh(self.right(x)))))


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones; the head reads its outputs and its last state."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 10)
        self.rnn = kind(10, 14, **options)
        width = 14 * (2 if options.get("bidirectional") else 1)
        self.head, self.state_head = nn.Linear(width, 4), nn.Linear(14, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        out, state = self.rnn(F.relu(self.embed(x)))
        return self.head(out), self.state_head(state[0] if isinstance(state, tuple) else state)


def _recurrent(name: str, kind: type[nn.RNNBase], **options: Any) -> None:
    LAYERS.add(Specimen(name, partial(Recurrent, kind, **options), sequences(5, 12), stretches=True))


_recurrent("rnn", nn.RNN, batch_first=True)
_recurrent("gru", nn.GRU, batch_first=True, num_layers=2)
_recurrent("lstm", nn.LSTM)
_recurrent("lstm_stacked", nn.LSTM, batch_first=True, num_layers=2, bidirectional=True)
_recurrent("lstm_unbiased", nn.LSTM, batch_first=True, bias=False)


@LAYERS(sequences(6, 24), stretches=True)
class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` with ``batch_first``: MultiheadAttention, its fast path, dropouts."""

    def __init__(self, width: int = 24, heads: int = 4, hidden: int = 32) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


@LAYERS(sequences(6, 24), stretches=True)
class TorchAttention(nn.Module):
    """``nn.MultiheadAttention`` as self-attention (fused weights) and cross-attention (separate ones)."""

    def __init__(self, width: int = 24, heads: int = 4, memory: int = 10) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads)
        self.reduce = nn.Linear(width, memory)
        self.cross = nn.MultiheadAttention(width, heads, kdim=memory, vdim=memory, batch_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.transpose(0, 1)
        y = x + self.attention(y, y, y, need_weights=False)[0].transpose(0, 1)
        memory = self.reduce(x)
        return self.head(self.norm(y + self.cross(y, memory, memory)[0]))
