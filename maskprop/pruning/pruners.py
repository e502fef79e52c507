"""The pruners by name: NNI's, each on coupled groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maskprop.errors import OptionError, RatioError, SelectorError
from maskprop.pruning import scores
from maskprop.pruning.choose import choose
from maskprop.pruning.config import Config
from maskprop.pruning.groups import Group
from maskprop.pruning.masking import apply_masks, named_weights
from maskprop.pruning.pruner import Pruner
from maskprop.pruning.removal import NestedMasks, remove
from maskprop.rewrite.edits import tensor_of


class L1NormPruner(Pruner):
    """The units with the smallest L1 norm; see :class:`~maskprop.pruning.scores.L1`."""

    default_score = scores.L1


class L2NormPruner(Pruner):
    """The units with the smallest L2 norm; see :class:`~maskprop.pruning.scores.L2`."""

    default_score = scores.L2


class FPGMPruner(Pruner):
    """The units nearest to the others; see :class:`~maskprop.pruning.scores.FPGM`."""

    default_score = scores.FPGM


class RandomPruner(Pruner):
    """Random units; see :class:`~maskprop.pruning.scores.Random`."""

    default_score = scores.Random


class LAMPPruner(Pruner):
    """The units with the smallest LAMP score; see :class:`~maskprop.pruning.scores.LAMP`."""

    default_score = scores.LAMP


class TaylorPruner(Pruner):
    """The units whose removal changes the loss least, to first order; needs ``data`` and ``loss``."""

    default_score = scores.Taylor


TaylorFOWeightPruner = TaylorPruner  # NNI 2


class FisherPruner(Pruner):
    """The units with the smallest squared gradients; needs ``data`` and ``loss``."""

    default_score = scores.Fisher


class OBDPruner(Pruner):
    """The units whose removal changes the loss least, to second order; needs ``data`` and ``loss``."""

    default_score = scores.OBD


class WandaPruner(Pruner):
    """The units with the smallest weights times inputs; needs ``data``."""

    default_score = scores.Wanda


class ActivationAPoZRankPruner(Pruner):
    """The units that are most often zero after the activation; needs ``data``."""

    default_score = scores.ActivationAPoZ


class ActivationMeanRankPruner(Pruner):
    """The units with the smallest mean activation; needs ``data``."""

    default_score = scores.ActivationMean


class SlimPruner(Pruner):
    """The units with the smallest batch norm scale; all compete by default.

    Args:
        *args: see :class:`Pruner`.
        regular_scale: weight of the regulariser, which a training loop adds to its loss:
            ``loss = criterion(...) + pruner.penalty()``.
        **options: see :class:`Pruner`.
    """

    default_score = scores.BatchNormScale
    default_types = (nn.modules.batchnorm._NormBase,)

    def __init__(self, *args: Any, regular_scale: float = 1e-4, **options: Any) -> None:
        options.setdefault("ranking", "global")
        super().__init__(*args, **options)
        norms = {name: (group, rule) for name, (group, rule) in self.plan.items() if self._norms(group)}
        if self.plan and not norms:
            raise SelectorError(
                f"SlimPruner scores by batch norms, and none of the {len(self.plan)} groups that are named has one. "
                "Give dummy_input, so that the batch norms behind convolutions are known, or use another pruner."
            )
        self.plan = norms
        self.regular_scale = regular_scale

    def _norms(self, group: Group) -> list[str]:
        return [m.name for m in scores.BatchNormScale()._members(group)]

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """With an NNI evaluator: train with the regulariser."""
        if self.evaluator is not None:
            steps = self.training_steps if max_steps is None and max_epochs is None else max_steps
            self.evaluator.train(self.model, steps, max_epochs, penalty=self.penalty)

    def penalty(self) -> Tensor:
        """``regular_scale * sum of |gamma|`` over the batch norms of the groups to prune."""
        weights = named_weights(self.model)
        names = dict.fromkeys(n for g, _ in self.plan.values() for n in self._norms(g))
        return self.regular_scale * torch.cat([weights[n].abs().flatten() for n in names]).sum()


class LevelPruner(Pruner):
    """The single weights of smallest size: unstructured, so only units that are zero as a whole leave.

    The ratio is that of each weight of the modules that the configuration names, biases excluded; with
    ``ranking="global"`` all weights compete.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.budget is not None:
            raise OptionError(
                "LevelPruner prunes single weights, of which few leave: it takes no budget. Give a ratio."
            )
        self._masks: NestedMasks = {}

    def update(self, scale: float = 1.0) -> NestedMasks:
        """Masks of the smallest weights as they are now."""
        self._masks = self._weight_masks(scale)
        return self._masks

    def attach(self) -> None:
        """Put masks of ones on every weight that may be pruned."""
        apply_masks(
            self.model,
            {name: torch.ones_like(w, dtype=torch.bool) for name, (w, *_) in self._chosen().items()},
        )

    @property
    def masks(self) -> NestedMasks:
        """The masks chosen last."""
        return self._masks

    def _chosen(self) -> dict[str, tuple[Tensor, float, str | None]]:
        """Absolute weights, ratio and pool by parameter name."""
        chosen: dict[str, tuple[Tensor, float, str | None]] = {}
        for path, module in self.model.named_modules():
            rule = self.selection.rules.get(path)
            if (
                rule is None
                or path in self.selection.excluded
                or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding))
            ):
                continue
            if rule.ratio is None:
                raise RatioError(f"LevelPruner prunes by 'sparse_ratio'; the entry that names '{path}' has none.")
            chosen[f"{path}.weight".lstrip(".")] = (
                tensor_of(module, "weight").detach().abs(),
                rule.ratio,
                rule.pool,
            )
        if not chosen:
            raise OptionError(
                "LevelPruner finds no weight to prune: the configuration names no Linear, convolution or Embedding."
            )
        return chosen

    def _weight_masks(self, scale: float) -> NestedMasks:
        chosen = self._chosen()
        pools: dict[str, list[str]] = {}
        for name, (_, _, pool) in chosen.items():
            pools.setdefault(f"pool {pool}" if pool else name, []).append(name)
        masks: NestedMasks = {}
        for names in pools.values():
            values = torch.cat([chosen[n][0].reshape(-1).double().cpu() for n in names])
            count = int(sum(chosen[n][1] * scale * chosen[n][0].numel() for n in names) + 1e-9)
            keep = torch.ones(len(values), dtype=torch.bool)
            keep[values.argsort(stable=True)[:count]] = False
            for name, part in zip(names, keep.split([chosen[n][0].numel() for n in names]), strict=True):
                path, _, key = name.rpartition(".")
                weight = chosen[name][0]
                masks.setdefault(path, {})[key] = part.reshape(weight.shape).to(weight.device)
        return masks


class ADMMPruner(Pruner):
    """Weights drawn towards pruned ones while they train (Zhang et al., ADMM, 2018, arXiv:1804.03294).

    With W the weights, Z their projection and U the scaled dual: the training loop adds :meth:`penalty` to
    its loss,
    ``rho / 2 * |W - Z + U|^2``, and calls :meth:`step` once an iteration (an epoch, say): ``Z = project(W +
    U)``,
    ``U += W - Z``. :meth:`compress` then prunes by the L2 norm.

    With an NNI evaluator :meth:`compress` does all of that.

    Args:
        model, config, evaluator, options: see :class:`Pruner`.
        iterations: with an evaluator, how often it trains and projects.
        training_epochs: with an evaluator, epochs an iteration.
        rho: weight of the penalty.
    """

    default_score = scores.L2

    def __init__(
        self,
        model: nn.Module,
        config: Config = 0.5,
        evaluator: Any = None,
        iterations: int = 1,
        training_epochs: int | None = None,
        *,
        rho: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(model, config, evaluator, **options)
        self.rho, self.iterations, self.training_epochs = rho, iterations, training_epochs
        names = dict.fromkeys(m.name for g, _ in self.plan.values() for m in g.producers)
        self._dual = {n: torch.zeros_like(named_weights(model=self.model)[n]) for n in names}
        self._target = {n: named_weights(self.model)[n].detach().clone() for n in names}

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """With an NNI evaluator: iterate, each time for so long."""
        steps = self.training_steps if max_steps is None else max_steps
        epochs = self.training_epochs if max_epochs is None else max_epochs
        for _ in range(self.iterations if self.evaluator is not None else 0):
            self.evaluator.train(self.model, steps, epochs, penalty=self.penalty)
            self.step()

    def penalty(self) -> Tensor:
        """``rho / 2 * sum of |W - Z + U|^2``, to be added to the loss."""
        weights = named_weights(self.model)
        terms = [(weights[n] - self._target[n] + self._dual[n]).square().sum() for n in self._target]
        return self.rho / 2 * torch.stack(terms).sum()

    def step(self) -> None:
        """Project and update the dual variables."""
        weights = named_weights(self.model)
        sums = {n: weights[n].detach() + self._dual[n] for n in self._target}
        masks = self._project(sums)
        for name, total in sums.items():
            path, _, key = name.rpartition(".")
            mask = masks.get(path, {}).get(key)
            self._target[name] = total if mask is None else total * mask.to(total)
            self._dual[name] = total - self._target[name]

    def _project(self, weights: dict[str, Tensor]) -> NestedMasks:
        """Masks of the units with the smallest norms of ``W + U``."""
        found = {
            name: torch.stack([group.rows(m, weights[m.name]).double().norm(dim=1) for m in group.producers])
            .mean(0)
            .cpu()
            for name, (group, _) in self.plan.items()
        }
        return remove(self.groups, choose(self.plan, found, self.limits)).masks

    def state_dict(self) -> dict[str, Any]:
        """The dual variables and what the weights are drawn to."""
        return {**super().state_dict(), "dual": self._dual, "target": self._target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Pruner.load_state_dict`."""
        super().load_state_dict(state)
        self._dual, self._target = dict(state["dual"]), dict(state["target"])
