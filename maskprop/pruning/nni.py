"""What NNI's scripts import beside the pruners: ``TorchEvaluator``, ``trace``, the dependency groups.

The evaluator calls the user's own training function; there is no trainer here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from maskprop.errors import OptionError, ScoreError
from maskprop.pruning.discover import prunable_groups
from maskprop.pruning.groups import Group, Groups
from maskprop.pruning.statistics import Statistics, collecting

_T = TypeVar("_T")


def trace(thing: _T) -> _T:
    """NNI's recorder of constructor arguments; nothing needs recording here."""
    return thing


class ConfigList(list[dict[str, Any]]):
    """A ``config_list`` that comes with the coupled groups of its model.

    Attributes:
        groups: a pruner that is given nothing better takes them.
    """

    def __init__(self, entries: Iterable[dict[str, Any]], groups: Groups) -> None:
        super().__init__(entries)
        self.groups = groups

    def __deepcopy__(self, memo: dict[int, Any]) -> ConfigList:
        return ConfigList(copy.deepcopy(list(self), memo), self.groups)


def auto_set_dependency_group_ids(
    model: nn.Module, config_list: Sequence[dict[str, Any]], dummy_input: Any
) -> ConfigList:
    """NNI's helper, which it spells ``auto_set_denpendency_group_ids``: what is coupled loses the same units.

    Args:
        model: left as it is.
        config_list: left as it is.
        dummy_input: see :func:`maskprop.pruning.prunable_groups`.

    Returns:
        The same entries, with the coupled groups, for a pruner that is given no ``dummy_input`` of its own.
    """
    return ConfigList(config_list, prunable_groups(model, dummy_input))


auto_set_denpendency_group_ids = auto_set_dependency_group_ids


class _EnoughError(Exception):
    """Leaves the user's training function after the last batch that is wanted."""


class TorchEvaluator:
    """NNI 3's evaluator.

    Args:
        training_func: ``(model, optimizers, training_step, lr_schedulers, max_steps, max_epochs)``.
        optimizers: one or several.
        training_step: what the training function computes the loss with: NNI 3's ``(batch, model)`` or NNI 2's
            criterion ``(output, target)``. Gives the loss, or a tuple or dict that starts with it.
        lr_schedulers: one, several or none.
        dummy_input: what the model can be traced with; with it, pruners know the coupled groups.
        evaluating_func: ``(model)`` gives the metric.
    """

    def __init__(
        self,
        training_func: Callable[..., Any],
        optimizers: Any,
        training_step: Callable[..., Any],
        lr_schedulers: Any = None,
        dummy_input: Any = None,
        evaluating_func: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.training_func, self.optimizers, self.training_step = training_func, optimizers, training_step
        self.lr_schedulers, self.dummy_input, self.evaluating_func = (
            lr_schedulers,
            dummy_input,
            evaluating_func,
        )

    def evaluate(self, model: nn.Module) -> Any:
        """The user's metric.

        Raises:
            OptionError: there is no ``evaluating_func``.
        """
        if self.evaluating_func is None:
            raise OptionError("the evaluator has no evaluating_func. Pass one to TorchEvaluator.")
        return self.evaluating_func(model)

    def train(
        self,
        model: nn.Module,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        *,
        penalty: Callable[[], Tensor] | None = None,
        before_step: Callable[[], object] | None = None,
        after_step: Callable[[], object] | None = None,
    ) -> None:
        """Run the user's training function.

        Args:
            model: is trained.
            max_steps: at most so many steps; the function is left then, even if it would go on.
            max_epochs: handed to the function.
            penalty: added to the loss.
            before_step: called before each optimiser step, when gradients are there.
            after_step: called after each optimiser step.
        """
        steps = 0

        def step_with_penalty(*args: Any, **kwargs: Any) -> Any:
            loss = self.training_step(*args, **kwargs)
            return loss if penalty is None else _with_loss(loss, lambda value: value + penalty())

        def before(*_: object) -> None:
            if before_step is not None:
                before_step()

        def after(*_: object) -> None:
            nonlocal steps
            if after_step is not None:
                after_step()
            steps += 1
            if max_steps is not None and steps >= max_steps:
                raise _EnoughError

        first = _listed(self.optimizers)[0]
        with ExitStack() as stack:
            stack.callback(first.register_step_pre_hook(before).remove)
            stack.callback(first.register_step_post_hook(after).remove)
            self._run(model, step_with_penalty, max_steps, max_epochs)

    def collect(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        needs: frozenset[str],
        steps: int | None,
        **options: Any,
    ) -> Statistics:
        """Statistics over the batches that the training function takes; nothing is trained.

        Args:
            model: see :func:`maskprop.pruning.statistics.collecting`, as for the next two.
            groups: that will be scored.
            needs: kinds of statistics.
            steps: at most so many batches.
            **options: handed on.

        Raises:
            ScoreError: the training function never asked for the loss.
        """
        idle = [*_listed(self.optimizers), *_listed(self.lr_schedulers)]
        with (
            _gradients_kept(model),
            collecting(model, groups, needs, **options) as (found, observe),
            _patched(idle, lambda original, *args, **kwargs: None),
        ):

            def watched(*args: Any, **kwargs: Any) -> Any:
                result = self.training_step(*args, **kwargs)
                observe(_loss_of(result))
                if steps is not None and found.batches >= steps:
                    raise _EnoughError
                with torch.enable_grad():  # what the function calls backward() on
                    nothing = torch.stack([p.sum() * 0 for p in model.parameters() if p.requires_grad]).sum()
                return _with_loss(result, lambda loss: nothing)

            self._run(model, watched, steps, 1 if steps is None else None)
        if not found.batches:
            raise ScoreError(
                "the training function never called what computes the loss. Check training_func and its data."
            )
        return found

    def _run(self, model: nn.Module, step: Callable[..., Any], max_steps: int | None, max_epochs: int | None) -> None:
        with suppress(_EnoughError):
            self.training_func(model, self.optimizers, step, self.lr_schedulers, max_steps, max_epochs)


@contextmanager
def _patched(things: Sequence[Any], replacement: Callable[..., Any]) -> Iterator[None]:
    """Put a function of (original, ...) in place of ``step`` for a while."""
    before = [(t, t.__dict__.get("step")) for t in things]
    for thing in things:
        original = thing.step
        thing.step = lambda *args, _original=original, **kwargs: replacement(_original, *args, **kwargs)
    try:
        yield
    finally:
        for thing, own in before:
            if own is None:
                thing.__dict__.pop("step", None)
            else:
                thing.step = own


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    before = [(p, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _loss_of(result: Any) -> Tensor:
    """The loss in what a training step returns."""
    if isinstance(result, dict):
        result = result["loss"] if "loss" in result else next(iter(result.values()))
    found: Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return found


def _with_loss(result: Any, change: Callable[[Any], Any]) -> Any:
    """What a training step returned, with another loss."""
    if isinstance(result, dict):
        key = "loss" if "loss" in result else next(iter(result))
        return {**result, key: change(result[key])}
    if isinstance(result, (tuple, list)):
        return type(result)([change(result[0]), *result[1:]])
    return change(result)
