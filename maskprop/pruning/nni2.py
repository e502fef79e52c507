"""NNI 2's signatures: ``from maskprop.pruning.nni2 import ...`` in place of ``nni.compression.pytorch.pruning``.

Until version 2.8 pruners took ``(model, config_list, trainer, traced_optimizer, criterion, ...)``, from 2.9 on
``(model, config_list, evaluator, ...)``; both are read. The iterative pruners made the pruner themselves and called
the user's ``finetuner``. All of it ends in the pruners and schedules of :mod:`maskprop.pruning`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, ClassVar

from torch import nn

from maskprop.errors import OptionError
from maskprop.graph.trace import split_inputs
from maskprop.pruning import nni, pruners, schedule
from maskprop.pruning.config import Config
from maskprop.pruning.masking import remove_masks
from maskprop.pruning.movement import MovementPruner as _MovementPruner
from maskprop.pruning.nni import trace
from maskprop.pruning.pruner import Pruner
from maskprop.pruning.pruners import LevelPruner
from maskprop.pruning.removal import NestedMasks
from maskprop.pruning.structure import measure
from maskprop.speedup import ModelSpeedup

__all__ = [
    "ADMMPruner",
    "AGPPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankPruner",
    "FPGMPruner",
    "L1NormPruner",
    "L2NormPruner",
    "LevelPruner",
    "LinearPruner",
    "LotteryTicketPruner",
    "ModelSpeedup",
    "MovementPruner",
    "SlimPruner",
    "TaylorFOWeightPruner",
    "TorchEvaluator",
    "count_flops_params",
    "trace",
]


class TorchEvaluator(nni.TorchEvaluator):
    """NNI 2.9's evaluator.

    Args:
        training_func: ``(model, optimizers, criterion, lr_schedulers, max_steps, max_epochs)``.
        optimizers: one or several.
        criterion: ``(output, target)`` gives the loss.
        lr_schedulers: one, several or none.
        dummy_input: what the model can be traced with; with it, pruners know the coupled groups.
        evaluating_func: ``(model)`` gives the metric.
    """

    def __init__(
        self,
        training_func: Callable[..., Any],
        optimizers: Any,
        criterion: Callable[..., Any],
        lr_schedulers: Any = None,
        dummy_input: Any = None,
        evaluating_func: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        super().__init__(training_func, optimizers, criterion, lr_schedulers, dummy_input, evaluating_func)

    @classmethod
    def of_trainer(
        cls, trainer: Callable[..., Any], traced_optimizer: Any, criterion: Callable[..., Any]
    ) -> TorchEvaluator:
        """From what NNI 2.8 took: ``trainer(model, optimizer, criterion)`` trains for an epoch."""

        def epochs(
            model: nn.Module, optimizer: Any, criterion: Any, scheduler: Any, max_steps: Any, max_epochs: int | None
        ) -> None:
            for _ in count() if max_epochs is None else range(max_epochs):  # steps end it from inside
                trainer(model, optimizer, criterion)

        return cls(epochs, traced_optimizer, criterion)


class _Norm(Pruner):
    def __init__(self, model: nn.Module, config_list: Config, mode: str = "normal", dummy_input: Any = None) -> None:
        _check_mode(mode, dummy_input)
        super().__init__(model, config_list, dummy_input=dummy_input)


class L1NormPruner(_Norm, pruners.L1NormPruner):
    """``(model, config_list, mode="normal", dummy_input=None)``."""


class L2NormPruner(_Norm, pruners.L2NormPruner):
    """``(model, config_list, mode="normal", dummy_input=None)``."""


class FPGMPruner(_Norm, pruners.FPGMPruner):
    """``(model, config_list, mode="normal", dummy_input=None)``."""


def _check_mode(mode: str, dummy_input: Any) -> None:
    """With a dummy input what is coupled always loses the same units, whatever the mode."""
    if mode not in ("normal", "dependency_aware"):
        raise OptionError(f"mode is {mode!r}; expected 'normal' or 'dependency_aware'.")
    if mode == "dependency_aware" and dummy_input is None:
        raise OptionError("mode='dependency_aware' needs a dummy_input. Pass what the model can be traced with.")


class _Signature(Pruner):
    """Reads both forms of the arguments behind the configuration, by position or by name.

    Attributes:
        evaluator_form: what follows the evaluator, in order.
        trainer_form: what follows the criterion, in order.
        ours: NNI's names of them -> the names of :mod:`maskprop.pruning`; others are the same.
    """

    evaluator_form: ClassVar[tuple[str, ...]]
    trainer_form: ClassVar[tuple[str, ...]]
    ours: ClassVar[Mapping[str, str]] = {"training_batches": "training_steps"}

    def __init__(self, model: nn.Module, config_list: Config, *args: Any, **kwargs: Any) -> None:
        first = args[0] if args else kwargs.get("evaluator", kwargs.get("trainer"))
        by_trainer = not isinstance(first, nni.TorchEvaluator)
        old = ("trainer", "traced_optimizer", "criterion")
        names = (*old, *self.trainer_form) if by_trainer else ("evaluator", *self.evaluator_form)
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) > len(names) or (by_trainer and not given.keys() >= set(old)):
            raise OptionError(
                f"{type(self).__name__} takes (model, config_list, evaluator, {', '.join(self.evaluator_form)}) or "
                f"(model, config_list, {', '.join(old)}, {', '.join(self.trainer_form)}), as in NNI 2; got "
                f"{len(args)} arguments behind config_list and the names {', '.join(kwargs) or 'none'}."
            )
        if by_trainer:
            given["evaluator"] = TorchEvaluator.of_trainer(*(given.pop(name) for name in old))
        super().__init__(model, config_list, **self.read({self.ours.get(k, k): v for k, v in given.items()}))

    def read(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the pruner in :mod:`maskprop.pruning`."""
        evaluator = given["evaluator"]
        _check_mode(given.pop("mode", "normal"), given.get("dummy_input", evaluator.dummy_input))
        return given


class _FromData(_Signature):
    evaluator_form: ClassVar[tuple[str, ...]] = ("training_steps", "mode", "dummy_input")
    trainer_form: ClassVar[tuple[str, ...]] = ("training_batches", "mode", "dummy_input")


class TaylorFOWeightPruner(_FromData, pruners.TaylorPruner):
    """``(model, config_list, evaluator, training_steps, mode="normal", dummy_input=None)``."""


class _Activation(_FromData):
    evaluator_form = ("training_steps", "activation", "mode", "dummy_input")
    trainer_form = ("training_batches", "activation", "mode", "dummy_input")

    def read(self, given: dict[str, Any]) -> dict[str, Any]:
        """See the base."""
        name = given.pop("activation", "relu")
        functions = {"relu": nn.functional.relu, "relu6": nn.functional.relu6}
        if name not in functions:
            raise OptionError(f"activation is {name!r}; NNI 2 knows {', '.join(map(repr, functions))}.")
        assert self.default_score is not None
        given["score"] = self.default_score(activation=functions[name])  # type: ignore[call-arg]
        return super().read(given)


class ActivationAPoZRankPruner(_Activation, pruners.ActivationAPoZRankPruner):
    """``(model, config_list, evaluator, training_steps, activation="relu", mode="normal", dummy_input=None)``."""


class ActivationMeanRankPruner(_Activation, pruners.ActivationMeanRankPruner):
    """``(model, config_list, evaluator, training_steps, activation="relu", mode="normal", dummy_input=None)``."""


class _TrainsFirst(_Signature):
    """Trains for ``training_epochs`` before it prunes."""

    epochs: int | None = None

    def read(self, given: dict[str, Any]) -> dict[str, Any]:
        """See the base."""
        self.epochs = given.pop("training_epochs", None)
        return super().read(given)

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Train by the evaluator, for so long or else as long as was said."""
        super().train(max_steps, self.epochs if max_epochs is None else max_epochs)


class SlimPruner(_TrainsFirst, pruners.SlimPruner):
    """``(model, config_list, evaluator, training_epochs, scale=0.0001, mode="global")``."""

    evaluator_form = trainer_form = ("training_epochs", "scale", "mode")
    ours: ClassVar[Mapping[str, str]] = {"scale": "regular_scale"}

    def read(self, given: dict[str, Any]) -> dict[str, Any]:
        """See the base."""
        given["ranking"] = "global" if given.pop("mode", "global") == "global" else "local"
        return super().read(given)


class ADMMPruner(_Signature, pruners.ADMMPruner):
    """``(model, config_list, evaluator, iterations, training_epochs, granularity="fine-grained")``.

    Units leave as a whole: NNI's ``"coarse-grained"``, whichever is given.
    """

    evaluator_form = trainer_form = ("iterations", "training_epochs", "granularity")

    def read(self, given: dict[str, Any]) -> dict[str, Any]:
        """See the base."""
        given.pop("granularity", None)
        return super().read(given)


class MovementPruner(_TrainsFirst, _MovementPruner):
    """``(model, config_list, evaluator, warm_up_step, cool_down_beginning_step, training_epochs, training_steps)``.

    With a trainer, ``training_epochs`` comes before the two steps.
    """

    evaluator_form = ("warm_up_step", "cool_down_beginning_step", "training_epochs", "training_steps")
    trainer_form = ("training_epochs", "warm_up_step", "cool_down_beginning_step")
    ours: ClassVar[Mapping[str, str]] = {
        "warm_up_step": "warmup_step",
        "cool_down_beginning_step": "cooldown_begin_step",
    }


_ALGORITHMS: dict[str, type[Pruner]] = {
    "level": LevelPruner,
    "l1": L1NormPruner,
    "l2": L2NormPruner,
    "fpgm": FPGMPruner,
    "slim": SlimPruner,
    "apoz": ActivationAPoZRankPruner,
    "mean_activation": ActivationMeanRankPruner,
    "taylorfo": TaylorFOWeightPruner,
    "admm": ADMMPruner,
}


class _Iterative:
    """Prunes a little, fine-tunes, prunes more.

    Args:
        model: changed in place.
        config_list: of the pruner.
        pruning_algorithm: ``"l1"``, ``"taylorfo"`` and so on.
        total_iteration: number of prunings.
        log_dir, keep_intermediate_result: for NNI's files; nothing is written here.
        finetuner: ``finetuner(model)``, called after each pruning.
        speedup: make the result small at the end, and fine-tune once more. (NNI does so after each pruning.)
        dummy_input: with it, the coupled groups are known.
        evaluator: ``evaluator(model)`` gives a number, and the iteration with the highest is the result; else the last
            is. A :class:`TorchEvaluator` fine-tunes too.
        pruning_params: more arguments of the pruner.
        **options: of the schedule.

    Raises:
        OptionError: the algorithm is unknown, or there is no input to speed up with.
    """

    schedule: ClassVar[type[schedule.Schedule]]

    def __init__(
        self,
        model: nn.Module,
        config_list: Config,
        pruning_algorithm: str = "l1",
        total_iteration: int = 10,
        log_dir: str = ".",
        keep_intermediate_result: bool = False,
        finetuner: Callable[[nn.Module], Any] | None = None,
        speedup: bool = False,
        dummy_input: Any = None,
        evaluator: Callable[[nn.Module], Any] | nni.TorchEvaluator | None = None,
        pruning_params: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if pruning_algorithm not in _ALGORITHMS:
            raise OptionError(
                f"pruning_algorithm is {pruning_algorithm!r}; expected one of {', '.join(map(repr, _ALGORITHMS))}."
            )
        if speedup and dummy_input is None:
            raise OptionError("speedup=True needs a dummy_input. Pass what the model can be traced with.")
        self._finetune = finetuner
        self._evaluate: Callable[[nn.Module], Any] | None
        if isinstance(evaluator, nni.TorchEvaluator):
            self._finetune = finetuner or evaluator.train
            self._evaluate = evaluator.evaluate if evaluator.evaluating_func is not None else None
        else:
            self._evaluate = evaluator
        self.model, self.config_list, self.dummy_input = model, config_list, dummy_input if speedup else None
        given = {} if dummy_input is None else {"dummy_input": dummy_input}
        pruner = _ALGORITHMS[pruning_algorithm](model, config_list, **given | dict(pruning_params or {}))
        self._schedule = self.schedule(pruner, 1, total_iteration, **options)
        self._best: tuple[int, nn.Module, NestedMasks, Any] | None = None

    def compress(self) -> tuple[nn.Module, NestedMasks]:
        """Go through all iterations.

        Returns:
            The model of the result and its masks, as :meth:`get_best_result` has them.
        """
        while not self._schedule.done:
            self._schedule.step()
            if self._finetune is not None:
                self._finetune(self.model)
            score = None if self._evaluate is None else self._evaluate(self.model)
            if self._best is None or score is None or score > self._best[3]:
                kept = self.model if score is None else copy.deepcopy(self.model)
                self._best = self._schedule.times, kept, self._schedule.masks, score
        assert self._best is not None
        times, model, masks, score = self._best
        self._schedule.unwrap_model()
        remove_masks(model)
        if self.dummy_input is not None:
            ModelSpeedup(model, self.dummy_input, masks).speedup_model()
            masks = {}
            if self._finetune is not None:
                self._finetune(model)
        self._best = times, model, masks, score
        return model, masks

    def get_best_result(self) -> tuple[int, nn.Module, NestedMasks, Any, Config]:
        """``(iteration, model, masks, score, config_list)``; of a model that was sped up, no masks are left.

        Raises:
            OptionError: before :meth:`compress`.
        """
        if self._best is None:
            raise OptionError("there is no result yet. Call compress() first.")
        return (*self._best, self.config_list)


class LinearPruner(_Iterative):
    """The pruned share grows evenly; see :class:`maskprop.pruning.LinearPruner`."""

    schedule = schedule.LinearPruner


class AGPPruner(_Iterative):
    """Fast first, then slowly; see :class:`maskprop.pruning.AGPPruner`."""

    schedule = schedule.AGPPruner


class LotteryTicketPruner(_Iterative):
    """Rewinds after each pruning, with ``reset_weight``; see :class:`maskprop.pruning.LotteryTicketPruner`."""

    schedule = schedule.LotteryTicketPruner


def count_flops_params(model: nn.Module, x: Any, verbose: bool = True) -> tuple[int, int, list[dict[str, Any]]]:
    """NNI's counter: a multiply-add is one operation, and ``results`` has an entry a module with parameters.

    Args:
        model: left as it is.
        x: an input, or a tuple of them.
        verbose: not used: nothing is printed.

    Returns:
        Operations, parameters, and per module its name, type and parameters.
    """
    cost = measure(model, split_inputs(x))
    results = [
        {"name": name, "module_type": type(module).__name__, "params": sum(p.numel() for p in own)}
        for name, module in model.named_modules()
        if (own := [p for p in module._parameters.values() if p is not None])
    ]
    return cost.flops // 2, cost.parameters, results
