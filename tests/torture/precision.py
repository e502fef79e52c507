"""Mixed precision, numbers of every kind, lists as inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import case, vectors


@case(
    vectors(64),
    {
        "a.weight": (
            [
                0,
                1,
                2,
                3,
                4,
                5,
                6,
                7,
                8,
                9,
                10,
                11,
                12,
                13,
                14,
                15,
                16,
                17,
                18,
                19,
                20,
                21,
                22,
                23,
                24,
                25,
                26,
                27,
                28,
                29,
                30,
                31,
                32,
                33,
                34,
                35,
                36,
                37,
                38,
                39,
                40,
                41,
                42,
                43,
                44,
                45,
                46,
                47,
                48,
                49,
                50,
                51,
                52,
                53,
                54,
                55,
                56,
                57,
                58,
                59,
            ],
        ),
        "b.weight": (
            [
                0,
                2,
                4,
                6,
                8,
                10,
                12,
                14,
                16,
                18,
                20,
                22,
                24,
                26,
                28,
                30,
                32,
                34,
                36,
                38,
                40,
                42,
                44,
                46,
                48,
                50,
                52,
                54,
                56,
                58,
                60,
                62,
                64,
                66,
                68,
                70,
                72,
                74,
                76,
                78,
                80,
                82,
                84,
                86,
                88,
                90,
                92,
                94,
                96,
                98,
                100,
                102,
                104,
                106,
                108,
                110,
                112,
                114,
                116,
                118,
                120,
                122,
                124,
                126,
                128,
                130,
                132,
                134,
                136,
                138,
                140,
                142,
                144,
                146,
                148,
                150,
                152,
                154,
                156,
                158,
                160,
                162,
                164,
                166,
                168,
                170,
                172,
                174,
                176,
                178,
                180,
                182,
                184,
                186,
                188,
                190,
                192,
                194,
                196,
                198,
            ],
        ),
    },
    {"a.weight": (196, 64), "a.bias": (196,), "b.weight": (156, 196), "b.bias": (156,), "c.weight": (4, 156)},
    tol=0.03,
)
class AutocastWide(nn.Module):
    """bf16 inside, float32 outside: only rounding differs"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 256)
        self.b = nn.Linear(256, 256)
        self.c = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = F.gelu(self.b(torch.sigmoid(self.a(x))))
        return self.c(h.float())


@case(
    vectors(64),
    {
        "a.weight": (
            [
                0,
                1,
                2,
                3,
                4,
                5,
                6,
                7,
                8,
                9,
                10,
                11,
                12,
                13,
                14,
                15,
                16,
                17,
                18,
                19,
                20,
                21,
                22,
                23,
                24,
                25,
                26,
                27,
                28,
                29,
                30,
                31,
                32,
                33,
                34,
                35,
                36,
                37,
                38,
                39,
                40,
                41,
                42,
                43,
                44,
                45,
                46,
                47,
                48,
                49,
                50,
                51,
                52,
                53,
                54,
                55,
                56,
                57,
                58,
                59,
            ],
        )
    },
    {"a.weight": (196, 64), "a.bias": (196,), "b.weight": (16, 196)},
    tol=0.03,
)
class F64Out(nn.Module):
    """float32 inside, float64 outside"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 256)
        self.b = nn.Linear(256, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sigmoid(self.a(x))).double()


@case(
    lambda n, g: (
        [torch.randn(n, 12, generator=g), torch.randn(n, 12, generator=g)],
        {"k": torch.randn(n, 8, generator=g)},
        {},
    ),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (4, 6)},
)
class ListIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, xs, d):
        return self.b(sum(F.relu(self.a(x)) for x in xs))


@case(
    vectors(12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (4, 6)}
)
class SumPow(nn.Module):
    """x**0 = 1 of zeros; 0/0"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h**0 + h / (h.sum(1, keepdim=True) + 1))


@case(
    vectors(12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (4, 6)}
)
class DivZero(nn.Module):
    """the divisor is a pruned unit's zero, guarded by where"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(torch.where(h > 0, 1 / h.clamp(min=0.001), torch.zeros_like(h)))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)},
)
class L2Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h / (h.pow(2).sum(-1, keepdim=True).sqrt() + 1e-06))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)},
)
class Trilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(torch.baddbmm(h, h, h.transpose(1, 2) @ h, beta=0.5, alpha=0.1))
