"""NNI's masks on activations, written into the recorded graph as multiplications."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from maskprop.errors import MaskShapeError, UnknownMaskError
from maskprop.graph.graph import Graph, TensorMeta, shape_of
from maskprop.graph.paths import within
from maskprop.graph.structure import tensors_in

aten = torch.ops.aten


def insert_activation_masks(graph: Graph, model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Multiply module outputs (``_output_0``) and inputs (``_input_x``) by their masks.

    Args:
        graph: changed in place; the inserted nodes carry ``meta["inserted"]``.
        model: for the names of a forward's arguments.
        masks: by module path and NNI's target name.

    Raises:
        UnknownMaskError: the module made no such output or has no such argument.
        MaskShapeError: the mask does not broadcast to the activation.
    """
    for path, targets in masks.items():
        for target, mask in targets.items():
            kind, _, which = target.removeprefix("_").partition("_")
            node = _output(graph, path, which) if kind == "output" else _input(graph, model, path, which)
            if node is None:
                raise UnknownMaskError(
                    f"mask '{path}.{target}': the forward of '{path}' has no such {kind} tensor on this "
                    "dummy input. Check the name, or leave the mask out."
                )
            try:
                ok = torch.broadcast_shapes(mask.shape, shape_of(node)) == torch.Size(shape_of(node))
            except RuntimeError:
                ok = False
            if not ok:
                raise MaskShapeError(
                    f"mask '{path}.{target}' has shape {tuple(mask.shape)}; the activation has shape "
                    f"{shape_of(node)}. Give a mask that broadcasts to it."
                )
            _insert(graph, node, mask, path, inside=kind == "input")


def _output(graph: Graph, path: str, which: str) -> fx.Node | None:
    found = [n for _, n in tensors_in(graph.results.get(path), kind=fx.Node)]
    return found[int(which)] if which.isdigit() and int(which) < len(found) else None


def _input(graph: Graph, model: nn.Module, path: str, which: str) -> fx.Node | None:
    if path not in graph.calls:
        return None
    module = model.get_submodule(path)
    args, kwargs = graph.calls[path]
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    value = bound.get(which)
    return value if isinstance(value, fx.Node) else None


def _insert(graph: Graph, node: fx.Node, mask: Tensor, path: str, inside: bool) -> None:
    name = f"_activation_mask{len(graph.state)}"
    readers = [u for u in node.users if not inside or within(str(u.meta.get("path")), [path])]
    meta = node.meta["tensor"]
    graph.state[name] = mask.to(dtype=meta.dtype)
    with graph.fx.inserting_after(node):
        source = graph.fx.create_node("get_attr", name)
    with graph.fx.inserting_after(source):
        product = graph.fx.call_function(aten.mul.Tensor, (node, source))
    for one, tensor in ((source, TensorMeta.of(graph.state[name])), (product, meta)):
        one.meta.update({**node.meta, "tensor": tensor, "inserted": True})
    for reader in readers:
        reader.replace_input_with(node, product)
