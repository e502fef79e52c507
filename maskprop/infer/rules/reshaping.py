"""Reshapes: which axes are split and merged, and what that makes of tensors and of labels.

A reshape falls apart into groups of axes with as many elements before and after. Within a group, an axis that is split
gives a row of labels an outer and an inner part, and axes that are merged are a row of those:

* split: ``row = outer or inner``; an axis along which the labels merely repeat takes none;
* merge: the same triple the other way round.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels, moved
from maskprop.infer.facts import any_over, broadcast_shape, squash

Shape = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def axis_groups(src: Shape, dst: Shape) -> list[tuple[list[int], list[int]]]:
    """Factor a reshape into the smallest groups of axes with equal products; axes of size 1 are left out."""
    groups: list[tuple[list[int], list[int]]] = []
    left = [i for i, n in enumerate(src) if n != 1]
    right = [j for j, n in enumerate(dst) if n != 1]
    i = j = 0
    while i < len(left) or j < len(right):
        ins, outs = [left[i]], [right[j]]
        a, b = src[left[i]], dst[right[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= src[left[i]]
                ins.append(left[i])
                i += 1
            else:
                b *= dst[right[j]]
                outs.append(right[j])
                j += 1
        groups.append((ins, outs))
    return groups


def reshape(t: Tensor, src: Shape, dst: Shape) -> Tensor:
    """Reshape a broadcastable tensor, expanding only the groups of axes along which it varies."""
    if 0 in src:
        return (
            any_over(t, range(t.ndim)).reshape((1,) * len(dst))
            if t.dtype == torch.bool
            else t.new_zeros((1,) * len(dst))
        )
    sizes, target = [1] * len(src), [1] * len(dst)
    for ins, outs in axis_groups(src, dst):
        if any(t.shape[i] != 1 for i in ins):
            for i in ins:
                sizes[i] = src[i]
            for o in outs:
                target[o] = dst[o]
    return t.expand(sizes).reshape(target)


def folded_back(t: Tensor, src: Shape, dst: Shape) -> Tensor:
    """A reshaped tensor without the axes along which it stopped varying: a batch that had been folded into heads."""
    if t.numel() > 1 and 0 not in src:
        for _, outs in axis_groups(src, dst):
            if len(outs) > 1:
                t = squash(t, outs)
    return t


@functools.lru_cache(maxsize=4096)
def _atoms(src: Shape, dst: Shape) -> Shape:
    """A shape between the two, so that the first half only splits axes and the second only merges them.

    Where the cuts of the two do not nest, the first half merges and the second splits.
    """
    middle: list[int] = []
    for ins, outs in axis_groups(src, dst):
        a, b = _bounds([src[i] for i in ins]), _bounds([dst[o] for o in outs])
        cuts = sorted(set(a) | set(b))
        if all(high % low == 0 for low, high in itertools.pairwise(cuts)):
            sizes = [high // low for low, high in zip([1, *cuts], cuts, strict=False)]
            middle += [n for n in reversed(sizes) if n != 1]
        else:
            middle.append(cuts[-1])
    return tuple(middle)


def _bounds(sizes: Sequence[int]) -> list[int]:
    """Products of the sizes from the right: where the flat order is cut."""
    out, product = [], 1
    for n in reversed(sizes):
        product *= n
        out.append(product)
    return out


def couple_reshape(labels: Labels, src: Shape, dst: Shape, c: Coupling) -> Labels:
    """Labels after a reshape: axes are split into parts that both shapes are made of, and then merged."""
    middle = _atoms(src, dst)
    return _couple_groups(_couple_groups(labels, src, middle, c), middle, dst, c)


def _couple_groups(labels: Labels, src: Shape, dst: Shape, c: Coupling) -> Labels:
    """Labels through a reshape in which every group of axes is either split or merged.

    A merged axis keeps its units in the order of the merged positions. Where the choice along an axis varies along a
    later one (channels of groups, about to be shuffled), what is left would stand in another order: so it may not.
    """
    groups = axis_groups(src, dst)
    labels = list(labels)
    for ins, outs in groups:
        for i, axis in enumerate(ins if len(outs) == 1 else ()):
            labels[axis] = c.uniform(labels[axis], ins[i + 1 :])
    reshaped = [moved(a, lambda t: reshape(t, src, dst)) for a in labels]
    out: Labels = [None] * len(dst)
    splits: list[tuple[Tensor, list[int]]] = []
    for ins, outs in groups:
        if len(ins) == 1:
            rows = reshaped[ins[0]]
            if rows is not None and len(outs) == 1:
                out[outs[0]] = rows
            elif rows is not None:
                splits.append((rows, outs))
        else:
            out[outs[0]] = _merge([(reshaped[i], src[i]) for i in ins], c)
    for rows, outs in splits:
        _split(rows, outs, out, c)
    return out


def _split(rows: Tensor, axes: list[int], out: Labels, c: Coupling) -> None:
    for axis in axes:  # drop the axes along which the labels merely repeat
        first = rows.narrow(axis, 0, 1)
        if rows.shape[axis] > 1 and torch.equal(rows, first.expand_as(rows)):
            rows = first
    varying = [axis for axis in axes if rows.shape[axis] > 1]
    if not varying:
        c.pin(rows, "is one unit repeated over a split axis")
        return
    made = []
    for axis, rest in zip(varying, (varying[i + 1 :] for i in range(len(varying))), strict=True):
        if not rest:
            out[axis] = rows
            break
        outer = c.fresh([1 if i in rest else n for i, n in enumerate(rows.shape)])
        inner = c.fresh(rows.shape)
        c.triple(rows, outer, inner, (rows.shape[axis], math.prod(rows.shape[i] for i in rest)))
        out[axis], rows = outer, inner
        made.append(axis)
    for axis in varying:
        c.regular(out, axis)


def _merge(parts: Sequence[tuple[Tensor | None, int]], c: Coupling) -> Tensor | None:
    """Labels of an axis that is merged out of others, of which the labels and the sizes are given."""
    rows: Tensor | None = None
    count = 1
    for part, size in reversed(parts):
        if part is None:
            continue
        if rows is None:
            rows = part
        else:
            made = c.fresh(broadcast_shape(part.shape, rows.shape))
            c.triple(made, part, rows, (size, count))
            rows = made
        count *= size
    return rows
