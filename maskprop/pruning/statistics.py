"""What scores learn from data: gradients and activations over a few batches, the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maskprop.errors import ScoreError
from maskprop.graph.trace import frozen_state
from maskprop.pruning.groups import Group
from maskprop.pruning.masking import named_weights

Loss = Callable[[nn.Module, Any], Tensor]
_GRADIENTS = frozenset({"taylor", "squared_gradient", "hessian"})
_OUTPUTS = frozenset({"activation_mean", "activation_nonzero"})
_ACTIVATIONS = _OUTPUTS | {"input_norm"}


class Statistics:
    """Means over batches.

    Kinds and their keys: ``taylor`` (group and module; the squared sum of weight times gradient a part),
    ``squared_gradient`` and ``hessian`` (parameter; elementwise), ``activation_mean``, ``activation_nonzero``
    (``made`` or ``read`` and module; a channel of its output or input), ``input_norm`` (module; mean square an input
    channel).
    """

    def __init__(self) -> None:
        self.batches = 0
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, kind: str, key: str, value: Tensor) -> None:
        """Add one batch's value."""
        value = value.detach().double().cpu()
        before = self._sums.get((kind, key))
        self._sums[kind, key] = value if before is None else before + value
        self._counts[kind, key] = self._counts.get((kind, key), 0) + 1

    def mean_of(self, kind: str, key: str) -> Tensor | None:
        """The mean over batches, or ``None`` if nothing came."""
        total = self._sums.get((kind, key))
        return None if total is None else total / self._counts[kind, key]


def collect(
    model: nn.Module,
    groups: Sequence[Group],
    needs: frozenset[str],
    data: Iterable[Any],
    loss: Loss | None = None,
    batches: int | None = None,
    **options: Any,
) -> Statistics:
    """Run a model over batches in evaluation mode and collect what scores need.

    Args:
        model: left as it was; see :func:`collecting`, as for the next two.
        groups: that will be scored.
        needs: kinds of statistics.
        data: batches, in any form that ``loss`` takes. Without ``loss``: a tensor, a tuple or list whose
        first
            item is the input, or a dict of keyword arguments.
        loss: ``loss(model, batch)`` gives a scalar; needed for gradients.
        batches: at most so many.
        **options: see :func:`collecting`.

    Raises:
        ScoreError: gradients are needed and there is no loss, the loss is not a scalar, or ``data`` is empty.
    """
    if needs & _GRADIENTS and loss is None:
        raise ScoreError(
            "this score needs gradients, and there is no loss. Give `loss`, a function of (model, batch) "
            "that returns a scalar."
        )
    with collecting(model, groups, needs, **options) as (found, observe):
        for number, batch in enumerate(data):
            if batches is not None and number >= batches:
                break
            observe(_forward(model, batch) if loss is None else loss(model, batch))
    if not found.batches:
        raise ScoreError(
            "`data` gave no batch. An iterator that was used up before gives none: pass a list or a DataLoader."
        )
    return found


@contextmanager
def collecting(
    model: nn.Module,
    groups: Sequence[Group],
    needs: frozenset[str],
    *,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    seed: int = 0,
    probes: int = 8,
) -> Iterator[tuple[Statistics, Callable[[Any], None]]]:
    """Collect while somebody else runs the model, which is in evaluation mode whatever they do.

    Args:
        model: its gradients, buffers, modes and the random state are restored.
        groups: that will be scored.
        needs: kinds of statistics.
        activation: applied before activations are counted.
        seed: of the random signs of the Hessian's estimate.
        probes: vectors of signs a batch.

    Yields:
        The statistics, and a function to be called with the loss of each batch.
    """
    found = Statistics()
    generator = torch.Generator().manual_seed(seed)
    seen: list[tuple[str, str, Tensor]] = []  # by the last forward, which may be of an evaluation in between

    def prepare(model: nn.Module, inputs: object) -> None:
        seen.clear()
        if model.training:  # training functions ask for that
            model.eval()

    def observe(result: Any) -> None:
        if needs & _GRADIENTS:
            _gradients(model, groups, needs, result, found, generator, probes)
        for statistic in seen:
            found.add(*statistic)
        seen.clear()
        found.batches += 1

    with ExitStack() as stack:
        stack.enter_context(frozen_state(model))
        stack.enter_context(torch.set_grad_enabled(bool(needs & _GRADIENTS)))
        if "hessian" in needs:  # fused attention has no second derivative
            stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        if needs & _GRADIENTS:
            stack.enter_context(_thawed(model, groups))
        stack.callback(model.register_forward_pre_hook(prepare).remove)
        stack.enter_context(_hooks(model, groups, needs & _ACTIVATIONS, seen, activation))
        yield found, observe


def _forward(model: nn.Module, batch: Any) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    return model(first.to(device) if isinstance(first, Tensor) else first)


def _gradients(
    model: nn.Module,
    groups: Sequence[Group],
    needs: frozenset[str],
    result: Any,
    found: Statistics,
    generator: torch.Generator,
    probes: int,
) -> None:
    if not isinstance(result, Tensor) or result.numel() != 1:
        came = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ScoreError(f"the loss returned {came}; a scalar tensor is expected. Average it over the batch.")
    if not result.requires_grad:
        raise ScoreError(
            "the loss does not depend on any parameter (was it detached, or computed under no_grad?). Return what "
            "backward() could be called on."
        )
    wanted = {m.name for g in groups for m in g.members if not m.consumes}
    parameters = {name: p for name, p in named_weights(model).items() if name in wanted and p.requires_grad}
    second = "hessian" in needs
    gradients = torch.autograd.grad(
        result.reshape(()), list(parameters.values()), create_graph=second, allow_unused=True
    )
    by_name = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    if "squared_gradient" in needs:
        for name, gradient in by_name.items():
            found.add("squared_gradient", name, gradient.square())
    if "taylor" in needs:
        products = {n: parameters[n].detach() * g.detach() for n, g in by_name.items()}
        for group in groups:
            for path, members in group.gates.items():
                terms = [group.rows(m, products[m.name]).double().sum(1) for m in members if m.name in products]
                if terms:
                    found.add("taylor", f"{group.name}|{path}", torch.stack(terms).sum(0).square())
    for _ in range(probes if second else 0):
        signs = {
            n: torch.randint(0, 2, g.shape, generator=generator).to(g) * 2 - 1
            for n, g in by_name.items()
            if g.requires_grad
        }
        curved = torch.autograd.grad(
            [by_name[n] for n in signs],
            [parameters[n] for n in signs],
            list(signs.values()),
            retain_graph=True,
            allow_unused=True,
        )
        for (name, sign), product in zip(signs.items(), curved, strict=True):
            if product is not None:
                found.add("hessian", name, sign * product)


@contextmanager
def _thawed(model: nn.Module, groups: Sequence[Group]) -> Iterator[None]:
    """Frozen parameters are scored as others are."""
    wanted = {m.name for g in groups for m in g.members if not m.consumes}
    frozen = [p for name, p in named_weights(model).items() if name in wanted and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _hooks(
    model: nn.Module,
    groups: Sequence[Group],
    kinds: frozenset[str],
    seen: list[tuple[str, str, Tensor]],
    activation: Callable[[Tensor], Tensor],
) -> Iterator[None]:
    """Forward hooks on the modules that make the groups' units, and on those that read them."""
    made = {p for g in groups for p in g.modules} if kinds else set()
    read = {p for g in groups for p in g.consumers} if kinds & _OUTPUTS else set()
    handles = []
    for path in made | read:
        module = model.get_submodule(path)
        axis = _channel_axis(module)
        if axis is None:
            continue

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any, path: str = path, axis: int = axis) -> None:
            source = inputs[0] if inputs else None
            for side, value in (("made", output), ("read", source)):
                if path in (made if side == "made" else read) and isinstance(value, Tensor):
                    active = activation(value.detach()).movedim(axis, 0).flatten(1)
                    if "activation_mean" in kinds:
                        seen.append(("activation_mean", f"{side}|{path}", active.abs().double().mean(1)))
                    if "activation_nonzero" in kinds:
                        seen.append(("activation_nonzero", f"{side}|{path}", (active != 0).double().mean(1)))
            if "input_norm" in kinds and isinstance(source, Tensor) and source.is_floating_point():  # no token ids
                norms = source.detach().movedim(axis, 0).flatten(1).double().square().mean(1)
                seen.append(("input_norm", path, norms))

        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_axis(module: nn.Module) -> int | None:
    """Which axis of a module's batched output counts its units."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return 1
    return (
        -1 if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding)) or type(module).__name__ == "Conv1D" else None
    )
