"""Random calls of every op that has a closed-form rule: shapes and arguments, drawn from a ``random.Random``."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from rule_check import Arg, Call, Case, Shape, Smaller
from torch._ops import OpOverload

aten = torch.ops.aten
Draw = Callable[[random.Random], Case]
CASES: dict[OpOverload, Draw] = {}


def case(*targets: OpOverload) -> Callable[[Callable[[random.Random, OpOverload], Case]], Any]:
    """Register how calls of these overloads are drawn."""

    def add(draw: Callable[[random.Random, OpOverload], Case]) -> Any:
        for target in targets:
            assert target not in CASES, target
            CASES[target] = lambda r, target=target: draw(r, target)
        return draw

    return add


def shape(r: random.Random, low: int = 0, high: int = 4, most: int = 4) -> Shape:
    return tuple(r.randint(1, most) for _ in range(r.randint(low, high)))


def partner(r: random.Random, full: Shape) -> Shape:
    """A shape that broadcasts to ``full``."""
    other = tuple(1 if r.random() < 0.3 else n for n in full)
    return other[r.randint(0, len(other)) :] if r.random() < 0.3 else other


def sizes(n: int, r: random.Random, low: int, high: int) -> list[int]:
    return [r.randint(low, high) for _ in range(n)]


def given(tensor: torch.Tensor) -> Arg:
    """An input that is always this one."""
    return Arg(tuple(tensor.shape), "given", content=tensor)


def shrunk(target: OpOverload, kwargs: dict[str, Any], args: Callable[[Smaller], tuple[Any, ...]]) -> Any:
    """A ``shrink`` that makes the positional arguments from the smaller shapes."""

    def shrink(now: Smaller) -> Call:
        return target, args(now), kwargs

    return shrink


# -- pointwise ----------------------------------------------------------------------------------


@case(aten.tril.default, aten.triu.default)
def triangle(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r, 2)), r.randint(-2, 2)))


@case(
    aten.relu.default, aten.gelu.default, aten.tanh.default, aten.sigmoid.default, aten.silu.default, aten.exp.default,
    aten.neg.default, aten.hardswish.default, aten.abs.default, aten.sign.default, aten.floor.default,
)  # fmt: skip
def unary(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r)),))


@case(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)
def affine(r: random.Random, target: OpOverload) -> Case:
    full = shape(r)
    kwargs = {"alpha": r.choice([1, 0.5])}
    return Case(target, (Arg(full), Arg(partner(r, full))), kwargs, exact=True)


@case(aten.mul.Tensor, aten.maximum.default, aten.gt.Tensor, aten.pow.Tensor_Tensor, aten.complex.default)
def binary(r: random.Random, target: OpOverload) -> Case:
    full = shape(r)
    args = [Arg(full), Arg(partner(r, full))]
    r.shuffle(args)
    return Case(target, tuple(args))


@case(aten.mul.Scalar, aten.div.Scalar, aten.pow.Tensor_Scalar, aten.clamp_min.default)
def with_number(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r)), r.choice([2, 0.5, 3])))


@case(aten.div.Tensor, aten.div.Tensor_mode, aten.floor_divide.default)
def divide(r: random.Random, target: OpOverload) -> Case:
    full = shape(r)
    kwargs = {"rounding_mode": r.choice([None, "floor", "trunc"])} if target is aten.div.Tensor_mode else {}
    return Case(target, (Arg(full), Arg(partner(r, full), "divisor")), kwargs)


@case(aten.where.self)
def where(r: random.Random, target: OpOverload) -> Case:
    full = shape(r)
    return Case(target, (Arg(partner(r, full), "bool"), Arg(full), Arg(partner(r, full))))


@case(aten.masked_fill.Scalar)
def masked_fill(r: random.Random, target: OpOverload) -> Case:
    full = shape(r)
    return Case(target, (Arg(full), Arg(partner(r, full), "bool"), r.choice([0, -2.5])))


@case(aten.masked_fill.Tensor)
def masked_fill_tensor(r: random.Random, target: OpOverload) -> Case:
    full = shape(r)
    return Case(target, (Arg(full), Arg(partner(r, full), "bool"), Arg(())))


@case(aten.addcmul.default)
def addcmul(r: random.Random, target: OpOverload) -> Case:
    full = shape(r)
    return Case(target, (Arg(full), Arg(partner(r, full)), Arg(partner(r, full))), {"value": 0.5})


@case(aten._prelu_kernel.default)
def prelu(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 2, 4)
    weight = (1, full[1] if r.random() < 0.7 else 1, *[1] * (len(full) - 2))
    return Case(target, (Arg(full), Arg(weight)))


@case(aten._to_copy.default)
def to_copy(r: random.Random, target: OpOverload) -> Case:
    role = r.choice(["value", "bool"])
    return Case(target, (Arg(shape(r), role),), {"dtype": torch.float64 if role == "bool" else None})


@case(torch.ops.prims.convert_element_type.default)
def convert(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r), r.choice(["value", "bool"])), torch.float64))


@case(aten.fill.Tensor)
def fill_tensor(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r)), Arg(())), exact=True)


@case(aten.copy.default)
def copy(r: random.Random, target: OpOverload) -> Case:
    full = shape(r)
    return Case(target, (Arg(full), Arg(partner(r, full))), exact=True)


@case(aten.zeros.default, aten.ones.default)
def made(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (list(shape(r)),), {"dtype": torch.float64})


@case(aten.full.default)
def full(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (list(shape(r)), 1.5), {"dtype": torch.float64})


@case(aten.scalar_tensor.default)
def scalar(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (1.5,), {"dtype": torch.float64})


@case(aten.zeros_like.default, aten.ones_like.default, aten.zero.default)
def like(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r)),), exact=True)


@case(aten.full_like.default, aten.fill.Scalar)
def filled(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r)), 1.5), exact=True)


@case(aten.new_zeros.default, aten.new_ones.default)
def new(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r)), list(shape(r))))


@case(aten.new_full.default)
def new_full(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r)), list(shape(r)), 1.5))


@case(aten.glu.default)
def glu(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dim = r.randrange(len(full))
    return Case(target, (Arg((*full[:dim], 2 * full[dim], *full[dim + 1 :])), r.choice([dim, dim - len(full)])))


# -- contractions -------------------------------------------------------------------------------


def _operand(r: random.Random, full: Shape, name: str) -> Arg:
    """A parameter, or an activation: how many terms are summed is then another number for other inputs, maybe."""
    return Arg(full, "weight", name=name) if r.random() < 0.6 else Arg(full)


@case(aten.mm.default)
def mm(r: random.Random, target: OpOverload) -> Case:
    m, k, n = sizes(3, r, 1, 5)
    right = _operand(r, (k, n), "weight")
    return Case(target, (Arg((m, k)), right), exact=bool(right.name))


@case(aten.addmm.default)
def addmm(r: random.Random, target: OpOverload) -> Case:
    m, k, n = sizes(3, r, 1, 5)
    bias = Arg((n,), "weight", name="bias") if r.random() < 0.6 else Arg(partner(r, (m, n)))
    kwargs = {"alpha": 0.5, "beta": 2} if r.random() < 0.3 else {}
    right = _operand(r, (k, n), "weight")
    return Case(target, (bias, Arg((m, k)), right), kwargs, exact=bool(right.name))


@case(aten.bmm.default)
def bmm(r: random.Random, target: OpOverload) -> Case:
    b, m, k, n = sizes(4, r, 1, 4)
    left, right = Arg((b, m, k), r.choice(["value", "rows"])), _operand(r, (b, k, n), "weight")
    return Case(target, (left, right), exact=left.role == "value" and bool(right.name))


@case(aten.baddbmm.default)
def baddbmm(r: random.Random, target: OpOverload) -> Case:
    b, m, k, n = sizes(4, r, 1, 4)
    bias = tuple(1 if r.random() < 0.3 else size for size in (b, m, n))
    right = _operand(r, (b, k, n), "weight")
    return Case(target, (Arg(bias), Arg((b, m, k)), right), {"beta": 0.5}, exact=bool(right.name))


@case(aten.mv.default)
def mv(r: random.Random, target: OpOverload) -> Case:
    m, k = sizes(2, r, 1, 5)
    right = _operand(r, (k,), "weight")
    return Case(target, (Arg((m, k)), right), exact=bool(right.name))


@case(aten.addmv.default)
def addmv(r: random.Random, target: OpOverload) -> Case:
    m, k = sizes(2, r, 1, 5)
    kwargs = {"alpha": 0.5, "beta": 2} if r.random() < 0.3 else {}
    right = _operand(r, (k,), "weight")
    return Case(target, (Arg((m,)), Arg((m, k)), right), kwargs, exact=bool(right.name))


@case(aten.dot.default, aten.vdot.default)
def dot(r: random.Random, target: OpOverload) -> Case:
    k = r.randint(1, 5)
    right = _operand(r, (k,), "weight")
    return Case(target, (Arg((k,)), right), exact=bool(right.name))


@case(aten.convolution.default)
def convolution(r: random.Random, target: OpOverload) -> Case:
    n, groups = r.randint(1, 2), r.choice([1, 1, 2, 3])
    into, out = groups * r.randint(1, 3), groups * r.randint(1, 3)
    transposed = r.random() < 0.3
    kernel, padding, stride, dilation = (
        sizes(n, r, 1, 3),
        sizes(n, r, 0, 1),
        sizes(n, r, 1, 2),
        sizes(n, r, 1, 2),
    )
    padding = [min(p, k - 1) for p, k in zip(padding, kernel, strict=True)]
    space = [d * (k - 1) + r.randint(1, 3) for d, k in zip(dilation, kernel, strict=True)]
    rows, columns = (into, out // groups) if transposed else (out, into // groups)
    weight = Arg((rows, columns, *kernel), "weight", name="weight")
    bias = Arg((out,), "weight", name="bias") if r.random() < 0.6 else None
    rest = (stride, padding, dilation, transposed, [0] * n)

    def args(now: Smaller) -> tuple[Any, ...]:
        return (
            Arg(()),
            Arg(()),
            bias,
            *rest,
            (now.outs[0][1] if transposed else now.ins[0][1]) // now.ins[1][1],
        )

    x = Arg((r.randint(1, 2), into, *space))
    return Case(target, (x, weight, bias, *rest, groups), shrink=shrunk(target, {}, args))


# -- movement -----------------------------------------------------------------------------------


@case(
    aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh.default, aten.lift_fresh_copy.default,
    aten.contiguous.default,
)  # fmt: skip
def same(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r)),), exact=True, tight=target is not aten.detach.default)


@case(aten.dropout.default)
def dropout(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r)), 0.5, False), exact=True, tight=True)


@case(aten.permute.default)
def permute(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dims = list(range(len(full)))
    r.shuffle(dims)
    return Case(target, (Arg(full), [d - len(full) if r.random() < 0.3 else d for d in dims]), exact=True, tight=True)


@case(aten.transpose.int)
def transpose(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), r.randrange(len(full)), -1), exact=True, tight=True)


@case(aten.t.default)
def t(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r, 0, 2)),), exact=True, tight=True)


@case(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default)
def view(r: random.Random, target: OpOverload) -> Case:
    factors = [r.choice([1, 2, 2, 3]) for _ in range(r.randint(1, 5))]

    def joined() -> Shape:
        cuts = sorted(r.sample(range(1, len(factors)), r.randint(0, len(factors) - 1)))
        return tuple(math.prod(factors[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True))

    def args(now: Smaller) -> tuple[Any, ...]:
        return Arg(()), list(now.outs[0])

    source, to = joined(), joined()
    strides = [[math.prod(to[i + 1 :]) for i in range(len(to))]] if target is aten._reshape_alias.default else []
    smaller = shrunk(aten.view.default, {}, args)
    return Case(target, (Arg(source), list(to), *strides), shrink=smaller, exact=True, tight=not strides)


@case(aten.unsqueeze.default)
def unsqueeze(r: random.Random, target: OpOverload) -> Case:
    full = shape(r)
    return Case(target, (Arg(full), r.randint(-len(full) - 1, len(full))), exact=True, tight=True)


@case(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1, most=2)
    args: dict[Any, tuple[Any, ...]] = {
        aten.squeeze.dim: (r.randrange(-len(full), len(full)),),
        aten.squeeze.dims: (r.sample(range(len(full)), r.randint(1, len(full))),),
    }
    # an axis that shrinks to one unit stays an axis: the replay refuses a model that squeezes it away
    as_view = shrunk(aten.view.default, {}, lambda now: (Arg(()), list(now.outs[0])))
    return Case(target, (Arg(full), *args.get(target, ())), shrink=as_view, exact=True, tight=True)


@case(aten.expand.default)
def expand(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    source = tuple(1 if r.random() < 0.4 else n for n in full)[r.randint(0, len(full) - 1) :]

    def args(now: Smaller) -> tuple[Any, ...]:
        return Arg(()), list(now.outs[0])

    return Case(target, (Arg(source), list(full)), shrink=shrunk(target, {}, args), exact=True, tight=True)


def _bounds(r: random.Random, n: int) -> tuple[int | None, int | None, int]:
    start, stop = r.choice([None, r.randrange(-n, n)]), r.choice([None, r.randint(-n, n), 2**63 - 1])
    return start, stop, r.choice([1, 1, 2])


def _following(bounds: tuple[int | None, int | None, int], kept: list[bool]) -> tuple[int, int, int]:
    """A slice of what stays that takes what stays of the slice."""
    start, stop, step = slice(*bounds).indices(len(kept))
    return sum(kept[:start]), sum(kept[: max(start, stop)]), step


@case(aten.slice.Tensor)
def slice_(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1, most=6)
    dim = r.randrange(len(full))
    bounds = _bounds(r, full[dim])

    def args(now: Smaller) -> tuple[Any, ...]:
        return Arg(()), dim, *_following(bounds, now.kept[0][dim])

    start, stop, _ = slice(*bounds).indices(full[dim])
    filled = start < stop  # of what is empty the rule claims less: it may hold something for another input
    return Case(target, (Arg(full), dim, *bounds), shrink=shrunk(target, {}, args), exact=filled, tight=filled)


@case(aten.select.int)
def select(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dim = r.randrange(len(full))
    return Case(target, (Arg(full), dim, r.randrange(-full[dim], full[dim])), exact=True, tight=True)


@case(aten.roll.default)
def roll(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dims = r.sample(range(len(full)), r.randint(1, len(full)))
    return Case(target, (Arg(full), [r.randint(-2, 2) for _ in dims], dims), exact=True, tight=True)


@case(aten.flip.default)
def flip(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), r.sample(range(len(full)), r.randint(1, len(full)))), exact=True, tight=True)


@case(aten.unbind.int)
def unbind(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), r.randrange(len(full))), exact=True, tight=True)


def _splits(r: random.Random) -> tuple[Shape, int, list[int]]:
    full = shape(r, 1)
    dim = r.randrange(len(full))
    parts = [r.randint(1, 3)] * r.randint(1, 4) if r.random() < 0.6 else sizes(r.randint(1, 4), r, 1, 3)
    return (*full[:dim], sum(parts), *full[dim + 1 :]), dim, parts


def _by_sizes(dim: int) -> Any:
    def args(now: Smaller) -> tuple[Any, ...]:
        return Arg(()), [o[dim] for o in now.outs], dim

    return shrunk(aten.split_with_sizes.default, {}, args)


@case(aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default)
def split_with_sizes(r: random.Random, target: OpOverload) -> Case:
    full, dim, parts = _splits(r)
    return Case(target, (Arg(full), parts, dim), shrink=_by_sizes(dim), exact=True, tight=True)


@case(aten.split.Tensor, aten.unsafe_split.Tensor, aten.chunk.default, aten.unsafe_chunk.default)
def split(r: random.Random, target: OpOverload) -> Case:
    full, dim, _ = _splits(r)
    return Case(target, (Arg(full), r.randint(1, 4), dim), shrink=_by_sizes(dim), exact=True, tight=True)


# -- joining ------------------------------------------------------------------------------------


@case(aten.cat.default)
def cat(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dim = r.randrange(len(full))
    parts = [Arg((*full[:dim], r.randint(1, 4), *full[dim + 1 :])) for _ in range(r.randint(1, 3))]
    return Case(target, (parts, r.choice([dim, dim - len(full)])), exact=True, tight=True)


@case(aten.stack.default)
def stack(r: random.Random, target: OpOverload) -> Case:
    full = shape(r)
    return Case(
        target,
        ([Arg(full) for _ in range(r.randint(1, 3))], r.randint(-1, len(full))),
        exact=True,
        tight=True,
    )


@case(aten.repeat.default)
def repeat(r: random.Random, target: OpOverload) -> Case:
    full = shape(r)
    return Case(target, (Arg(full), sizes(len(full) + r.randint(0, 1), r, 1, 3)), exact=True, tight=True)


@case(aten.slice_scatter.default)
def slice_scatter(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1, most=6)
    dim = r.randrange(len(full))
    bounds = _bounds(r, full[dim])
    source = (*full[:dim], len(range(full[dim])[slice(*bounds)]), *full[dim + 1 :])

    def args(now: Smaller) -> tuple[Any, ...]:
        return Arg(()), Arg(()), dim, *_following(bounds, now.kept[0][dim])

    x = Arg(full), Arg(source)
    return Case(target, (*x, dim, *bounds), shrink=shrunk(target, {}, args), exact=True, tight=True)


@case(aten.select_scatter.default)
def select_scatter(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dim = r.randrange(len(full))
    source = (*full[:dim], *full[dim + 1 :])
    return Case(target, (Arg(full), Arg(source), dim, r.randrange(-full[dim], full[dim])), exact=True, tight=True)


@case(aten.embedding.default)
def embedding(r: random.Random, target: OpOverload) -> Case:
    rows, columns = sizes(2, r, 1, 5)
    return Case(target, (Arg((rows, columns), "weight", name="weight"), Arg(shape(r, 0, 2), "index", rows)))


@case(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    where = sorted(r.sample(range(len(full)), r.randint(1, len(full))))
    to = shape(r, 0, 2)
    indices = [Arg(to, "index", full[d]) if d in where else None for d in range(max(where) + 1)]
    return Case(target, (Arg(full), indices))


@case(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def embedding_bag(r: random.Random, target: OpOverload) -> Case:
    rows, columns, bags = sizes(3, r, 2, 4)
    offsets = given(torch.arange(bags) * 2)
    args = (Arg((rows, columns), "weight", name="weight"), Arg((2 * bags,), "index", rows), offsets)
    return Case(target, (*args, False, r.randint(0, 2)))


@case(
    aten.scatter.src, aten.scatter_add.default, aten.scatter.value, aten.scatter.reduce, aten.scatter.value_reduce,
    aten.scatter_reduce.two,
)  # fmt: skip
def scatter(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dim = r.randrange(-len(full), len(full))
    written = tuple(r.randint(1, n) if r.random() < 0.3 else n for n in full)
    index = tuple(r.randint(1, n) if r.random() < 0.2 else n for n in written)
    src: tuple[Any, ...] = (r.choice([0.0, 1.5]),) if "value" in target._overloadname else (Arg(written),)
    how: dict[str, Any] = {"reduce": r.choice(["add", "multiply"])} if "reduce" in target._overloadname else {}
    if target is aten.scatter_reduce.two:
        src, how = (Arg(written), r.choice(["sum", "prod", "mean", "amax", "amin"])), {"include_self": r.random() < 0.5}
    # an index may name a place once only, or which value is written last is not defined
    once = target in (aten.scatter.src, aten.scatter.value)
    return Case(
        target, (Arg(full), dim, _places(r, index, dim, full) if once else Arg(index, "index", full[dim]), *src), how
    )


def _places(r: random.Random, index: Shape, dim: int, full: Shape) -> Arg:
    """Other places along an axis at each position of the others."""
    draw = torch.Generator().manual_seed(r.getrandbits(32))
    count = list(index)
    count[dim] = full[dim]
    return given(torch.rand(count, generator=draw).argsort(dim).narrow(dim, 0, index[dim]))


@case(aten.index_fill.int_Scalar)
def index_fill(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dim = r.randrange(-len(full), len(full))
    index = given(torch.tensor([r.randrange(full[dim]) for _ in range(r.randint(0, 3))], dtype=torch.int64))
    return Case(target, (Arg(full), dim, index, r.choice([0, 0, 1.5])))


@case(aten.index_add.default, aten.index_copy.default)
def index_write(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dim = r.randrange(-len(full), len(full))
    count = r.randint(1, full[dim])
    written = list(full)
    written[dim] = count
    return Case(target, (Arg(full), dim, given(torch.tensor(r.sample(range(full[dim]), count))), Arg(tuple(written))))


@case(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    where = sorted(r.sample(range(len(full)), r.randint(1, len(full))))
    count = r.randint(1, min(full[d] for d in where))
    index = [torch.tensor(r.sample(range(full[d]), count)) if d in where else None for d in range(max(where) + 1)]
    if r.random() < 0.3:
        index, where, count = [torch.arange(full[0]) % 2 == 0], [0], -(-full[0] // 2)
    if r.random() < 0.3:
        mask = Arg(full[: r.randint(1, len(full))], "bool")
        return Case(target, (Arg(full), [mask], Arg(r.choice([(), (1,)])), r.random() < 0.5))
    written = torch.empty(full)[tuple(slice(None) if i is None else i for i in index)].shape
    indices = [None if i is None else given(i) for i in index]
    return Case(target, (Arg(full), indices, Arg(partner(r, tuple(written))), r.random() < 0.5))


@case(aten._fft_c2c.default, aten._fft_c2r.default)
def complex_transform(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dims = r.sample(range(len(full)), r.randint(1, len(full)))
    last = r.choice([True, False]) if target is aten._fft_c2c.default else full[dims[-1]]
    return Case(target, (Arg(full, "complex"), dims, 0, last))


@case(aten._fft_r2c.default)
def real_transform(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), r.sample(range(len(full)), r.randint(1, len(full))), 0, r.random() < 0.5))


@case(aten.view_as_real.default)
def as_real(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r), "complex"),))


@case(aten.view_as_complex.default)
def as_complex(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg((*shape(r), 2)),))


@case(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sample(r: random.Random, target: OpOverload) -> Case:
    n = _rank(target)
    x = _image(r, n)
    grid = Arg((x[0], *sizes(n, r, 1, 3), n))
    return Case(target, (Arg(x), grid, r.randint(0, 1), r.randint(0, 2), r.random() < 0.5))


@case(aten.max_unpool2d.default, aten.max_unpool3d.default)
def max_unpool(r: random.Random, target: OpOverload) -> Case:
    n = _rank(target)
    x = _image(r, n, 2)
    space = [2 * size for size in x[2:]]
    places = _places(r, (*x[:2], math.prod(x[2:])), 2, (*x[:2], math.prod(space))).content
    assert places is not None
    places = given(places.reshape(x))
    more = () if n == 2 else ([2] * n, [0] * n)
    return Case(target, (Arg(x), places, space, *more))


@case(aten.index_select.default)
def index_select(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dim = r.randrange(-len(full), len(full))
    return Case(target, (Arg(full), dim, Arg((r.randint(1, 4),), "index", full[dim])))


@case(aten.gather.default)
def gather(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dim = r.randrange(-len(full), len(full))
    to = tuple(r.randint(1, 4) if i == dim % len(full) else r.choice([n, r.randint(1, n)]) for i, n in enumerate(full))
    return Case(target, (Arg(full), dim, Arg(to, "index", full[dim])))


# -- norms --------------------------------------------------------------------------------------


def _affine(r: random.Random, full: Shape) -> tuple[Arg | None, Arg | None]:
    weight = Arg(full, "weight", name="weight") if r.random() < 0.8 else None
    return weight, Arg(full, "weight", name="bias") if r.random() < 0.8 else None


def _channels(r: random.Random, low: int = 2) -> Shape:
    return r.randint(1, 2), r.randint(1, 5), *sizes(r.randint(low - 2, 2), r, 2, 3)


@case(aten.native_batch_norm.default)
def batch_norm(r: random.Random, target: OpOverload) -> Case:
    full = _channels(r)
    weight, bias = _affine(r, full[1:2])
    stats = Arg(full[1:2], "positive", name="running_mean"), Arg(full[1:2], "positive", name="running_var")
    training = r.random() < 0.3 and full[0] > 1
    return Case(target, (Arg(full), weight, bias, *(stats if not training else (None, None)), training, 0.1, 1e-5))


@case(aten._native_batch_norm_legit_no_training.default)
def batch_norm_no_training(r: random.Random, target: OpOverload) -> Case:
    full = _channels(r)
    stats = Arg(full[1:2], "positive", name="running_mean"), Arg(full[1:2], "positive", name="running_var")
    return Case(target, (Arg(full), *_affine(r, full[1:2]), *stats, 0.1, 1e-5))


@case(aten._native_batch_norm_legit.no_stats)
def batch_norm_no_stats(r: random.Random, target: OpOverload) -> Case:
    full = (2, *_channels(r)[1:])
    return Case(target, (Arg(full), *_affine(r, full[1:2]), True, 0.1, 1e-5))


@case(aten._native_batch_norm_legit.default)
def batch_norm_legit(r: random.Random, target: OpOverload) -> Case:
    full = _channels(r)
    stats = Arg(full[1:2], "positive", name="running_mean"), Arg(full[1:2], "positive", name="running_var")
    return Case(target, (Arg(full), *_affine(r, full[1:2]), *stats, False, 0.1, 1e-5))


@case(aten.native_group_norm.default)
def group_norm(r: random.Random, target: OpOverload) -> Case:
    groups, per = sizes(2, r, 1, 3)
    batch, space = r.randint(1, 2), sizes(r.randint(0, 2), r, 2, 3)
    full = (batch, groups * per, *space)
    weight, bias = _affine(r, (groups * per,))

    def args(now: Smaller) -> tuple[Any, ...]:
        return (
            Arg(()),
            weight,
            bias,
            now.ins[0][0],
            now.ins[0][1],
            math.prod(space),
            now.ins[0][1] // per,
            1e-5,
        )

    shrink = shrunk(target, {}, args)
    return Case(target, (Arg(full), weight, bias, batch, groups * per, math.prod(space), groups, 1e-5), shrink=shrink)


@case(aten.native_layer_norm.default)
def layer_norm(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    normalized = full[r.randrange(len(full)) :]
    return Case(target, (Arg(full), list(normalized), *_affine(r, normalized), 1e-5))


@case(aten._fused_rms_norm.default)
def rms_norm(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    normalized = full[r.randrange(len(full)) :]
    return Case(target, (Arg(full), list(normalized), _affine(r, normalized)[0], 1e-5))


@case(aten._softmax.default, aten._log_softmax.default)
def softmax(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), r.randrange(-len(full), len(full)), False))


@case(aten._safe_softmax.default)
def safe_softmax(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), r.randrange(-len(full), len(full))))


# -- reductions ---------------------------------------------------------------------------------


@case(
    aten.sum.default, aten.mean.default, aten.any.default, aten.all.default, aten.max.default, aten.min.default,
)  # fmt: skip
def reduce_all(r: random.Random, target: OpOverload) -> Case:
    return Case(target, (Arg(shape(r), "bool" if target in (aten.any.default, aten.all.default) else "value"),))


def _some_dims(r: random.Random, full: Shape) -> list[int]:
    dims = r.sample(range(len(full)), r.randint(0, len(full)))
    return [d - len(full) if r.random() < 0.3 else d for d in dims]


@case(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.any.dims, aten.all.dims)
def reduce_dims(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    role = "bool" if target in (aten.any.dims, aten.all.dims) else "value"
    dims = _some_dims(r, full) or [0]
    return Case(target, (Arg(full, role), dims, r.random() < 0.5))


@case(aten.logsumexp.default)
def logsumexp(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), _some_dims(r, full) or [0], r.random() < 0.5))


@case(aten.var.dim)
def var_dim(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), _some_dims(r, full) or [0], False, r.random() < 0.5))


@case(aten.var.correction, aten.var_mean.correction, aten.std.correction)
def variance(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), _some_dims(r, full) or None), {"correction": 0, "keepdim": r.random() < 0.5})


@case(aten.linalg_vector_norm.default)
def vector_norm(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    order = r.choice([2, 1, 3.5, math.inf, 0, -1, -math.inf])
    return Case(target, (Arg(full), order, _some_dims(r, full) or None, r.random() < 0.5))


@case(aten.norm.ScalarOpt_dim)
def norm(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), r.choice([None, 2, 1, math.inf, 0, -1, -math.inf]), _some_dims(r, full) or [0]))


@case(aten.any.dim, aten.all.dim)
def reduce_bool(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full, "bool"), r.randrange(-len(full), len(full)), r.random() < 0.5))


@case(aten.prod.dim_int, aten.max.dim, aten.min.dim, aten.median.dim)
def reduce_dim(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), r.randrange(-len(full), len(full)), r.random() < 0.5))


@case(aten.argmax.default, aten.argmin.default)
def argmax(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), r.choice([None, r.randrange(-len(full), len(full))]), False))


@case(aten.count_nonzero.dim_IntList)
def count_nonzero(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), _some_dims(r, full) or [0]))


@case(aten.sort.default, aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default)
@case(aten.cummax.default, aten.cummin.default)
def scan(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), r.randrange(-len(full), len(full))))


@case(aten.topk.default)
def topk(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dim = r.randrange(-len(full), len(full))
    return Case(target, (Arg(full), r.randint(1, full[dim]), dim))


# -- space --------------------------------------------------------------------------------------


def _image(r: random.Random, n: int, low: int = 3) -> Shape:
    return (*sizes(2, r, 1, 4), *sizes(n, r, low, 5))


@case(
    aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default, aten.max_pool1d.default,
        aten.max_pool2d.default,
    aten.max_pool3d.default,
)  # fmt: skip
def max_pool(r: random.Random, target: OpOverload) -> Case:
    n = int(target.name()[target.name().index("d") - 1]) if False else _rank(target)
    return Case(target, (Arg(_image(r, n)), [2] * n, [r.randint(1, 2)] * n, [r.randint(0, 1)] * n))


@case(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(r: random.Random, target: OpOverload) -> Case:
    n = _rank(target)
    padding, ceil, counts = [r.randint(0, 1)] * n, r.random() < 0.3, r.random() < 0.5
    return Case(target, (Arg(_image(r, n)), [r.randint(2, 3)] * n, [r.randint(1, 2)] * n, padding, ceil, counts))


@case(aten.adaptive_avg_pool1d.default, aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default)
@case(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive(r: random.Random, target: OpOverload) -> Case:
    n = _rank(target)
    return Case(target, (Arg(_image(r, n)), sizes(n, r, 1, 3)))


@case(aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_nearest3d.default)
@case(aten._upsample_nearest_exact2d.default)
def nearest(r: random.Random, target: OpOverload) -> Case:
    n = _rank(target)
    return Case(target, (Arg(_image(r, n)), sizes(n, r, 2, 6)))


@case(aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default, aten.upsample_linear1d.default)
@case(
    aten.upsample_trilinear3d.default,
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bicubic2d_aa.default,
)
def interpolate(r: random.Random, target: OpOverload) -> Case:
    n = _rank(target)
    return Case(target, (Arg(_image(r, n)), sizes(n, r, 2, 6), r.random() < 0.5))


@case(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
@case(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)
def pad(r: random.Random, target: OpOverload) -> Case:
    n = _rank(target)
    return Case(target, (Arg(_image(r, n)), sizes(2 * n, r, 0, 2)))


@case(aten.constant_pad_nd.default)
def constant_pad(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    return Case(target, (Arg(full), sizes(2 * r.randint(1, len(full)), r, 0, 2), r.choice([0, 0, 1.5])))


def _rank(target: OpOverload) -> int:
    return next(n for n in (1, 2, 3) if f"{n}d" in target.name())


def _windows(r: random.Random) -> tuple[list[list[int]], list[int], int]:
    """Kernel, dilation, padding, stride; height and width; how many windows fit."""
    kernel, dilation, padding, stride = (
        sizes(2, r, 1, 2),
        sizes(2, r, 1, 2),
        sizes(2, r, 0, 1),
        sizes(2, r, 1, 2),
    )
    space = [d * (k - 1) + r.randint(1, 2) for d, k in zip(dilation, kernel, strict=True)]
    fit = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, d, p, s in zip(space, kernel, dilation, padding, stride, strict=True)
    ]
    return [kernel, dilation, padding, stride], space, math.prod(fit)


@case(aten.unfold.default)
def windows(r: random.Random, target: OpOverload) -> Case:
    full = shape(r, 1)
    dim = r.randrange(-len(full), len(full))
    return Case(target, (Arg(full), dim, r.randint(1, full[dim]), r.randint(1, 2)), exact=True)


@case(aten.im2col.default)
def im2col(r: random.Random, target: OpOverload) -> Case:
    how, space, _ = _windows(r)
    return Case(target, (Arg((*sizes(2, r, 1, 3), *space)), *how))


@case(aten.col2im.default)
def col2im(r: random.Random, target: OpOverload) -> Case:
    how, space, count = _windows(r)
    batch, channels = sizes(2, r, 1, 3)
    return Case(target, (Arg((batch, channels * math.prod(how[0]), count)), space, *how))
