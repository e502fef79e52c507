"""`maskprop prune`, from a model's name to a file of masks that speeds it up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from maskprop import ModelSpeedup, cli
from maskprop.pruning import measure

MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4))
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    return f"{tmp_path / 'model.py'}:build"


def test_masks_that_leave(factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "masks.pt"
    arguments = [
        "prune",
        factory,
        "--input",
        "1,8,8",
        "--ratio",
        "0.5",
        "--out",
        str(out),
        "--json",
        "--no-progress",
    ]
    assert cli.main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(g["name"], g["before"], g["after"]) for g in facts["groups"]] == [("0", 8, 4), ("2", 6, 3)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4))
    x = torch.randn(2, 1, 8, 8)
    ModelSpeedup(model, x, str(out)).speedup_model()
    cost = measure(model, ((x,), {}))
    assert facts["parameters"]["after"] == cost.parameters
    assert facts["flops"]["after"] == cost.flops


def test_table(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune", factory, "--input", "1,8,8", "--ignore", "0", "--score", "fpgm"]) == 0
    out = capsys.readouterr().out
    assert "parameters 906 → " in out
    assert "channel" in out


def test_budgets(factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A share or a number, of parameters or of operations; the masks in any form that compact reads."""
    base = ["prune", factory, "--input", "1,8,8", "--json", "--no-progress"]
    assert cli.main(base) == 0
    dense = {k: v["before"] for k, v in json.loads(capsys.readouterr().out).items() if k in ("parameters", "flops")}
    for options, what, most in (
        (["--max-parameters", "0.4"], "parameters", 0.4 * dense["parameters"]),
        (["--max-parameters", "40%"], "parameters", 0.4 * dense["parameters"]),
        (["--max-parameters", "0.5K", "--max-flops", "0.9"], "parameters", 500),
        (["--max-flops", str(dense["flops"] // 2)], "flops", dense["flops"] // 2),
    ):
        out = str(tmp_path / "masks.safetensors")
        assert cli.main([*base, *options, "--out", out]) == 0
        after = json.loads(capsys.readouterr().out)[what]["after"]
        assert 0.6 * most < after <= most
        small = str(tmp_path / "small")
        assert cli.main(["compact", factory, "--input", "1,8,8", "--masks", out, "--out", small, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[what]["after"] == after
    with pytest.raises(SystemExit) as stopped:
        cli.main([*base, "--max-flops", "much"])
    assert stopped.value.code == 2
    assert "'much' is neither a share, as 0.4 or 40%, nor a number" in capsys.readouterr().err


def test_faults(factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, text in (
        (["--ratio", "1.5"], "RatioError: ratio: the share to prune is 1.5"),
        (["--ignore", "nowhere"], "SelectorError: 'nowhere' matches no module"),
        (["--out", str(tmp_path / "no" / "masks.pt")], "OptionError"),
    ):
        assert cli.main(["prune", factory, "--input", "1,8,8", *options]) == 1
        assert text in capsys.readouterr().err
