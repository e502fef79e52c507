"""Random weights under which an error shows: nothing is zero, saturated, uniform or exploding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .specimen import Inputs, call

#: A parameter whose spread is larger than this was initialised to something meaningful: it is only jittered.
_MEANINGFUL_SPREAD = 0.05


@torch.no_grad()
def randomise(model: nn.Module, inputs: Inputs, seed: int = 0) -> nn.Module:
    """Randomises every parameter and running statistic of a model in place.

    Biases, norm affines, layer scales, class tokens, position tables and zero-initialised heads get values
    that matter. One forward pass then rescales each layer with a weight so that its output has a standard
    deviation of one (LSUV, Mishkin and Matas 2015), and sets running statistics near those of the data, so
    that signals neither explode nor vanish with depth and attention is not uniform.

    Args:
        model: the model; it is left in eval mode.
        inputs: what the forward pass is called with.
        seed: of the generator that all values come from.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    seen: set[int] = set()
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                _randomise_parameter(module, name, parameter, generator)
        if _running_statistics(module) is not None:
            for name in ("weight", "bias"):  # buffers of a frozen batch norm
                if isinstance(module._buffers.get(name), torch.Tensor):
                    parameter = module._buffers[name]
                    parameter.copy_(_near(parameter, generator))
    _calibrate(model, modules, inputs, generator)
    return model


def _randomise_parameter(module: nn.Module, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    if not parameter.is_floating_point():
        return
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        parameter.copy_(_normal(parameter, generator))
        if module.padding_idx is not None:
            parameter[module.padding_idx] = 0
    elif parameter.ndim >= 2 and is_layer(module) and name == "weight":
        parameter.copy_(_normal(parameter, generator) * fan_in(module) ** -0.5)
    elif parameter.ndim >= 2 and isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        parameter.copy_(_normal(parameter, generator) * (2 / parameter.shape[-1]) ** 0.5)
    elif name.startswith(("bias", "in_proj_bias")) and parameter.ndim == 1:
        parameter.copy_(0.5 * _normal(parameter, generator))
    else:
        parameter.copy_(_near(parameter, generator))


def _near(old: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values near a parameter's own where those mean something, else values of a moderate size."""
    if old.numel() and float(old.float().std(correction=0)) > _MEANINGFUL_SPREAD:
        return old * (1 + 0.1 * _normal(old, generator))
    center = float(old.float().mean()) if old.numel() else 0.0
    if abs(center) > 0.01:
        return center * (0.5 + torch.rand(old.shape, generator=generator, dtype=torch.float32)).to(old.dtype)
    scale = 0.4
    if old.ndim >= 3 and old.shape[0] > 1:  # stacked weights, such as those of experts
        scale = (old.shape[-1] * old.shape[-2]) ** -0.25
    return scale * _normal(old, generator)


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer with an (in, out) weight (``transformers``' ``Conv1D``)."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and weight.shape[1] == getattr(module, "nf", None)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, of any library."""
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return True
    return is_transposed_linear(module)


def fan_in(module: nn.Module) -> float:
    """How many products an output of a linear layer or convolution sums."""
    weight = module.weight
    if is_transposed_linear(module):
        return weight.shape[0]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        taps = weight[0, 0].numel() / torch.tensor(module.stride).prod().item()
        return max(1.0, weight.shape[0] / module.groups * taps)
    return weight[0].numel()


def _running_statistics(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    mean, variance = module._buffers.get("running_mean"), module._buffers.get("running_var")
    return None if mean is None or variance is None else (mean, variance)


def _calibrate(model: nn.Module, modules: list[nn.Module], inputs: Inputs, generator: torch.Generator) -> None:
    scaled: set[int] = set()

    def scale_output(module: nn.Module, args: Any, output: Any) -> Any:
        weight = module._parameters.get("weight")
        if weight is None or id(weight) in scaled or not isinstance(output, torch.Tensor):
            return output
        scaled.add(id(weight))
        total = float(output.float().std(correction=0))
        if not 1e-6 < total < 1e6:
            return output
        # What varies with the input counts, not what differs between features; a batch of few pooled
        # values may hardly vary, hence the floor.
        axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else output.ndim - 1
        axes = [other for other in range(output.ndim) if other != axis]
        spread = max(float(output.float().var(axes, correction=0).mean().sqrt()), 0.2 * total)
        weight.div_(spread)
        bias = module._parameters.get("bias")
        if bias is None:
            return output.div(spread)
        bias = bias.view([-1 if other == axis else 1 for other in range(output.ndim)])
        return (output - bias) / spread + bias

    def set_statistics(module: nn.Module, args: Any) -> None:
        x, (mean, variance) = args[0], _running_statistics(module)
        if id(module) in scaled or x.ndim < 2 or x.shape[1] != mean.numel():
            return
        scaled.add(id(module))
        axes = [axis for axis in range(x.ndim) if axis != 1]
        actual = x.float().var(axes, correction=0)
        actual = 0.5 * (actual + actual.mean()) + 1e-3  # few values make an unreliable variance
        mean.copy_(x.float().mean(axes) + 0.3 * actual.sqrt() * _normal(mean, generator).float())
        variance.copy_(actual * (0.5 + torch.rand(mean.shape, generator=generator)))

    with ExitStack() as stack:

        def hook(register: Callable[..., Any], function: Callable[..., Any]) -> None:
            stack.callback(register(function).remove)

        for module in modules:
            if is_layer(module) or isinstance(module, nn.Embedding):
                hook(module.register_forward_hook, scale_output)
            if _running_statistics(module) is not None:
                hook(module.register_forward_pre_hook, set_statistics)
        model.eval()
        call(model, inputs)
    model.train().eval()  # drops what modules have cached in the meantime
