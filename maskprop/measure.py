"""What a model costs: parameters, floating-point operations, bytes on disk, time.

Every function leaves the model as it was, in the mode (train or eval) that it was in.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Number of parameter elements; a parameter that is used under two names counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of one forward pass in eval mode, a multiply-add counting as two.

    Source: `torch.utils.flop_counter`, which counts matrix products, convolutions and attention. On the CPU
    it does not see inside fused kernels (attention, LSTM).
    """
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops())


def file_size(model: nn.Module) -> int:
    """Bytes that `torch.save` writes for the model's `state_dict`."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def latencies(
    models: Mapping[str, nn.Module], *inputs: Tensor, rounds: int = 5, seconds: float = 0.1
) -> dict[str, float]:
    """Median seconds of a forward pass in eval mode, for models that are to be compared.

    The models take turns, so that a machine that slows down meanwhile slows all of them.

    Args:
        models: by name.
        inputs: the positional arguments of every model.
        rounds: how many turns each has.
        seconds: how long a turn lasts, at least.

    Returns:
        By name, the median over the rounds of each round's median, on `torch.get_num_threads()` threads.
    """
    timers = {
        name: Timer("model(*inputs)", globals={"model": model, "inputs": inputs}, num_threads=torch.get_num_threads())
        for name, model in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, timer in timers.items():
            with evaluating(models[name]), torch.inference_mode():
                times[name].append(timer.blocked_autorange(min_run_time=seconds).median)
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; each module then gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
