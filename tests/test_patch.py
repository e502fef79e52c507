"""Numbers in an author's forward that are changed in place: every other branch and argument of it goes on working."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskprop
from benchmarks.zoo.check import masked_reference, relative_error
from maskprop import ModelSpeedup
from maskprop.errors import LoadError
from maskprop.rewrite.authored import NoSource, Patch, Place
from maskprop.rewrite.patched import patched_class

WIDTH, HEADS = 12, 3
PARTS = ("weight", "bias")


class Attention(nn.Module):
    """Query, key and value are cut by one attribute; masks, causality and a cache choose other branches.

    What its gate writes in place, nothing reads through the view that was written to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS
        self.gate = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def cut(self, y: Tensor) -> Tensor:
        """Called for queries, keys and values, of which one alone changes."""
        return y.view(*y.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, cache: list[Tensor] | None = None) -> Tensor:
        x = x + self.gate(x)
        q, k, v = self.cut(self.q(x)), self.cut(self.k(x)), self.cut(self.v(x))
        if cache is not None:
            cache[:] = k, v = [torch.cat(pair, 2) for pair in zip(cache, (k, v), strict=False)] if cache else [k, v]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and x.shape[1] > 1)
        return self.out(y.transpose(1, 2).flatten(2))


def by_folding(x: Tensor, heads: int, batch: int) -> Tensor:
    """Heads join the batch, in a function of the author's that the forward calls."""
    return x.reshape(batch, -1, heads, WIDTH // heads).transpose(1, 2).reshape(batch * heads, -1, WIDTH // heads)


class Folding(nn.Module):
    """A head dim that is computed from a width, in a helper, in a method and beneath a square root."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def join(self, y: Tensor, batch: int) -> Tensor:
        y = y.reshape(batch, HEADS, -1, WIDTH // HEADS)
        return y.transpose(1, 2).reshape(batch, -1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        q, k, v = self.qkv(x).split(WIDTH, dim=-1)
        q, k, v = (by_folding(t, HEADS, batch) for t in (q, k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(WIDTH // HEADS)
        return self.out(self.join(scores.softmax(-1) @ v, batch))


def made(kind: type[nn.Module], masks: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """A sped-up model, and the masked one; weights large enough that no softmax is uniform."""
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 5, WIDTH), masks).speedup_model()
    assert type(model).__mro__[1] is kind
    return model, reference


def value_dims() -> dict[str, Tensor]:
    """One dim of every head, by the output's columns: values lose it, queries and keys do not."""
    return {"out.weight": torch.tensor([1.0, 0, 1, 1]).repeat(HEADS)[None]}


def test_other_branches_and_arguments_go_on_working() -> None:
    model, reference = made(Attention, value_dims())
    assert model.v.out_features == 9
    assert model.q.out_features == WIDTH
    x, step = torch.randn(3, 7, WIDTH), torch.randn(3, 1, WIDTH)
    mask = torch.rand(3, 1, 7, 7) < 0.7
    mask |= torch.eye(7, dtype=torch.bool)
    for arguments in ({}, {"mask": mask}):
        assert relative_error(model(x, **arguments), reference(x, **arguments)) < 1e-5
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for part in (x, step):  # the second without a causal mask
        assert relative_error(model(part, cache=ours), reference(part, cache=theirs)) < 1e-5
    assert [t.shape[-1] for t in ours] == [4, 3]


@pytest.mark.parametrize("left", [3, 2])
def test_helpers_methods_scales_and_folded_batches(left: int) -> None:
    keep = (torch.arange(WIDTH // HEADS) < left).float().repeat(HEADS)
    masks = {"qkv.weight": keep.repeat(3)[:, None], "qkv.bias": keep.repeat(3)}
    model, reference = made(Folding, masks)
    assert model.qkv.out_features == 3 * HEADS * left
    for batch, length in ((1, 4), (3, 6)):  # a folded batch scales with the batch
        x = torch.randn(batch, length, WIDTH)
        assert relative_error(model(x), reference(x)) < 1e-5


def test_they_pickle_copy_train_compile_and_load(tmp_path: Path) -> None:
    model, _ = made(Attention, value_dims())
    x = torch.randn(2, 4, WIDTH)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    maskprop.save(model, tmp_path)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        maskprop.load(tmp_path, Attention),
        torch.compile(model, backend="eager"),
    ]
    for other in copies:
        assert torch.equal(other(x), expected)
    model.train()(x).sum().backward()
    assert model.v.weight.grad is not None
    assert model.v.weight.grad.shape == (9, WIDTH)


def test_twice_is_once_after_the_other(tmp_path: Path) -> None:
    model, reference = made(Attention, value_dims())
    masks = {"out.weight": torch.tensor([1.0, 1, 0]).repeat(HEADS)[None]}
    ModelSpeedup(model, torch.randn(2, 5, WIDTH), masks).speedup_model()
    with torch.no_grad():
        reference.out.weight.mul_(torch.tensor([1.0, 0, 1, 0]).repeat(HEADS))
    x = torch.randn(3, 6, WIDTH)
    assert model.v.out_features == 6
    assert relative_error(model(x), reference(x)) < 1e-5
    maskprop.save(model, tmp_path)
    assert torch.equal(maskprop.load(tmp_path, Attention)(x), model(x))


def test_a_plan_holds_no_code_and_fits_one_version_of_the_author(tmp_path: Path) -> None:
    model, _ = made(Attention, value_dims())
    maskprop.save(model, tmp_path)
    plan: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
    described = plan["parts"][""]["steps"][0]["modules"][""]["class"]
    (patch,) = described["patches"]
    assert patch["value"] == [[3, 3, 4]]
    assert patch["place"]["function"] == ["forward", "self.cut"]
    described["text"] = "import os"  # only for reading: it is never run
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    maskprop.load(tmp_path, Attention)
    patch["place"]["digest"] = "0" * 16
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(LoadError, match="the forward of '' was changed in places that cannot be found again"):
        maskprop.load(tmp_path, Attention)


def test_places_that_are_not_there() -> None:
    for function in (("missing",), ("forward", "missing"), ("forward", "self.missing")):
        patch = Patch(Place(function, ((1, 0, 1, 5),) * (len(function) - 1), (1, 0, 1, 5), "0"), "number", 0, 1.0)
        with pytest.raises(NoSource):
            patched_class(Attention, (patch,))


class Branching(nn.Module):
    """Three ways to attend, each with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor, way: str) -> Tensor:
        scale = math.sqrt(self.head_dim) if way == "attribute" else q.size(-1) ** 0.5
        return (q @ k.transpose(-1, -2) / scale).softmax(-1) @ v

    def forward(self, x: Tensor, way: str = "torch") -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v) if way == "torch" else self.by_hand(q, k, v, way)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("taken", ["torch", "attribute", "size"])
def test_branches_that_were_not_taken_keep_their_scale(taken: str) -> None:
    gone = torch.tensor([1.0, 0, 1, 1]).repeat(HEADS)
    masks = {f"{name}.{part}": gone[:, None] if part == "weight" else gone for name in "qkv" for part in PARTS}
    model = Branching()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    reference = masked_reference(model, masks)
    ModelSpeedup(model, {"x": torch.randn(2, 5, WIDTH), "way": taken}, masks).speedup_model()
    assert model.q.out_features == 9
    x = torch.randn(3, 7, WIDTH)
    for way in ("torch", "attribute", "size"):
        assert relative_error(model(x, way), reference(x, way)) < 1e-5
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x), model(x))


class Settings:
    """Shared by all modules of a model, which read it as they run."""

    def __init__(self) -> None:
        self.heads, self.dims, self.gain = HEADS, WIDTH // HEADS, 1.0


class Configured(nn.Module):
    """Reads the number of its heads from settings, in the forward and in a method."""

    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def cut(self, y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], self.config.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        width = self.config.heads * self.config.dims
        qkv = self.qkv(x)
        q, k, v = self.cut(qkv[..., :width]), self.cut(qkv[..., width : 2 * width]), self.cut(qkv[..., 2 * width :])
        y = F.scaled_dot_product_attention(q * self.config.gain, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def configured() -> nn.Module:
    config = Settings()
    return nn.Sequential(Configured(config), Configured(config))


def test_settings_that_modules_share_go_on_being_shared(tmp_path: Path) -> None:
    one_head = {f"0.qkv.{part}": torch.arange(3 * WIDTH) % WIDTH >= WIDTH // HEADS for part in PARTS}
    one_head["0.qkv.weight"] = one_head["0.qkv.weight"][:, None]
    model = configured()
    reference = masked_reference(model, one_head)
    x = torch.randn(3, 6, WIDTH)
    ModelSpeedup(model, x, {name: mask.float() for name, mask in one_head.items()}).speedup_model()
    assert model[0].qkv.out_features == 2 * WIDTH
    assert model[0].config is model[1].config
    for one in (model, reference):
        one[1].config.gain = 2.0
    assert relative_error(model(x), reference(x)) < 1e-5
    maskprop.save(model, tmp_path)
    loaded = maskprop.load(tmp_path, configured)
    loaded[0].config.gain = 2.0
    assert torch.equal(loaded(x), model(x))
    another = torch.tensor([1.0, 0]).repeat_interleave(WIDTH // HEADS)
    ModelSpeedup(model, x, {"0.out.weight": another[None]}).speedup_model()
    with torch.no_grad():
        reference[0].out.weight[:, 2 * WIDTH // HEADS :] = 0
    assert model[0].qkv.out_features == WIDTH
    assert relative_error(model(x), reference(x)) < 1e-5


class Stretching(nn.Module):
    """Long sequences take another branch, and no source tells which number to change: the forward is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def _forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.shape[1] > 6:
            y = y * 2
        if y.shape[-1] == WIDTH:
            y = y.view(x.shape[0], -1, WIDTH // 2, 2).flip(-1).flatten(2)
        return self.b(y)

    forward = types.FunctionType(_forward.__code__.replace(co_filename="<nowhere>"), _forward.__globals__)


def test_a_traced_forward_refuses_calls_that_take_another_branch() -> None:
    masks = {f"a.{part}": (torch.arange(WIDTH) > 3).float() for part in PARTS}
    masks["a.weight"] = masks["a.weight"][:, None]
    model = Stretching()
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 5, WIDTH), masks).speedup_model()
    assert model.a.out_features == WIDTH - 4
    assert hasattr(type(model), "generated_source")
    x = torch.randn(3, 6, WIDTH)
    assert relative_error(model(x), reference(x)) < 1e-5
    with pytest.raises(AssertionError, match="speed the model up with inputs such as these"):
        model(torch.randn(3, 7, WIDTH))


class NumpyScale(nn.Module):
    """One attribute cuts queries, keys and values; numpy computes the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = WIDTH // HEADS
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, HEADS, self.dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)) / np.sqrt(self.dim), self.heads(self.v(x))
        return self.out(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_forward_that_is_written_anew_needs_no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskprop.rewrite.repair.patch_forwards", lambda *_: [])
    model, reference = made(NumpyScale, value_dims())
    assert model.v.out_features == 9
    x = torch.randn(3, 7, WIDTH)
    assert relative_error(model(x), reference(x)) < 1e-5
