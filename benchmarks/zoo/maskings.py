"""The maskings that every model of the zoos is tried under.

==============  ========================================================================================
``zeros``       the same rows of every layer of a width, with their biases and the norm that reads them
``constants``   the same rows, weights alone: biases and norms leave constants behind
``conflicts``   another random half in every layer, with and without biases and norms; raw parameters too
``heads``       half of the attention heads, through the q, k and v rows that serve them alone
``heads_out``   every second head, through the columns of the output projection alone
``dims``        half of the dims of each head, through q, k and v rows
``dims_out``    half of the dims of each head, other ones in each, through the output projection's columns
``mlp``         half of the units between two linear layers, through the rows that produce them
``mlp_out``     the same, through the columns that read them
==============  ========================================================================================

The layer that is called last is never masked. A masking that a model has no place for is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from .specimen import Inputs
from .structure import Masks, Site, Structure, keep, path

Masking = Callable[[Structure, torch.Generator], Masks]


def random_half(width: int, generator: torch.Generator) -> torch.Tensor:
    """A bool tensor with ``width // 2`` random entries True: what is removed."""
    removed = torch.zeros(width, dtype=torch.bool)
    removed[torch.randperm(width, generator=generator)[: width // 2]] = True
    return removed


def same_half(width: int) -> torch.Tensor:
    """The random half that all layers of a width share."""
    return random_half(width, torch.Generator().manual_seed(width))


def zeros(structure: Structure, generator: torch.Generator) -> Masks:
    return _rows(structure, same_half, bias=lambda: True, norm=lambda: True)


def constants(structure: Structure, generator: torch.Generator) -> Masks:
    return _rows(structure, same_half, bias=lambda: False, norm=lambda: False)


def conflicts(structure: Structure, generator: torch.Generator) -> Masks:
    def coin() -> bool:
        return bool(torch.rand((), generator=generator) < 0.5)

    masks = _rows(structure, lambda width: random_half(width, generator), coin, coin)
    leaves = {layer.name for layer in structure.layers}
    for name, module in structure.model.named_modules():
        if name in leaves or isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            axes = [axis for axis, size in enumerate(parameter.shape) if size > 1]
            if len(axes) > 1 and coin():
                axis = axes[int(torch.randint(len(axes), (), generator=generator))]
                shape = [-1 if other == axis else 1 for other in range(parameter.ndim)]
                removed = random_half(parameter.shape[axis], generator).view(shape)
                masks[path(name, own)] = keep(removed)
    return masks


def _rows(
    structure: Structure,
    half: Callable[[int], torch.Tensor],
    bias: Callable[[], bool],
    norm: Callable[[], bool],
) -> Masks:
    masks: Masks = {}
    for layer in structure.layers:
        if layer.name == structure.last:
            continue
        removed, with_bias, with_norm = half(layer.width), bias(), norm()
        _merge(masks, layer.rows(removed, with_bias))
        behind = structure.norms.get(layer.name)
        if behind is not None and with_norm:
            for own, parameter in structure.model.get_submodule(behind).named_parameters(recurse=False):
                if parameter.shape == removed.shape:
                    _merge(masks, {path(behind, own): keep(removed)})
    for name, module in structure.model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            _merge(masks, _attention_rows(name, module, half(module.embed_dim), bias()))
        elif isinstance(module, nn.RNNBase):
            _merge(masks, _recurrent_units(name, module, half, bias()))
    return masks


def _recurrent_units(name: str, module: nn.RNNBase, half: Callable[[int], torch.Tensor], bias: bool) -> Masks:
    """The rows of all gates of a hidden unit."""
    masks = {}
    for own, parameter in module.named_parameters(recurse=False):
        gates = parameter.shape[0] // module.hidden_size
        if own.startswith("weight_ih"):
            removed = half(module.hidden_size)
        if parameter.ndim == 2 or bias:
            rows = removed.repeat(gates)
            masks[path(name, own)] = keep(rows if parameter.ndim == 1 else rows[:, None])
    return masks


def _attention_rows(name: str, module: nn.MultiheadAttention, removed: torch.Tensor, bias: bool = True) -> Masks:
    """The rows of q, k and v in torch's own attention module, whose output projection is never called."""
    masks = {}
    for own, parameter in module.named_parameters(recurse=False):
        if own in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            rows = removed.repeat(parameter.shape[0] // removed.numel())
            if parameter.ndim == 2 or bias:
                rows = rows[:, None] if parameter.ndim == 2 else rows
                masks[path(name, own)] = keep(rows)
    return masks


def heads(structure: Structure, generator: torch.Generator) -> Masks:
    masks: Masks = {}
    for site in structure.attention:
        removed = structure.first_heads(site, site.heads // 2)
        _merge(masks, _producing(structure, site, removed))
    for name, module in _torch_attention(structure):
        removed = torch.arange(module.num_heads) < module.num_heads // 2
        _merge(masks, _attention_rows(name, module, removed.repeat_interleave(module.head_dim)))
    return masks


def heads_out(structure: Structure, generator: torch.Generator) -> Masks:
    masks: Masks = {}
    for site in structure.attention:
        consumer = structure.consumer(site)
        odd = torch.arange(site.heads) % 2 == 1
        _merge(masks, consumer.columns(odd.repeat_interleave(consumer.inputs // site.heads)))
    for name, module in _torch_attention(structure):
        odd = (torch.arange(module.num_heads) % 2 == 1).repeat_interleave(module.head_dim)
        _merge(masks, {path(name, "out_proj.weight"): keep(odd)[None]})
    return masks


def dims(structure: Structure, generator: torch.Generator) -> Masks:
    masks: Masks = {}
    for site in structure.attention:
        consumer = structure.consumer(site)
        size = consumer.inputs // site.heads
        half = _paired_half(size, generator)
        _merge(masks, _producing(structure, site, half.repeat(site.heads)))
        for name, heads_rows in _scoring_rows(structure, site).items():
            layer = structure.layer(name)
            removed = torch.zeros(layer.width, dtype=torch.bool)
            for rows in heads_rows:  # fused weights: q before k
                removed[rows[half.repeat(rows.numel() // size)]] = True
            _merge(masks, layer.rows(removed))
    for name, module in _torch_attention(structure):
        half = _paired_half(module.head_dim, generator)
        _merge(masks, _attention_rows(name, module, half.repeat(module.num_heads)))
    return masks


def dims_out(structure: Structure, generator: torch.Generator) -> Masks:
    masks: Masks = {}
    for site in structure.attention:
        consumer = structure.consumer(site)
        size = consumer.inputs // site.heads
        removed = torch.cat([random_half(size, generator) for _ in range(site.heads)])
        _merge(masks, consumer.columns(removed))
    for name, module in _torch_attention(structure):
        removed = torch.cat([random_half(module.head_dim, generator) for _ in range(module.num_heads)])
        _merge(masks, {path(name, "out_proj.weight"): keep(removed)[None]})
    return masks


def _paired_half(size: int, generator: torch.Generator) -> torch.Tensor:
    """Half of the dims of a head such that dims ``d`` and ``d + size / 2``, which rotate together, agree."""
    half = random_half(size // 2, generator).repeat(2)
    return torch.cat([half, half.new_zeros(size - half.numel())])


def _scoring_rows(structure: Structure, site: Site) -> dict[str, list[torch.Tensor]]:
    """Layer name -> for each head, the q or k rows (or q rows, then k rows) that serve that head alone.

    A row that reaches features of both parities is no value row. Keys that several query heads share belong
    to no head alone.
    """
    consumer = structure.consumer(site)
    size = consumer.inputs // site.heads
    feature = torch.arange(consumer.inputs)
    blocks = [feature // size == head for head in range(site.heads)]
    parities = structure.reached(site, [feature % 2 == 0, feature % 2 == 1])
    found: dict[str, list[torch.Tensor]] = {}
    for name, reached in structure.reached(site, blocks).items():
        alone = reached & (reached.sum(0) == 1) & parities[name].all(0)
        rows = [row.nonzero().flatten() for row in alone]
        if all(row.numel() in (size, 2 * size) for row in rows):
            found[name] = rows
    return found


def mlp(structure: Structure, generator: torch.Generator) -> Masks:
    masks: Masks = {}
    for site in structure.mlps:
        removed = random_half(structure.consumer(site).inputs, generator)
        _merge(masks, _producing(structure, site, removed))
    for name, hidden in _experts(structure.model):
        rows = random_half(hidden, generator).repeat(2)
        _merge(masks, {path(name, "gate_up_proj"): keep(rows)[None, :, None]})
    return masks


def mlp_out(structure: Structure, generator: torch.Generator) -> Masks:
    masks: Masks = {}
    for site in structure.mlps:
        consumer = structure.consumer(site)
        _merge(masks, consumer.columns(random_half(consumer.inputs, generator)))
    for name, hidden in _experts(structure.model):
        _merge(masks, {path(name, "down_proj"): keep(random_half(hidden, generator))[None, None]})
    return masks


def _experts(model: nn.Module) -> list[tuple[str, int]]:
    """Names and hidden widths of modules with stacked experts.

    Those hold parameters of shape (experts, 2 * hidden, width) and (experts, width, hidden).
    """
    found = []
    for name, module in model.named_modules():
        gate_up, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
        if gate_up is None or down is None or gate_up.ndim != 3:
            continue
        if gate_up.shape[1] == 2 * down.shape[2] and gate_up.shape[2] == down.shape[1]:
            found.append((name, down.shape[2]))
    return found


def _torch_attention(structure: Structure) -> list[tuple[str, nn.MultiheadAttention]]:
    modules = structure.model.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, nn.MultiheadAttention)]


def _producing(structure: Structure, site: Site, removed: torch.Tensor) -> Masks:
    masks: Masks = {}
    for name, rows in structure.producers(site, removed).items():
        if name != structure.last:
            _merge(masks, structure.layer(name).rows(rows))
    return masks


def _merge(masks: Masks, more: Masks) -> None:
    for name, mask in more.items():
        masks[name] = masks[name] * mask if name in masks else mask


MASKINGS: dict[str, Masking] = {
    function.__name__: function
    for function in (zeros, constants, conflicts, heads, heads_out, dims, dims_out, mlp, mlp_out)
}


def make_masks(
    model: nn.Module, inputs: Inputs, names: list[str] | None = None, seed: int = 0, full: bool = False
) -> dict[str, Masks]:
    """The maskings that a model has a place for.

    Args:
        model: the model; a copy of it is run once.
        inputs: what it is run with.
        names: of the wanted maskings; all by default.
        seed: of the random choices.
        full: give every mask its parameter's shape; else masks broadcast to it, which keeps them small.

    Returns:
        Masking name -> masks by ``"module.parameter"``, 1 = keep.
    """
    model = copy.deepcopy(model).eval().requires_grad_(True)  # modules may cache what they compute
    structure = Structure(model, inputs)
    found = {}
    for name in MASKINGS if names is None else names:
        masks = MASKINGS[name](structure, torch.Generator().manual_seed(seed))
        masks = _once_a_parameter(model, masks)
        if full:
            parameters = dict(model.named_parameters())
            masks = {key: mask.expand(parameters[key].shape).clone() for key, mask in masks.items()}
        if masks:
            found[name] = masks
    return found


def _once_a_parameter(model: nn.Module, masks: Masks) -> Masks:
    """Masks of tied parameters multiplied, under the parameter's first name; masks of ones left out."""
    first: dict[int, str] = {}
    merged: Masks = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
        if name in masks and not masks[name].all():
            _merge(merged, {first[id(parameter)]: masks[name]})
    return merged
