"""Schedules around any pruner: prune a little, train, prune more. One call a step in the user's own loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from maskprop.errors import OptionError
from maskprop.pruning.masking import apply_masks, named_weights
from maskprop.pruning.pruner import Pruner
from maskprop.pruning.removal import NestedMasks


class Schedule:
    """Raises a pruner's ratios step by step; what was pruned stays pruned.

    Make it on the plain model, before ``DistributedDataParallel`` or ``torch.compile``: it puts masks of ones on all
    that may be pruned, and every later change only writes to them. Then call :meth:`step` after each optimiser step,
    in every process: scores are averaged over the processes of ``torch.distributed``.

    Args:
        pruner: decides what goes.
        interval_steps: steps between two prunings.
        total_times: number of prunings; the last reaches the pruner's ratios.
        warmup_steps: steps before the first.
    """

    def __init__(
        self,
        pruner: Pruner,
        interval_steps: int = 1,
        total_times: int = 10,
        evaluator: Any = None,
        *,
        warmup_steps: int = 0,
    ) -> None:
        for name, value, least in (
            ("interval_steps", interval_steps, 1),
            ("total_times", total_times, 1),
            ("warmup_steps", warmup_steps, 0),
        ):
            if value < least:
                raise OptionError(f"{name} is {value}; give at least {least}.")
        self.pruner, self.model = pruner, pruner.model
        self.evaluator = evaluator if evaluator is not None else pruner.evaluator
        self.interval_steps, self.total_times, self.warmup_steps = interval_steps, total_times, warmup_steps
        self.steps = self.times = 0
        pruner.together = True
        pruner.attach()

    def share(self, progress: float) -> float:
        """What part of the final ratios is pruned when ``progress`` (0 to 1) of the prunings are done."""
        raise NotImplementedError

    def step(self) -> bool:
        """Count a training step; prune if it is time.

        Returns:
            Whether the masks changed.
        """
        self.steps += 1
        due = (self.steps - self.warmup_steps) // self.interval_steps if self.steps > self.warmup_steps else 0
        if self.times >= self.total_times or due <= self.times:
            return False
        self.times += 1
        self._prune(self.share(self.times / self.total_times))
        return True

    def _prune(self, share: float) -> None:
        apply_masks(self.model, self.pruner.update(share))

    @property
    def done(self) -> bool:
        """Whether the final ratios are reached."""
        return self.times >= self.total_times

    @property
    def masks(self) -> NestedMasks:
        """The masks as they are now, ``{module: {parameter: mask}}``."""
        return self.pruner.masks

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, NestedMasks]:
        """Go to the end: with an NNI evaluator by training in between, without one by pruning at once.

        Args:
            max_steps: how long the evaluator trains; until the last pruning by default.
            max_epochs: likewise.

        Returns:
            The model with masks on, and the masks.
        """
        if self.evaluator is not None:
            until_last = self.warmup_steps + self.interval_steps * self.total_times
            steps = until_last if max_steps is None and max_epochs is None else max_steps
            self.evaluator.train(self.model, steps, max_epochs, after_step=self.step)
        while not self.done:
            self.times = self.total_times
            self._prune(1.0)
        return self.model, self.masks

    def get_masks(self) -> NestedMasks:
        """NNI's name for :attr:`masks`."""
        return self.masks

    def unwrap_model(self, bake: bool = True) -> nn.Module:
        """Take the masks off; see :meth:`Pruner.unwrap_model`."""
        return self.pruner.unwrap_model(bake)

    def state_dict(self) -> dict[str, Any]:
        """Progress, to go on later; the masks themselves are in the model's ``state_dict``."""
        return {"steps": self.steps, "times": self.times, "pruner": self.pruner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with a schedule that was made alike."""
        self.steps, self.times = int(state["steps"]), int(state["times"])
        self.pruner.load_state_dict(state["pruner"])
        if self.pruner.removal is not None:
            apply_masks(self.model, self.pruner.removal.masks)


class LinearPruner(Schedule):
    """The pruned share grows evenly: after k of n prunings, k/n of each ratio."""

    def share(self, progress: float) -> float:
        """See the class."""
        return progress


class AGPPruner(Schedule):
    """Fast first, then slowly: ``1 - (1 - progress)^3`` (Zhu and Gupta, 2017, arXiv:1710.01878)."""

    def share(self, progress: float) -> float:
        """See the class."""
        return 1.0 - (1.0 - progress) ** 3


class LotteryTicketPruner(Schedule):
    """Prune, rewind to the first weights, train again (Frankle and Carbin, 2019, arXiv:1803.03635).

    Each round keeps the same share of what is left: after k of n, ``1 - (1 - ratio)^(k/n)`` of the largest
    ratio. After each pruning the parameters and buffers are those from when the schedule was made (unless
    ``reset_weight`` is False); start a new optimiser then (:meth:`step` returns True).
    """

    def __init__(
        self,
        pruner: Pruner,
        interval_steps: int = 1,
        total_times: int = 5,
        evaluator: Any = None,
        *,
        warmup_steps: int = 0,
        reset_weight: bool = True,
    ) -> None:
        super().__init__(pruner, interval_steps, total_times, evaluator, warmup_steps=warmup_steps)
        self.reset_weight = reset_weight
        self._first = {name: p.detach().clone() for name, p in named_weights(self.model).items()}
        self._buffers = {n: copy.deepcopy(b) for n, b in self.model.named_buffers() if not n.endswith(".mask")}
        self._ratio = max((rule.ratio or 0.0 for _, rule in pruner.plan.values()), default=0.0)

    def share(self, progress: float) -> float:
        """See the class."""
        return (1.0 - (1.0 - self._ratio) ** progress) / self._ratio if self._ratio else 0.0

    def _prune(self, share: float) -> None:
        super()._prune(share)
        if not self.reset_weight:
            return
        buffers = dict(self.model.named_buffers())
        with torch.no_grad():
            for name, parameter in named_weights(self.model).items():
                parameter.copy_(self._first[name])
            for name, value in self._buffers.items():
                buffers[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """See the base; with the first weights, which a model made anew need not have."""
        return {**super().state_dict(), "first": self._first, "buffers": self._buffers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See the base."""
        super().load_state_dict(state)
        self._first, self._buffers = dict(state["first"]), dict(state["buffers"])
