"""The base of all pruners: a configuration and a score in, masks out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maskprop.errors import OptionError
from maskprop.pruning.budget import Budget, fit
from maskprop.pruning.choose import Limits, choose
from maskprop.pruning.config import Config, Pattern, Rule, Selection, select
from maskprop.pruning.discover import prunable_groups
from maskprop.pruning.groups import Group, Groups
from maskprop.pruning.local import local_groups
from maskprop.pruning.masking import applied_masks, apply_masks, refuse_masks, remove_masks
from maskprop.pruning.removal import NestedMasks, Removal, forecast, remove
from maskprop.pruning.scores import Score, ScoreFunction, checked
from maskprop.pruning.statistics import Loss, Statistics, collect

log = logging.getLogger(__name__)


class Pruner:
    """Chooses the units of a model that matter least.

    A pruner of one's own overrides :meth:`score`, or passes ``score=`` a function of a group.

    Args:
        model: to prune. Only :meth:`compress` changes it, by putting masks on.
        config: a ratio, ``{"layer*.conv1": 0.3}`` (or modules as keys), or NNI's ``config_list``.
        evaluator: a :class:`~maskprop.pruning.nni.TorchEvaluator`, for scripts written for NNI; else
        ``None``.
        training_steps: batches that a data-driven score sees; all of ``data`` by default.
        dummy_input: as for :class:`maskprop.ModelSpeedup`. Without it each module is a group of its own: the
            masks are right, but coupled modules do not agree on units, so that less of the model leaves.
        groups: groups found before, for this model; instead of ``dummy_input``.
        data: batches for a data-driven score, in any form that ``loss`` takes.
        loss: ``loss(model, batch)``, for gradients.
        score: overrides the pruner's own.
        ignore: globs over modules and groups, or modules, that are never pruned.
        ranking: ``"local"``, ``"global"`` or ``"isomorphic"``; see :func:`~maskprop.pruning.config.select`.
        granularity: of the groups to take; by default channels and whole heads.
        channel_multiple: of an axis that shrinks, a multiple of so many elements stays.
        min_units: so many units of a group stay.
        budget: prune no further than until the forecast is within it; the ratios of ``config`` then only say how much
            one group is pruned beside another.

    Raises:
        SelectorError: the configuration names what does not exist.
        RatioError: a ratio is outside [0, 1).
        MaskingError: there are masks on the model.
    """

    default_score: type[Score] | None = None
    default_types: tuple[type, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        config: Config = 0.5,
        evaluator: Any = None,
        training_steps: int | None = None,
        *,
        dummy_input: Any = None,
        groups: Groups | None = None,
        data: Iterable[Any] | None = None,
        loss: Loss | None = None,
        score: ScoreFunction | None = None,
        ignore: Pattern | Iterable[Pattern] = (),
        ranking: str = "local",
        granularity: str | Sequence[str] | None = None,
        channel_multiple: int = 1,
        min_units: int = 1,
        budget: Budget | None = None,
    ) -> None:
        refuse_masks(model)
        self.model = model
        self.budget = budget
        self.limits = Limits(channel_multiple, min_units)
        if groups is None and dummy_input is None:
            groups = getattr(config, "groups", None)  # NNI's helper has found them
        if groups is not None and groups.model is not model:
            raise OptionError(
                "the groups are another model's. Find them with prunable_groups(model, dummy_input) for this one."
            )
        if dummy_input is None and evaluator is not None:
            dummy_input = evaluator.dummy_input
        if groups is None:
            groups = local_groups(model) if dummy_input is None else prunable_groups(model, dummy_input)
        self.groups = groups
        self.evaluator, self.training_steps = evaluator, training_steps
        self.dataset, self.loss = data, loss
        self._score: ScoreFunction | None = score or (self.default_score() if self.default_score is not None else None)
        self.selection: Selection = select(
            model,
            groups,
            config,
            ignore=ignore,
            granularity=granularity,
            ranking=ranking,
            default_types=self.default_types if groups.structure is None else (),
        )
        found = ((g, self.selection.rule_of(g)) for g in groups)
        self.plan: dict[str, tuple[Group, Rule]] = {g.name: (g, rule) for g, rule in found if rule is not None}
        self.removal: Removal | None = None
        self.together = False  # a schedule is called in every process; each may have seen data of its own

    # -- what a pruner of one's own overrides ---------------------------------------------------

    def score(self, group: Group) -> Tensor:
        """How much each part of a group matters, ``(parts,)``; the lowest go."""
        if self._score is None:
            raise OptionError(f"{type(self).__name__} has no score: override `score(group)`, or pass score=.")
        return self._score(group)

    def calibrate(self) -> None:
        """Collect what the score needs from data. Called before scores are computed."""
        score = self._score
        if not isinstance(score, Score) or not score.needs:
            return
        chosen = [g for g, _ in self.plan.values()]
        options = {name: getattr(score, name) for name in ("activation", "probes") if hasattr(score, name)}
        if self.evaluator is not None and self.dataset is None:
            score.statistics = self.evaluator.collect(self.model, chosen, score.needs, self.training_steps, **options)
        elif self.dataset is not None:
            score.statistics = collect(
                self.model, chosen, score.needs, self.dataset, self.loss, self.training_steps, **options
            )
        else:
            score.statistics = Statistics()  # says what is missing when it is read

    # -- use ------------------------------------------------------------------------------------

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, NestedMasks]:
        """Choose the units and put the masks on the model, where they stay while it trains.

        Args:
            max_steps: with an NNI evaluator, how long to train first where the method asks for it.
            max_epochs: likewise.

        Returns:
            The model, and masks for :class:`maskprop.ModelSpeedup`; call :meth:`unwrap_model` before that.

        Raises:
            ScoreError: the score has no data, or is not one finite number a part. Nothing is changed.
        """
        self.train(max_steps, max_epochs)
        masks = self.update()
        if masks:
            apply_masks(self.model, masks)
        return self.model, masks

    def update(self, scale: float = 1.0) -> NestedMasks:
        """Choose anew without touching the model, and return the masks; ``scale`` as in :meth:`prune`."""
        return self.prune(scale).masks

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Train before pruning, where the method asks for it and an NNI evaluator can; else nothing."""

    def prune(self, scale: float = 1.0) -> Removal:
        """Choose the units, without touching the model.

        Args:
            scale: of all ratios, or of the way to the budget. What was pruned before stays pruned.

        Raises:
            RatioError: the budget is out of reach.
            GroupError: there is a budget and no dummy input, or the model is not the one any more whose groups were
                found.
        """
        self.groups.check()
        if not self.plan:
            log.warning(
                "%s prunes nothing: no group is made by the modules that the configuration names. Outputs are never "
                "pruned, and without dummy_input only each module's own parameters are known.",
                type(self).__name__,
            )
        self.calibrate()
        before = self.removal.parts if self.removal is not None else {}
        scores = {name: checked(self.score, group) for name, (group, _) in self.plan.items()}
        if self.together and dist.is_available() and dist.is_initialized():
            scores = {name: _mean_over_processes(score, self.model) for name, score in scores.items()}
        for name, gone in before.items():
            scores[name] = scores[name].masked_fill(gone, -torch.inf)
        self.removal = remove(self.groups, self._choose(scores, scale))
        log.info("%s keeps %s", type(self).__name__, self.removal.kept)
        return self.removal

    def _choose(self, scores: Mapping[str, Tensor], scale: float) -> Mapping[str, Tensor]:
        if self.budget is None:
            return choose(self.plan, scores, self.limits, scale)
        ratios = [rule.ratio for _, rule in self.plan.values() if rule.ratio]
        return fit(
            self.budget.allowed(forecast(self.groups, {}), scale),
            lambda s: choose(self.plan, scores, self.limits, s),
            lambda chosen: forecast(self.groups, chosen),
            1 / min(ratios, default=1.0),
        )

    @property
    def masks(self) -> NestedMasks:
        """The masks chosen last, ``{module: {parameter: mask}}``."""
        return {} if self.removal is None else self.removal.masks

    def unwrap_model(self, bake: bool = True) -> nn.Module:
        """Take the masks off again, leaving zeros (or, with ``bake=False``, what was hidden)."""
        remove_masks(self.model, bake=bake)
        return self.model

    _unwrap_model = unwrap_model  # NNI 2

    def wrap_model(self) -> nn.Module:
        """Put the chosen masks on again."""
        if self.masks:
            apply_masks(self.model, self.masks)
        return self.model

    def attach(self) -> None:
        """Put masks of ones on everything that may be pruned, so that later changes only write to them."""
        ones = {
            f"{m.path}.{m.name.rpartition('.')[2]}".lstrip("."): torch.ones(
                _mask_shape(self.plan, m.name), dtype=torch.bool, device=g.tensor(m).device
            )
            for g, _ in self.plan.values()
            for m in g.members
            if not m.consumes
        }
        apply_masks(self.model, ones | applied_masks(self.model))

    def state_dict(self) -> dict[str, Any]:
        """What was chosen, to go on later; the masks themselves are in the model's ``state_dict``."""
        return {"parts": {} if self.removal is None else self.removal.parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with a pruner that was made alike."""
        self.removal = remove(self.groups, state["parts"]) if state["parts"] else None

    def get_masks(self) -> NestedMasks:
        """NNI's name for :attr:`masks`."""
        return self.masks

    def show_pruned_weights(self) -> dict[str, float]:
        """NNI 2: what share of each masked parameter is pruned; logged, too."""
        shares = {
            f"{path}.{key}".lstrip("."): 1 - float(mask.double().mean())
            for path, own in self.masks.items()
            for key, mask in own.items()
        }
        for name, share in shares.items():
            log.info("%s: %.1f%% pruned", name, 100 * share)
        return shares


def _mean_over_processes(score: Tensor, model: nn.Module) -> Tensor:
    """What all processes of ``torch.distributed`` choose by."""
    device = next((p.device for p in model.parameters()), score.device)
    total = score.to(device)  # backends sum where the model is
    dist.all_reduce(total)
    return total.cpu() / dist.get_world_size()


def _mask_shape(plan: Mapping[str, tuple[Group, Rule]], name: str) -> tuple[int, ...]:
    """Shape of the mask when all of the plan's groups have a say in it."""
    shapes = [tuple(m.units.shape) for g, _ in plan.values() for m in g.members if m.name == name]
    return tuple(torch.broadcast_shapes(*shapes))
