"""What NNI's scripts import beside the pruners: ``TorchEvaluator`` and ``trace``.

It calls the user's own training function; there is no trainer here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from torch import Tensor, nn

from maskprop.errors import OptionError, ScoreError
from maskprop.pruning.groups import Group
from maskprop.pruning.statistics import Statistics, collect

_T = TypeVar("_T")


def trace(thing: _T) -> _T:
    """NNI's recorder of constructor arguments; nothing needs recording here."""
    return thing


class _EnoughError(Exception):
    """Leaves the user's training function after the last batch that is wanted."""


class TorchEvaluator:
    """NNI 3's evaluator.

    Args:
        training_func: ``(model, optimizers, training_step, lr_schedulers, max_steps, max_epochs)``.
        optimizers: one or several.
        training_step: ``(batch, model)`` gives the loss, or a tuple or dict that starts with it.
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
            return loss if penalty is None else _add_to_loss(loss, penalty())

        def stepped(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            if before_step is not None:
                before_step()
            result = original(*args, **kwargs)
            if after_step is not None:
                after_step()
            steps += 1
            if max_steps is not None and steps >= max_steps:
                raise _EnoughError
            return result

        with _patched(_listed(self.optimizers)[:1], stepped):
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
            model: see :func:`maskprop.pruning.statistics.collect`, as for the next two.
            groups: that will be scored.
            needs: kinds of statistics.
            steps: at most so many batches.
            **options: handed on.
        """
        batches: list[Any] = []

        def remember(batch: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(batch)
            if steps is not None and len(batches) >= steps:
                raise _EnoughError
            return sum(p.sum() * 0 for p in model.parameters())

        with _patched(
            [*_listed(self.optimizers), *_listed(self.lr_schedulers)], lambda original, *args, **kwargs: None
        ):
            gradients = [(p, p.grad) for p in model.parameters()]
            modes = [(m, m.training) for m in model.modules()]
            self._run(model, remember, steps, 1 if steps is None else None)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, training in modes:
                module.training = training
        if not batches:
            raise ScoreError(
                "the training function called training_step with no batch. Check training_func and its data."
            )
        return collect(
            model,
            groups,
            needs,
            batches,
            lambda m, batch: _loss_of(self.training_step(batch, m)),
            **options,
        )

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


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _loss_of(result: Any) -> Tensor:
    """The loss in what a training step returns."""
    if isinstance(result, dict):
        result = result["loss"] if "loss" in result else next(iter(result.values()))
    found: Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return found


def _add_to_loss(result: Any, extra: Tensor) -> Any:
    if isinstance(result, dict):
        key = "loss" if "loss" in result else next(iter(result))
        return {**result, key: result[key] + extra}
    if isinstance(result, (tuple, list)):
        return type(result)([result[0] + extra, *result[1:]])
    return result + extra
