"""Attributes of ``torch.nn`` leaves that follow the shapes of their tensors.

Found by the type's MRO, so that subclasses are served; a leaf's attributes are a function of its sliced tensors and
of which units stayed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from maskprop.align.plan import Plan
from maskprop.rewrite.edits import Edits

Update = Callable[[nn.Module, "LeafPlan"], dict[str, object]]
_UPDATES: dict[type, Update] = {}


class _UnlikeError(Exception):
    """A subclass holds other tensors than its base, so that nothing is known of its attributes."""


class LeafPlan:
    """What the plan says about one module's own tensors; without a plan, all of them stay."""

    def __init__(self, plan: Plan | None, path: str) -> None:
        self._plan, self._dot = plan, path + "." if path else ""

    def blocks(self, key: str, count: int, tensor: Tensor) -> int:
        """Of ``count`` equal blocks of a tensor's rows, how many keep a row."""
        if self._plan is None:
            return count
        name = self._dot + key
        keeps = self._plan.keep.get(name, [])
        rows = next((k.index for k in keeps if k.axis == 0), None)
        if rows is None:
            return count
        size = self._plan.shapes[name][0] // count
        return len(rows) if size == 1 else len(torch.unique(rows // size))


def leaf(*types: type) -> Callable[[Update], Update]:
    """Register the update of module types."""

    def add(update: Update) -> Update:
        for t in types:
            _UPDATES[t] = update
        return update

    return add


def following(modules: Mapping[str, nn.Module], plan: Plan) -> dict[str, set[str]]:
    """The attributes of every leaf whose tensors will shrink that are what its class makes of its tensors.

    Asked before anything shrinks: in a subclass an attribute may mean something else.
    """
    found = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in plan.keep):
        module = modules.get(path)
        update = _update_of(module)
        if module is not None and update is not None:
            try:
                dense = update(module, LeafPlan(None, path))
            except _UnlikeError:
                continue
            found[path] = {name for name, value in dense.items() if getattr(module, name, value) == value}
    return found


def update_leaves(
    edits: Edits, modules: Mapping[str, nn.Module], plan: Plan, names: Mapping[str, Collection[str]]
) -> None:
    """Set the attributes of every leaf whose tensors shrank, those named by :func:`following`."""
    for path, follows in names.items():
        module = modules[path]
        update = _update_of(module)
        assert update is not None
        for name, value in update(module, LeafPlan(plan, path)).items():
            if name in follows and getattr(module, name, None) != value:
                edits.set_attribute(module, name, value)


def _update_of(module: nn.Module | None) -> Update | None:
    return next((_UPDATES[t] for t in type(module).__mro__ if t in _UPDATES), None)


def _shape(module: nn.Module, name: str, axes: int | None = None) -> tuple[int, ...]:
    """The shape of a tensor; ``_UnlikeError`` where a subclass holds no such tensor, or with other axes."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor) or axes not in (None, tensor.ndim):
        raise _UnlikeError
    return tuple(tensor.shape)


@leaf(nn.Linear)
def _linear(module: nn.Module, plan: LeafPlan) -> dict[str, object]:
    out, into = _shape(module, "weight", 2)
    return {"out_features": out, "in_features": into}


@leaf(nn.Bilinear)
def _bilinear(module: nn.Module, plan: LeafPlan) -> dict[str, object]:
    out, left, right = _shape(module, "weight", 3)
    return {"out_features": out, "in1_features": left, "in2_features": right}


@leaf(nn.modules.conv._ConvNd)
def _conv(module: nn.Module, plan: LeafPlan) -> dict[str, object]:
    assert isinstance(module, nn.modules.conv._ConvNd)
    rows, columns, *_ = _shape(module, "weight")
    groups = plan.blocks("weight", module.groups, module.weight) if module.groups > 1 else 1
    if module.transposed:
        return {"in_channels": rows, "out_channels": columns * groups, "groups": groups}
    return {"out_channels": rows, "in_channels": columns * groups, "groups": groups}


@leaf(nn.modules.batchnorm._NormBase)
def _batch_norm(module: nn.Module, plan: LeafPlan) -> dict[str, object]:
    tensor = next(t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.ndim == 1)
    return {"num_features": tensor.shape[0]}


@leaf(nn.GroupNorm)
def _group_norm(module: nn.Module, plan: LeafPlan) -> dict[str, object]:
    assert isinstance(module, nn.GroupNorm)
    return {
        "num_channels": _shape(module, "weight")[0],
        "num_groups": plan.blocks("weight", module.num_groups, module.weight),
    }


@leaf(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(module: nn.Module, plan: LeafPlan) -> dict[str, object]:
    return {"normalized_shape": _shape(module, "weight")}


@leaf(nn.PReLU)
def _prelu(module: nn.Module, plan: LeafPlan) -> dict[str, object]:
    return {"num_parameters": _shape(module, "weight")[0]}


@leaf(nn.Embedding, nn.EmbeddingBag)
def _embedding(module: nn.Module, plan: LeafPlan) -> dict[str, object]:
    rows, columns = _shape(module, "weight", 2)
    return {"num_embeddings": rows, "embedding_dim": columns}


@leaf(nn.RNNBase)
def _recurrent(module: nn.Module, plan: LeafPlan) -> dict[str, object]:
    assert isinstance(module, nn.RNNBase)
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    hidden = _shape(module, "weight_ih_l0")[0] // gates
    found: dict[str, object] = {"input_size": _shape(module, "weight_ih_l0")[1], "hidden_size": hidden}
    if module.proj_size:
        found["proj_size"] = _shape(module, "weight_hh_l0")[1]
    return found


@leaf(nn.RNNCellBase)
def _cell(module: nn.Module, plan: LeafPlan) -> dict[str, object]:
    return {"input_size": _shape(module, "weight_ih")[1], "hidden_size": _shape(module, "weight_hh")[1]}
