"""Scores: how much a unit matters. The lowest are pruned.

A score is any function of a :class:`~maskprop.pruning.groups.Group` that returns one number a part,
``(parts,)``. The
classes here score the weights that produce a unit, and are one of

* a saliency an element, summed over a unit's elements: L1, L2, Wanda, Fisher, OBD;
* a measure of a unit as a whole: FPGM, LAMP, batch norm scale, Taylor, activations, random.

Coupled producers (the convolutions of a residual stage) are brought together by ``reduce``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskprop.errors import OptionError, ScoreError
from maskprop.pruning.groups import Group, Member
from maskprop.pruning.statistics import Statistics

ScoreFunction = Callable[[Group], Tensor]

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda t: t.mean(0),
    "sum": lambda t: t.sum(0),
    "max": lambda t: t.amax(0),
    "min": lambda t: t.amin(0),
    "prod": lambda t: t.clamp_min(0).log().mean(0).exp(),  # geometric mean: a product would only change the scale
    "first": lambda t: t[0],
}


def _standard(t: Tensor) -> Tensor:
    return (t - t.mean()) / t.std(correction=0).clamp_min(1e-12)


_NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda t: t,
    "mean": lambda t: t / t.mean().abs().clamp_min(1e-12),
    "max": lambda t: t / t.abs().amax().clamp_min(1e-12),
    "sum": lambda t: t / t.sum().abs().clamp_min(1e-12),
    "l2": lambda t: t / t.norm().clamp_min(1e-12),
    "standard": _standard,
    "rank": lambda t: t.argsort().argsort().to(t.dtype) / len(t),
}


class Score(ABC):
    """Base of scores: one value a producing member, brought together over the members of a group.

    Args:
        reduce: over a group's members: ``"mean"``, ``"sum"``, ``"max"``, ``"min"``, ``"prod"`` (geometric
        mean),
            ``"first"``.
        normalize: of a group's scores, which makes groups comparable: ``"none"``, ``"mean"``, ``"max"``,
        ``"sum"``,
            ``"l2"``, ``"standard"``, ``"rank"``.
        members: ``"producers"`` scores the rows that make a unit, ``"all"`` the columns that read it too.

    Attributes:
        needs: statistics that must be collected from data before groups are scored; see
            :class:`~maskprop.pruning.statistics.Statistics`.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, reduce: str = "mean", normalize: str = "none", members: str = "producers") -> None:
        for value, known, what in (
            (reduce, _REDUCTIONS, "reduce"),
            (normalize, _NORMALIZERS, "normalize"),
            (members, ("producers", "all"), "members"),
        ):
            if value not in known:
                raise OptionError(f"{what} is {value!r}; expected one of {', '.join(map(repr, known))}.")
        self.reduce, self.normalize, self.members = reduce, normalize, members
        self.statistics: Statistics | None = None

    def __call__(self, group: Group) -> Tensor:
        """Scores of a group's parts, float64 ``(parts,)``."""
        scores = [found.double() for m in self._members(group) if (found := self.member(group, m)) is not None]
        if not scores:
            raise ScoreError(
                f"{type(self).__name__} finds nothing to score in group '{group.name}'. Exclude the "
                "group, or use another score."
            )
        return _NORMALIZERS[self.normalize](_REDUCTIONS[self.reduce](torch.stack(scores)))

    def _members(self, group: Group) -> Sequence[Member]:
        if self.members == "all":
            return [m for m in group.members if m.units.ndim > 1] or group.members
        return group.producers

    @abstractmethod
    def member(self, group: Group, member: Member) -> Tensor | None:
        """Scores of the parts by one member, or ``None`` if it has no say."""

    def data(self) -> Statistics:
        """The collected statistics.

        Raises:
            ScoreError: nothing was collected.
        """
        if self.statistics is None or not self.statistics.batches:
            raise ScoreError(
                f"{type(self).__name__} is computed from data and has seen none. Give the pruner `data` "
                "(batches) and, for gradients, `loss`."
            )
        return self.statistics


class L1(Score):
    """Sum of absolute weights (Li et al., Pruning Filters for Efficient ConvNets, 2017, arXiv:1608.08710)."""

    def member(self, group: Group, member: Member) -> Tensor:
        """The L1 norms."""
        rows = group.rows(member).abs()
        return rows.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))


class L2(Score):
    """Euclidean norm of the weights (He et al., Soft Filter Pruning, 2018, arXiv:1808.06866)."""

    def member(self, group: Group, member: Member) -> Tensor:
        """The L2 norms."""
        rows = group.rows(member)
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
        return norms


class FPGM(Score):
    """Sum of distances to the other units (He et al., FPGM, 2019, arXiv:1811.00250)."""

    def member(self, group: Group, member: Member) -> Tensor:
        """The sums of distances."""
        rows = group.rows(member).double()
        distances: Tensor = torch.cdist(rows, rows)
        return distances.sum(1)


class LAMP(Score):
    """``|w|^2 / sum of |w'|^2`` over units at least as large (Lee et al., 2021, arXiv:2010.07611)."""

    def member(self, group: Group, member: Member) -> Tensor:
        """The LAMP scores."""
        squares = group.rows(member).double().square().sum(1)
        order = squares.argsort()
        survivors = squares[order].flip(0).cumsum(0).flip(0).clamp_min(1e-300)
        return torch.empty_like(squares).scatter_(0, order, squares[order] / survivors)


class Random(Score):
    """Uniform random scores, the baseline; with a generator of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, group: Group) -> Tensor:
        """New random scores."""
        return torch.rand(group.parts, generator=self.generator, dtype=torch.float64)

    def member(self, group: Group, member: Member) -> Tensor | None:
        """Nothing: whole groups are scored."""
        return None


class BatchNormScale(Score):
    """``|gamma|`` of the batch norms (Liu et al., Network Slimming, 2017, arXiv:1708.06519)."""

    def _members(self, group: Group) -> Sequence[Member]:
        return [
            m
            for m in group.members
            if not m.consumes and issubclass(m.module, nn.modules.batchnorm._NormBase) and m.name.endswith("weight")
        ]

    def member(self, group: Group, member: Member) -> Tensor:
        """The scales."""
        return group.rows(member).abs().double().sum(1)


class Taylor(Score):
    """``E[(sum of w * g)^2]`` over batches (Molchanov et al., 2019, arXiv:1906.10771).

    The sum is over the parameters nearest to the activation, see :attr:`Group.gates`: to first order, the change of
    the loss when the unit falls silent. Give small batches: of a trained model the gradients of a large one cancel.
    """

    needs = frozenset({"taylor"})

    def _members(self, group: Group) -> Sequence[Member]:
        return [members[0] for members in group.gates.values()]

    def member(self, group: Group, member: Member) -> Tensor | None:
        """The expected squares."""
        return self.data().mean_of("taylor", f"{group.name}|{member.path}")


class Fisher(Score):
    """``sum of w^2 * E[g^2]``, the empirical Fisher's diagonal (Theis et al., 2018, arXiv:1801.05787)."""

    needs = frozenset({"squared_gradient"})

    def member(self, group: Group, member: Member) -> Tensor | None:
        """Weights by squared gradients."""
        squares = self.data().mean_of("squared_gradient", member.name)
        return None if squares is None else group.rows(member, group.tensor(member).double().square() * squares).sum(1)


class OBD(Score):
    """``sum of w^2 * h / 2``, h the Hessian's diagonal (LeCun et al., Optimal Brain Damage, 1989).

    h is Hutchinson's estimate ``E[v * (H v)]`` with random signs v (Yao et al., 2021, arXiv:2006.00719). It is noisy:
    with few signs the noise decides. Each costs a backward pass.

    Args:
        reduce, normalize, members: see :class:`Score`.
        probes: vectors of signs a batch.
    """

    def __init__(
        self, reduce: str = "mean", normalize: str = "none", members: str = "producers", probes: int = 8
    ) -> None:
        super().__init__(reduce, normalize, members)
        self.probes = probes

    needs = frozenset({"hessian"})

    def member(self, group: Group, member: Member) -> Tensor | None:
        """Weights by the diagonal."""
        diagonal = self.data().mean_of("hessian", member.name)
        return (
            None
            if diagonal is None
            else group.rows(member, group.tensor(member).double().square() * diagonal / 2).sum(1)
        )


class Wanda(Score):
    """``sum of |w_ij| * |x_j|`` with the input's L2 norm (Sun et al., Wanda, 2024, arXiv:2306.11695)."""

    needs = frozenset({"input_norm"})

    def member(self, group: Group, member: Member) -> Tensor | None:
        """Weights by input norms."""
        squares, weight = self.data().mean_of("input_norm", member.path), group.tensor(member).double()
        if squares is None or weight.ndim < 2:
            return None
        columns = weight.shape[1]
        if len(squares) != columns:  # grouped convolution: rows of group g read its own columns
            groups = len(squares) // columns
            norms = (
                squares.sqrt()
                .reshape(groups, 1, columns)
                .expand(-1, weight.shape[0] // groups, -1)
                .reshape(weight.shape[0], columns)
            )
        else:
            norms = squares.sqrt().reshape(1, columns)
        return group.rows(member, weight.abs() * norms.reshape(*norms.shape, *[1] * (weight.ndim - 2))).sum(1)


class _Activation(Score):
    """A statistic of a unit's activation, as the modules that read the unit get it.

    That is behind every norm, sum and activation function in between. Where no module reads it (or which is not
    known), it is taken at the output of the modules that make the unit. ``activation`` is applied in either case.
    """

    statistic = ""

    def __init__(
        self, reduce: str = "mean", normalize: str = "none", activation: Callable[[Tensor], Tensor] = F.relu
    ) -> None:
        super().__init__(reduce, normalize)
        self.activation = activation

    def _members(self, group: Group) -> Sequence[Member]:
        read = [m for m in group.members if m.consumes and self._channels(m) is not None]
        made = [m for m in group.members if not m.consumes and m.axis == 0 and m.name.endswith("weight")]
        norms = [
            m for m in made if issubclass(m.module, nn.modules.batchnorm._NormBase)
        ]  # the last before the activation
        return read or norms or made

    def _channels(self, member: Member) -> Tensor | None:
        """The statistic along the member's axis, of the member's dimensions."""
        found = self.data().mean_of(self.statistic, f"{'read' if member.consumes else 'made'}|{member.path}")
        if found is None or len(found) != member.units.numel():
            return None
        return found.reshape(member.units.shape)

    def member(self, group: Group, member: Member) -> Tensor | None:
        """The mean of the statistic over a unit's channels."""
        found = self._channels(member)
        return None if found is None else member.rows(found, group.parts).mean(1)


class ActivationMean(_Activation):
    """Mean activation (Molchanov et al., Pruning CNNs, 2017, arXiv:1611.06440)."""

    needs = frozenset({"activation_mean"})
    statistic = "activation_mean"


class ActivationAPoZ(_Activation):
    """Share of activations that are not zero (Hu et al., Network Trimming, 2016, arXiv:1607.03250)."""

    needs = frozenset({"activation_nonzero"})
    statistic = "activation_nonzero"


def checked(score: ScoreFunction, group: Group) -> Tensor:
    """Scores of a group, float64 on the CPU.

    Raises:
        ScoreError: not one finite number a part.
    """
    found = score(group)
    name = getattr(score, "__name__", type(score).__name__)
    if hasattr(score, "__self__"):  # a pruner's method
        name = f"{type(score.__self__).__name__}.{name}"
    if not isinstance(found, Tensor) or tuple(found.shape) != (group.parts,):
        came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ScoreError(
            f"score '{name}' returned {came} for group '{group.name}'; expected a tensor of shape "
            f"({group.parts},), one number a part."
        )
    found = found.detach().double().cpu()
    bad = ~found.isfinite()
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ScoreError(
            f"score '{name}' of group '{group.name}' is {float(found[first])} at part {first} "
            f"({int(bad.sum())} of {group.parts} are not finite). "
            "Look for nan or infinity in the weights or in the data."
        )
    return found
