"""Movement pruning: units leave or come back while a pretrained model is fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskprop.errors import OptionError, ScoreError
from maskprop.pruning.config import Config
from maskprop.pruning.groups import Group, Member
from maskprop.pruning.masking import Mask, make_plain, named_weights, refuse_wrappers
from maskprop.pruning.pruner import Pruner
from maskprop.pruning.removal import hidden_elements
from maskprop.rewrite.edits import owner_of


class Gate(Mask):
    """A mask that gradients pass: a hidden weight still learns what it would change (straight-through)."""

    def forward(self, original: Tensor) -> Tensor:
        """``original * mask``, to the bit; the gradient of ``original`` is that of the result."""
        return original - (original * (~self.mask).to(original.dtype)).detach()


class MovementPruner(Pruner):
    """Units whose weights move towards zero (Sanh et al., Movement Pruning, 2020, arXiv:2005.07683).

    The score of a unit is the sum of ``-weight * gradient`` over the steps, taken where the unit is read: over the
    columns of the weights that consume it (where no weight does, over those that make it). The paper's hard variant:
    with ``cooldown_begin_step`` the units with the lowest scores are hidden *while* the model trains, more of them
    with each step, and what is hidden goes on collecting gradients, so that it may come back. The share of the final
    ratio that is hidden after ``t`` steps is ``1 - (1 - progress)^3``, ``progress`` going from 0 at ``warmup_step``
    to 1 at ``cooldown_begin_step``. Without it nothing is hidden before :meth:`compress`; then the scores tell what
    became smaller of weights that all have a say, which in a model that has converged is little.

    The training loop calls :meth:`step` between ``backward()`` (and ``scaler.unscale_``) and ``optimizer.step()``.
    With an NNI evaluator :meth:`compress` trains first.

    With ``cooldown_begin_step`` the masks go on when the pruner is made, all ones: make it on the plain model, before
    ``DistributedDataParallel`` or ``torch.compile``. :meth:`compress` puts plain masks in their place.

    Args:
        model, config, evaluator, training_steps, options: see :class:`Pruner`.
        warmup_step: steps before the first unit is hidden.
        cooldown_begin_step: step from which on the ratios are the final ones; scores go on changing which units.

    Raises:
        OptionError: ``cooldown_begin_step`` does not come after ``warmup_step``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config = 0.5,
        evaluator: Any = None,
        warmup_step: int = 0,
        cooldown_begin_step: int | None = None,
        training_steps: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, config, evaluator, training_steps, **options)
        if warmup_step < 0 or (cooldown_begin_step is not None and cooldown_begin_step <= warmup_step):
            raise OptionError(
                f"warmup_step is {warmup_step} and cooldown_begin_step {cooldown_begin_step}; the first is at least 0, "
                "the second larger."
            )
        self.warmup_step, self.cooldown_begin_step = warmup_step, cooldown_begin_step
        self._watched = {name: _readers(group) for name, (group, _) in self.plan.items()}
        self._sums = {name: torch.zeros(group.parts, dtype=torch.float64) for name, (group, _) in self.plan.items()}
        self._steps = 0
        self._gates: dict[str, Gate] = {}
        if cooldown_begin_step is not None:
            self._put_gates()

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """With an NNI evaluator: train, and watch the weights move. What hides units meanwhile is taken off."""
        if self.evaluator is not None:
            steps = self.training_steps if max_steps is None and max_epochs is None else max_steps
            self.evaluator.train(self.model, steps, max_epochs, before_step=self.step)
        if self._steps:
            self._take_gates()

    def step(self) -> None:
        """Read the gradients of this step, keep hidden weights still, and hide what the schedule asks for."""
        weights = named_weights(self.model)
        for name, members in self._watched.items():
            for member in members:
                weight = weights[member.name]
                if weight.grad is not None:
                    product = -(weight.detach() * weight.grad.detach())
                    self._sums[name] += self.plan[name][0].rows(member, product).double().sum(1).cpu()
        self._steps += 1
        for name, gate in self._gates.items():
            gradient = weights[name].grad
            if gradient is not None:
                gradient.mul_(gate.mask)
        if self._gates:
            self._hide()

    @property
    def share(self) -> float:
        """What part of the final ratios is hidden now."""
        if self.cooldown_begin_step is None:
            return 0.0
        progress = (self._steps - self.warmup_step) / (self.cooldown_begin_step - self.warmup_step)
        return 1.0 - (1.0 - min(max(progress, 0.0), 1.0)) ** 3

    def score(self, group: Group) -> Tensor:
        """The accumulated movement of a group's units."""
        if not self._steps:
            raise ScoreError(
                "MovementPruner has seen no gradient. Call pruner.step() after each backward() while the "
                "model trains, then compress()."
            )
        return self._sums[group.name]

    def state_dict(self) -> dict[str, Any]:
        """The steps and what the scores have added up to. What is hidden is in the model's ``state_dict``."""
        return {**super().state_dict(), "steps": self._steps, "sums": {n: s.clone() for n, s in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Pruner.load_state_dict`."""
        super().load_state_dict(state)
        self._steps, self._sums = int(state["steps"]), {n: s.clone() for n, s in state["sums"].items()}

    def attach(self) -> None:
        """A schedule around this pruner hides units itself."""
        if self._gates:
            raise OptionError(
                "MovementPruner with cooldown_begin_step is a schedule of its own. Leave it out to put another around."
            )
        super().attach()

    # -- gates ----------------------------------------------------------------------------------

    def _put_gates(self) -> None:
        refuse_wrappers(self.model)
        shapes: dict[str, tuple[int, ...]] = {}
        for member in (m for members in self._watched.values() for m in members):
            shape = tuple(member.units.shape)
            shapes[member.name] = tuple(torch.broadcast_shapes(shape, shapes.get(member.name, shape)))
        weights = named_weights(self.model)
        for name, shape in shapes.items():
            gate = self._gates[name] = Gate(torch.ones(shape, dtype=torch.bool, device=weights[name].device))
            parametrize.register_parametrization(*owner_of(self.model, name), gate)

    def _take_gates(self) -> None:
        for name in self._gates:
            make_plain(*owner_of(self.model, name))
        self._gates.clear()

    def _hide(self) -> None:
        """Write the masks of the units that have the lowest scores now."""
        keep = {name: torch.ones_like(gate.mask, device="cpu") for name, gate in self._gates.items()}
        for name, gone in self._choose(self._sums, self.share).items():
            for member in self._watched[name]:
                keep[member.name] &= ~hidden_elements(member, gone)
        for name, gate in self._gates.items():
            gate.mask.copy_(keep[name])


def _readers(group: Group) -> tuple[Member, ...]:
    """The weights that read a group's units, or else those that make them."""
    return tuple(m for m in group.members if m.consumes) or group.producers
