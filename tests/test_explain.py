"""Every unit has a reason, and the reasons are the true ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from maskprop import ModelSpeedup
from maskprop.errors import OptionError, StageError
from maskprop.reasons import ranges
from tests.models import Block, ConvNet, Transformer, example, randomise, rows, sped_up


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""


def test_a_pruned_channel_stays_where_it_meets_a_live_one(generator: torch.Generator) -> None:
    model = randomise(ConvNet(), generator)
    with torch.no_grad():
        model.block.conv2.bias.abs_().neg_()
    masks = {**rows(model, "stem", [1, 2]), **rows(model, "block.conv2", [2])}
    speedup = ModelSpeedup(model, example(model, 2, generator), masks)
    speedup.speedup_model()
    found = speedup.explain("stem")
    assert found.parameter == "stem.weight"
    assert found.left == [2]  # both writers of channel 2 are pruned
    kept = found.units[1]
    assert kept.text == "it meets 'block.conv2' at add in 'block', where it is live, and 'head' reads it"
    assert kept.reader == "head"
    assert kept.writers == ("block.conv2",)
    assert kept.path == ("stem", "block (add)", "block", "ConvNet", "head")
    assert found.units[0].text == "'block.conv1' reads it"
    assert "kept 1: it meets 'block.conv2' at add" in str(found)
    assert found.to_dict()["reasons"][0]["units"] == [0, 3, 4, 5, 6, 7]
    in_notebook = found._repr_html_()
    assert "stem.weight, axis 0: 7 of 8 units stay" in in_notebook
    assert ">0, 3-7</td>" in in_notebook
    assert "&#x27;block.conv2&#x27; at add" in in_notebook


def test_units_that_left_say_where_their_constant_went(generator: torch.Generator) -> None:
    speedup = sped_up(ConvNet(), generator)
    found = speedup.explain("block.conv1")
    texts = {found.units[i].text for i in found.left}
    assert len(found.left) + len(found.stayed) == 12
    assert texts <= {
        "it is zero for every input at 'block.conv2'",
        "it is a constant, which the constant unit that stays carries for 'block.conv2'",
    }
    masked = {0, 3, 5}
    assert set(found.left) <= masked
    for unit in masked - set(found.left):
        assert found.units[unit].text == "it carries the constants of the units that left"


def test_consumer_columns(generator: torch.Generator) -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), generator)
    mask = torch.ones(1, 6)
    mask[0, [1, 4]] = 0
    speedup = ModelSpeedup(model, torch.randn(2, 4, generator=generator), {"2.weight": mask})
    speedup.speedup_model()
    found = speedup.explain("2", axis=1)
    assert found.left == [1, 4]
    assert {found.units[i].text for i in found.left} == {"the weights of '2' that read it are zero"}
    assert speedup.explain("0.bias").left == [1, 4]
    inputs = speedup.explain("0", axis=-1)
    assert inputs.left == []
    assert "cannot shrink" in inputs.units[0].text


def test_heads_leave_whole(generator: torch.Generator) -> None:
    speedup = sped_up(Transformer(), generator)
    found = speedup.explain("encoder.layers.0.self_attn.in_proj_weight")
    assert found.left == [*range(4), *range(16, 20), *range(32, 36)]
    for axis in (0, 1):
        for reason in speedup.explain("encoder.layers.1.self_attn.out_proj", axis).units:
            assert reason.text


def test_restored_units_say_so(generator: torch.Generator) -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), generator)
    speedup = ModelSpeedup(
        model, torch.randn(2, 4, generator=generator), rows(model, "0", [0, 1, 2]), channel_multiple=4
    )
    speedup.speedup_model()
    assert model[0].out_features == 8
    texts = {speedup.explain("0").units[i].text for i in (0, 1, 2)}
    assert texts == {"channel_multiple=4 asks for a multiple of that many units"}
    assert [k.units for k in speedup.report.kept] == [(0, 1, 2)]


def test_faults(generator: torch.Generator) -> None:
    model = randomise(ConvNet(), generator)
    speedup = ModelSpeedup(model, example(model, 2, generator), rows(model, "stem", [0]))
    with pytest.raises(StageError, match="Call speedup_model first"):
        speedup.explain("stem")
    speedup.speedup_model()
    with pytest.raises(OptionError, match=r"'stem\.weight' has 4 axes, so axis 4 does not exist"):
        speedup.explain("stem", 4)
    with pytest.raises(OptionError, match="no parameter or module 'nothing'"):
        speedup.explain("nothing")
    with pytest.raises(OptionError, match=r"'block' has no weight of its own.*'block.conv1.weight'"):
        speedup.explain("block")


def test_explaining_changes_nothing(generator: torch.Generator) -> None:
    speedup = sped_up(ConvNet(), generator)
    before = copy.deepcopy(speedup.model.state_dict())
    assert isinstance(speedup.model.get_submodule("block"), Block)
    speedup.report.to_html()
    speedup.explain("stem")
    after = speedup.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
