"""Recurrent cells, bags, torch attention, transposed convolutions, norms of every kind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import ALL, case, images, tokens, vectors

# Two of six hidden units, in the rows of all four gates, and what then is left.
TWO_OF_SIX = {
    "l.weight_ih_l0": ([0, 1, 6, 7, 12, 13, 18, 19],),
    "l.weight_hh_l0": ([0, 1, 6, 7, 12, 13, 18, 19],),
    "l.bias_ih_l0": ([0, 1, 6, 7, 12, 13, 18, 19],),
    "l.bias_hh_l0": ([0, 1, 6, 7, 12, 13, 18, 19],),
}
TWO_OF_SIX_GONE = {
    "l.weight_ih_l0": (16, 12),
    "l.weight_hh_l0": (16, 4),
    "l.bias_ih_l0": (16,),
    "l.bias_hh_l0": (16,),
    "o.weight": (3, 4),
}

KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@case(
    vectors(1, 12),
    {f"r.{kind}_l0": ([8 * gate + unit for gate in range(4) for unit in (0, 5)],) for kind in KINDS},
    {"r.weight_ih_l0": (24, 12), "r.weight_hh_l0": (24, 6), "r.bias_ih_l0": (24,), "r.bias_hh_l0": (24,)}
    | {"b.weight": (4, 6)},
)
class OneStep(nn.Module):
    """the state that the weights of the state meet is zero at the first step, and there is no other"""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.LSTM(12, 8, batch_first=True)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.r(x)[0])


@case(
    lambda n, g: (torch.randn(n, 5, 12, generator=g), torch.randn(n, 7, 12, generator=g)),
    {"a.in_proj_weight": ([0, 1, 2, 12, 13, 14, 24, 25, 26],), "a.in_proj_bias": ([0, 1, 2, 12, 13, 14, 24, 25, 26],)},
    {"a.in_proj_weight": (27, 12), "a.in_proj_bias": (27,), "a.out_proj.weight": (12, 9)},
)
class MHACross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(12, 4, batch_first=True)

    def forward(self, x, y):
        return self.a(x, y, y)[0]


@case(
    lambda n, g: (torch.randn(n, 5, 12, generator=g), torch.randn(n, 7, 10, generator=g)),
    {
        "a.q_proj_weight": ([0, 1, 2],),
        "a.k_proj_weight": ([0, 1, 2],),
        "a.v_proj_weight": ([0, 1, 2],),
        "a.in_proj_bias": ([0, 1, 2, 12, 13, 14, 24, 25, 26],),
    },
    {
        "a.q_proj_weight": (9, 12),
        "a.k_proj_weight": (9, 10),
        "a.v_proj_weight": (9, 10),
        "a.in_proj_bias": (27,),
        "a.out_proj.weight": (12, 9),
    },
)
class MHAKdim(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(12, 4, batch_first=True, kdim=10, vdim=10)

    def forward(self, x, y):
        return self.a(x, y, y, need_weights=False)[0]


@case(
    vectors(5, 12),
    TWO_OF_SIX,
    TWO_OF_SIX_GONE,
)
class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.LSTM(12, 6, batch_first=True)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.l(x)[0][:, -1])


@case(
    vectors(5, 12),
    TWO_OF_SIX,
    TWO_OF_SIX_GONE,
)
class LstmState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.LSTM(12, 6, batch_first=True)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(1, x.shape[0], self.l.hidden_size)
        c0 = torch.zeros_like(h0)
        _y, (h, _c) = self.l(x, (h0, c0))
        return self.o(h[0])


@case(
    vectors(5, 12),
    {
        "l.weight_ih_l0": ([0, 1, 6, 7, 12, 13, 18, 19],),
        "l.weight_hh_l0": ([0, 1, 6, 7, 12, 13, 18, 19],),
        "l.bias_ih_l0": ([0, 1, 6, 7, 12, 13, 18, 19],),
        "l.bias_hh_l0": ([0, 1, 6, 7, 12, 13, 18, 19],),
        "l.weight_ih_l0_reverse": ([0, 1, 6, 7, 12, 13, 18, 19],),
        "l.weight_hh_l0_reverse": ([0, 1, 6, 7, 12, 13, 18, 19],),
        "l.bias_ih_l0_reverse": ([0, 1, 6, 7, 12, 13, 18, 19],),
        "l.bias_hh_l0_reverse": ([0, 1, 6, 7, 12, 13, 18, 19],),
    },
    {
        "l.weight_ih_l0": (16, 12),
        "l.weight_hh_l0": (16, 4),
        "l.bias_ih_l0": (16,),
        "l.bias_hh_l0": (16,),
        "l.weight_ih_l0_reverse": (16, 12),
        "l.weight_hh_l0_reverse": (16, 4),
        "l.bias_ih_l0_reverse": (16,),
        "l.bias_hh_l0_reverse": (16,),
        "o.weight": (3, 8),
    },
)
class BiLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.LSTM(12, 6, batch_first=True, bidirectional=True)
        self.o = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.l(x)[0].mean(1))


@case(
    vectors(5, 12),
    TWO_OF_SIX,
    {},
)
class BiLstmOneWay(nn.Module):
    """rows of one direction only: hidden sizes must agree"""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.LSTM(12, 6, batch_first=True, bidirectional=True)
        self.o = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.l(x)[0].mean(1))


@case(
    vectors(5, 12),
    {
        "l.weight_ih_l0": ([0, 1, 6, 7, 12, 13],),
        "l.weight_hh_l0": ([0, 1, 6, 7, 12, 13],),
        "l.bias_ih_l0": ([0, 1, 6, 7, 12, 13],),
        "l.bias_hh_l0": ([0, 1, 6, 7, 12, 13],),
    },
    {
        "l.weight_ih_l0": (12, 12),
        "l.weight_hh_l0": (12, 4),
        "l.bias_ih_l0": (12,),
        "l.bias_hh_l0": (12,),
        "o.weight": (3, 4),
    },
)
class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.GRU(12, 6, batch_first=True)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.l(x)[1][0])


@case(
    vectors(5, 12),
    {"l.weight_hr_l0": ([0, 1],)},
    {"l.weight_hh_l0": (24, 2), "l.weight_hr_l0": (2, 6), "o.weight": (3, 2)},
)
class LstmProj(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.LSTM(12, 6, batch_first=True, proj_size=4)
        self.o = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.l(x)[0].mean(1))


@case(
    vectors(12),
    {
        "l.weight_ih": ([0, 1, 6, 7, 12, 13, 18, 19],),
        "l.weight_hh": ([0, 1, 6, 7, 12, 13, 18, 19],),
        "l.bias_ih": ([0, 1, 6, 7, 12, 13, 18, 19],),
        "l.bias_hh": ([0, 1, 6, 7, 12, 13, 18, 19],),
    },
    {"l.weight_ih": (16, 12), "l.weight_hh": (16, 4), "l.bias_ih": (16,), "l.bias_hh": (16,), "o.weight": (3, 4)},
)
class LstmCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.LSTMCell(12, 6)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.l.hidden_size)
        c = h
        for _i in range(3):
            h, c = self.l(x, (h, c))
        return self.o(h)


@case(tokens(20, 6), {"e.weight": (ALL, [0, 1, 2])}, {"e.weight": (20, 5), "o.weight": (3, 5)})
class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.EmbeddingBag(20, 8, mode="sum")
        self.o = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.e(x)))


@case(tokens(20, 6), {"e.weight": (ALL, [0, 1, 2])}, {"e.weight": (20, 5), "o.weight": (3, 5)})
class BagMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.EmbeddingBag(20, 8, mode="mean")
        self.o = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.e(x)))


@case(tokens(20, 6), {"e.weight": (ALL, [0, 1, 2])}, {"e.weight": (20, 5), "o.weight": (3, 5)})
class BagMax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.EmbeddingBag(20, 8, mode="max")
        self.o = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.e(x)))


@case(
    images(4, 5),
    {"c.weight": (ALL, [0]), "c.bias": ([0, 2],)},
    {"c.weight": (6, 1, 3, 3), "c.bias": (2,), "o.weight": (3, 2, 1, 1)},
)
class TransGroupsHead(nn.Module):
    """weight (6, 2, 3, 3) groups 2: column 0 of each group"""

    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Conv2d(4, 6, 1)
        self.c = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.o = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.c(F.relu(self.i(x)))))


@case(
    images(4, 5),
    {"i.weight": ([0, 3],), "i.bias": ([0, 3],)},
    {"i.weight": (4, 4, 1, 1), "i.bias": (4,), "c.weight": (4, 2, 3, 3)},
)
class TransGroupsIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Conv2d(4, 6, 1)
        self.c = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.o = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.c(F.relu(self.i(x)))))


@case(images(4, 5), {"i.weight": ([0, 1, 4, 5],)}, {"i.weight": (6, 4, 1, 1), "i.bias": (6,), "c.weight": (6, 2, 3, 3)})
class TransGroupsConst(nn.Module):
    """constants at a strided transposed grouped conv: a carrier a group"""

    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Conv2d(4, 8, 1)
        self.c = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.o = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.c(torch.sigmoid(self.i(x)))))


@case(images(3, 4), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {})
class LayerNormMulti(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.n = nn.LayerNorm((6, 4, 4))
        self.o = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.n(self.a(x)))


@case(
    images(3, 4),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (4, 3, 1, 1), "a.bias": (4,), "n.weight": (4,), "n.bias": (4,), "o.weight": (3, 4, 1, 1)},
)
class BnNoStats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.n = nn.BatchNorm2d(6, track_running_stats=False)
        self.o = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.n(self.a(x))))


@case(
    images(3, 4),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (4, 3, 1, 1), "a.bias": (4,), "o.weight": (3, 4, 1, 1)},
)
class BnNoAffine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.n = nn.BatchNorm2d(6, affine=False)
        self.o = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.n(self.a(x))))


@case(
    images(3, 4),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (4, 3, 1, 1), "a.bias": (4,), "n.weight": (4,), "n.bias": (4,), "o.weight": (3, 4, 1, 1)},
)
class InStats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.n = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.o = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.n(self.a(x))))


@case(
    images(3, 4),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (4, 3, 1, 1), "a.bias": (4,), "n.weight": (4,), "n.bias": (4,), "o.weight": (3, 4, 1, 1)},
)
class BnNegative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.n = nn.BatchNorm2d(6)
        self.o = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.n(self.a(x))))


@case(
    images(3, 4),
    {"n.weight": ([0, 1],)},
    {"a.weight": (4, 3, 3, 3), "a.bias": (4,), "n.weight": (4,), "n.bias": (4,), "o.weight": (3, 4, 1, 1)},
)
class BnZeroWeight(nn.Module):
    """only the batch norm's weight is masked: bias is a constant"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.n = nn.BatchNorm2d(6)
        self.o = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.n(self.a(x))))
