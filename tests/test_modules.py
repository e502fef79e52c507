"""The walk over a model's modules tells what torch's own walks tell."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskprop.graph.trace import split_inputs, trace
from maskprop.modules import modules_by_path, named_tensors, own_tensors


class Shared(nn.Module):
    """Modules and tensors under several names, a child that is none, a tensor that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.none = None
        self.register_module("empty", None)
        self.b = nn.ModuleDict({"again": self.a, "tied": nn.Linear(3, 3)})
        self.b["tied"].weight = self.a[0].weight
        self.register_buffer("hidden", torch.ones(3), persistent=False)
        self.bare = torch.ones(2)


def test_modules_in_torchs_order() -> None:
    for model in (Shared(), nn.Linear(2, 2), torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))):
        assert list(modules_by_path(model).items()) == list(model.named_modules())
        assert list(modules_by_path(model, aliases=True).items()) == list(model.named_modules(remove_duplicate=False))


def test_tensors_under_all_names() -> None:
    model = Shared()
    found = dict(named_tensors(modules_by_path(model, aliases=True)))
    expected = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    assert {name: id(t) for name, t in found.items()} == {name: id(t) for name, t in expected.items()}
    assert own_tensors(model).keys() == {"hidden"}
    assert own_tensors(model, bare=True).keys() == {"hidden", "bare"}


class Named(nn.Module):
    """A child whose arguments have the names that a wrapper of its call might use."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, module: Tensor, path: Tensor, *, call: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(module + path) + call)


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Named()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.child(module=x, path=x, call=x))


def test_calls_are_followed_whatever_their_arguments_are_called() -> None:
    model, plain = Caller(), vars(nn.Module)["__call__"]
    graph = trace(model, split_inputs(torch.ones(2, 3)))
    assert [call.path for call in graph.history] == ["", "child", "child.fc"]
    assert {str(op.meta["path"]) for op in graph.ops} == {"child", "child.fc"}
    assert vars(nn.Module)["__call__"] is plain
    assert all("_compiled_call_impl" not in vars(module) for module in model.modules())


def test_a_module_that_is_compiled_is_followed_and_stays_compiled() -> None:
    model = Caller()
    model.child.compile(backend="eager")
    compiled = model.child._compiled_call_impl
    graph = trace(model, split_inputs(torch.ones(2, 3)))
    assert [call.path for call in graph.history] == ["", "child", "child.fc"]
    assert model.child._compiled_call_impl is compiled


class NamedArguments(nn.Module):
    """Calls torch's batch norm itself, by the names of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        settings = {"training": False, "momentum": 0.1, "eps": norm.eps, "cudnn_enabled": False}
        return torch.batch_norm(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, **settings)


def test_batch_norm_called_by_the_names_of_its_arguments() -> None:
    graph = trace(NamedArguments().eval(), split_inputs(torch.ones(2, 3)))
    assert [op.target for op in graph.ops if "batch_norm" in str(op.target)] != []
