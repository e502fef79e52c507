"""The command line: help, faults of the user, and the demo from end to end."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from maskprop import __version__, cli
from maskprop.commands import Command, load_commands
from maskprop.demo.digits import DigitNet, l1_masks, load_digits
from maskprop.demo.run import Result, demo
from maskprop.errors import MissingExtraError


def test_commands() -> None:
    names = [command.name for command in load_commands()]
    assert len(set(names)) == len(names)
    assert "demo" in names


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, text in ((["--version"], __version__), (["--help"], "demo"), (["demo", "--help"], "--out DIR")):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 0
        assert text in capsys.readouterr().out


def test_help_does_not_load_torch() -> None:
    code = "import sys\nfrom maskprop import cli\ncli.build_parser()\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1"], "OptionError: --sparsity is 1.0; it is a share, at least 0 and below 1."),
        (["--epochs", "0"], "OptionError: --epochs is 0; give at least 1."),
        (["--out", "{file}/x"], "OptionError: --out {file}/x: this directory cannot be created"),
    ],
)
def test_faults(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["demo", *(option.format(file=file) for option in options)]) == 1
    assert capsys.readouterr().err.startswith(message.format(file=file))


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    command = Command("wait", "Wait.", lambda parser: None, run)
    monkeypatch.setattr(cli, "load_commands", lambda: [command])
    assert cli.main(["wait"]) == 130


def test_demo_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"maskprop demo needs the package 'sklearn'.*maskprop\[report\]"):
        demo(Console(quiet=True), None, sparsity=0.5, epochs=1, seed=0, progress=False)


def test_digits_are_split(generator: torch.Generator) -> None:
    digits = load_digits(generator)
    assert digits.images.shape == (1438, 1, 8, 8)
    assert digits.test_images.shape == (359, 1, 8, 8)
    assert digits.images.max() == 1
    assert sorted(digits.test_labels.unique().tolist()) == list(range(10))
    train = {tuple(image.flatten().tolist()) for image in digits.images}
    assert not any(tuple(image.flatten().tolist()) in train for image in digits.test_images)


def test_l1_masks() -> None:
    model = DigitNet((4, 8, 8))
    masks = l1_masks(model, 0.5)
    assert {name: int(mask["weight"].sum()) for name, mask in masks.items()} == {
        "conv": 3,
        **{f"stages.0.{i}.conv1": 2 for i in (0, 1)},
        **{f"stages.0.{i}.conv2": 3 for i in (0, 1)},
        **{f"stages.{s}.{i}.conv1": 4 for s in (1, 2) for i in (0, 1)},
        **{f"stages.{s}.{i}.conv2": 6 for s in (1, 2) for i in (0, 1)},
        **{f"stages.{s}.0.shortcut.0": 6 for s in (1, 2)},
    }
    norms = model.get_parameter("stages.0.0.conv1.weight").abs().sum((1, 2, 3))
    kept = masks["stages.0.0.conv1"]["weight"].flatten().bool()
    assert norms[kept].min() >= norms[~kept].max()
    assert torch.equal(masks["conv"]["weight"], masks["stages.0.1.conv2"]["weight"])  # one residual stream


def run_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    state = torch.get_rng_state()
    assert cli.main(["demo", "--epochs", "1", "--out", str(tmp_path / "new" / "out")]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    return capsys.readouterr().out


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run_demo(tmp_path, capsys)
    for row in (
        "test accuracy",
        "parameters",
        "FLOPs",
        "file size",
        "latency (batch 64)",
        "output difference",
    ):
        assert row in text
    assert "Training" in text  # the progress bar
    assert "Fine-tuned for one epoch" in text

    out = tmp_path / "new" / "out"
    assert {path.name for path in out.iterdir()} == {"report.txt", "report.json", "table.json", "widths.png"}
    assert (out / "widths.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "report.json").read_text())
    assert (out / "report.txt").read_text().strip()

    table = {name: Result(**row) for name, row in json.loads((out / "table.json").read_text()).items()}
    dense, masked, compact = table["dense"], table["masked"], table["compact"]
    assert compact.accuracy == masked.accuracy
    assert compact.difference < 1e-4 < dense.difference
    assert dense.parameters == masked.parameters > 2 * compact.parameters
    assert dense.flops == masked.flops > 2 * compact.flops
    assert dense.bytes > 2 * compact.bytes
    assert min(result.latency_1 for result in table.values()) > 0


def test_demo_without_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """As data: JSON alone on stdout, the table beside it on stderr, and no bars."""
    assert cli.main(["demo", "--epochs", "1", "--no-progress", "--json"]) == 0
    out, err = capsys.readouterr()
    assert set(json.loads(out)) == {"dense", "masked", "compact"}
    assert "compact" in err
    assert "Training" not in err
