"""Every handmade model, sped up: it is explained whole, reported, saved, and loaded bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import maskprop
from benchmarks.zoo.check import relative_error
from benchmarks.zoo.handmade import HANDMADE
from benchmarks.zoo.maskings import make_masks
from benchmarks.zoo.randomise import randomise
from benchmarks.zoo.specimen import call
from maskprop import ModelSpeedup


@pytest.mark.parametrize("name", HANDMADE)
def test_report_save_load(name: str, tmp_path: Path) -> None:
    specimen = HANDMADE[name]
    model = randomise(specimen.build().eval(), specimen.inputs())
    masks = make_masks(model, specimen.inputs())
    speedup = ModelSpeedup(model, specimen.inputs(), masks.get("conflicts", next(iter(masks.values()))))
    speedup.speedup_model()

    text = str(speedup.report)
    assert f"parameters    {speedup.report.parameters[0]:,}" in text
    assert "<svg" in speedup.report.to_html()
    for parameter, node in speedup.alignment.states.items():
        for axis, size in enumerate(node.meta["tensor"].shape):
            found = speedup.explain(parameter, axis)
            assert len(found.units) == size
            assert all(reason.text for reason in found.units)

    maskprop.save(model, tmp_path)
    loaded = maskprop.load(tmp_path, specimen.build).eval()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])
    inputs = specimen.inputs(3, seed=5)
    with torch.no_grad():
        assert relative_error(call(loaded, inputs), call(model, inputs)) == 0
