"""The command line on models of every form: results, JSON, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import maskprop
from maskprop import cli
from maskprop.commands import load_commands
from maskprop.commands.sources import find_model, make_inputs
from maskprop.errors import ModelNameError, OptionError

CODE = """
from torch import nn


def build(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids, *, scale=None):
        x = self.b(self.a(self.embed(ids)).relu())
        return x if scale is None else x * scale[:, None, None]


def number():
    return 3


def broken():
    raise ValueError("a first line\\nand a second")
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in a directory with a factory and masks; its status and what it wrote."""
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "hi.pt").write_text("hi")
    mask = torch.ones(8, 1, 1, 1)
    mask[:3] = 0
    save_file({"0.weight": mask, "0.bias": mask.flatten().clone()}, tmp_path / "masks.safetensors")
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> tuple[int, str, str]:
        state = torch.get_rng_state()
        status = cli.main([*argv])
        assert torch.equal(torch.get_rng_state(), state)
        return (status, *capsys.readouterr())

    return call


NET = ("net.py:build", "--input", "3,12,12")


def test_every_command_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in load_commands():
        with pytest.raises(SystemExit):
            cli.main([command.name, "--help"])
        text = capsys.readouterr().out
        assert "--debug" in text
        assert f"examples:\n  {'eval' if command.name == 'completion' else f'maskprop {command.name}'}" in text


def test_inspect(run: Run) -> None:
    status, out, _ = run("inspect", *NET, "--members")
    assert status == 0
    assert "516 parameters" in out
    assert "makes 0.weight, axis 0" in out
    status, out, _ = run("inspect", *NET, "--json", "--batch", "1")
    found = json.loads(out)
    assert found["parameters"] == 516
    assert found["flops"] == 2 * 10 * 10 * 8 * 27 + 2 * 8 * 8 * 4 * 72
    assert [(g["name"], g["size"], g["unit_parameters"]) for g in found["groups"]] == [("0", 8, 28 + 36)]


def test_compact_show_verify_and_load(run: Run, tmp_path: Path) -> None:
    status, out, err = run("compact", *NET, "--masks", "masks.safetensors", "--out", "new/small", "--no-progress")
    assert status == 0
    assert "Wrote the model and its report to new/small" in out
    assert "verification  passed" in out
    assert err == ""
    names = {p.name for p in (tmp_path / "new/small").iterdir()}
    assert names == {"plan.json", "model.safetensors", "report.json", "report.html"}

    source = find_model("net.py:build")
    loaded = maskprop.load("new/small", source.build)
    assert loaded[0].out_channels == 5

    status, out, _ = run("show", "new/small")
    assert status == 0
    assert "from net.py:build" in out
    assert "5 of 8" in out
    assert "0.out_channels: 8 → 5" in out
    status, out, _ = run("show", "new/small", "--json")
    assert json.loads(out)["source"] == "net.py:build"

    (tmp_path / "small.py").write_text(
        "import maskprop\nfrom net import build\n\ndef small():\n    return maskprop.load('new/small', build)\n"
    )
    status, out, _ = run("verify", *NET, "--masks", "masks.safetensors", "--samples", "2", "--json")
    assert status == 0
    assert [c["passed"] for c in json.loads(out)["checks"]] == [True, True]
    status, out, _ = run("verify", *NET[:1], "small.py:small", *NET[1:], "--masks", "masks.safetensors")
    assert status == 0
    status, out, _ = run("verify", *NET[:1], "small.py:small", *NET[1:])  # dense against compact
    assert status == 3
    assert "DIFFERENT" in out


def test_compact_as_json_with_options(run: Run) -> None:
    options = ("--channel-multiple", "4", "--constants", "fold", "--no-verify", "--json")
    status, out, _ = run("compact", *NET, "--masks", "masks.safetensors", "--out", "small", *options)
    assert status == 0
    found = json.loads(out)
    assert found["check"] is None
    assert {layer["path"]: layer["after"] for layer in found["layers"]}["0"][0] == 8


def test_bench(run: Run) -> None:
    models = ("net.py:build", "net.py:build?width=20")
    status, out, _ = run("bench", *models, *NET[1:], "--batches", "1", "3", "--rounds", "1", "--threads", "1", "--json")
    assert status == 0
    found = json.loads(out)
    assert list(found) == list(models)
    assert found[models[1]]["parameters"] > found[models[0]]["parameters"] == 516
    assert all(found[m][f"seconds at batch {b}"] > 0 for m in models for b in (1, 3))
    assert "latency at batch 1" in run("bench", models[0], *NET[1:], "--batches", "1", "--rounds", "1")[1]


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "pt"])
def test_export(run: Run, tmp_path: Path, suffix: str) -> None:
    status, out, _ = run("export", *NET, "--out", f"net.{suffix}", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["bytes"] == (tmp_path / f"net.{suffix}").stat().st_size
    assert found["error"] < 1e-5


def test_export_with_token_ids_and_keywords(run: Run) -> None:
    shapes = ("--input", "int11:5;scale=")
    for file in ("net.onnx", "net.pt2"):
        status, out, err = run("export", "net.py:Masked", *shapes, "--out", file, "--json")
        assert status == 0, err
        assert json.loads(out)["error"] < 1e-5


def test_completion(run: Run) -> None:
    for shell, text in (
        ("bash", 'compact) words="--help --weights'),
        ("zsh", "bashcompinit"),
        ("fish", "-l masks"),
    ):
        status, out, _ = run("completion", shell)
        assert status == 0
        assert text in out


def test_completion_in_bash(run: Run, tmp_path: Path) -> None:
    """The script, sourced by bash, completes commands, options and choices."""
    (tmp_path / "script").write_text(run("completion", "bash")[1])
    complete = (
        'source ./script; t() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _maskprop;'
        ' echo "${COMPREPLY[*]}"; }'
        "\nt maskprop pru\nt maskprop prune --max\nt maskprop prune --score l\nt maskprop completion z\nt maskprop x n"
    )
    done = subprocess.run(["bash", "-c", complete], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["prune", "--max-parameters --max-flops", "l1 l2 lamp", "zsh", ""]
    assert done.stderr == ""


def test_json_knows_no_infinity(run: Run) -> None:
    """Outputs of different shapes are infinitely far apart, which JSON cannot say."""
    Path("wide.py").write_text(
        "from net import build\nfrom torch import nn\n\n"
        "def wide():\n    return nn.Sequential(build(), nn.Linear(4, 5))\n"
    )
    status, out, _ = run("verify", NET[0], "wide.py:wide", *NET[1:], "--samples", "1", "--json")
    assert status == 3
    (check,) = json.loads(out, parse_constant=pytest.fail)["checks"]
    assert check["error"] is None
    assert check["passed"] is False


def test_a_failure_leaves_no_directory(run: Run, tmp_path: Path) -> None:
    assert run("compact", *NET, "--masks", "none.pt", "--out", "new/small")[0] == 1
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    assert run("compact", *NET, "--masks", "none.pt", "--out", "mine/small")[0] == 1
    assert list((tmp_path / "mine").iterdir()) == []


def test_weights(run: Run, tmp_path: Path) -> None:
    state = find_model("net.py:build").build().state_dict()
    torch.save(state, tmp_path / "weights.pt")
    save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "same.py").write_text(
        "import torch\nfrom net import build\n\ndef same():\n    model = build()\n"
        "    model.load_state_dict(torch.load('weights.pt'))\n    return model\n"
    )
    for file in ("weights.pt", "weights.safetensors"):
        assert run("verify", NET[0], "same.py:same", *NET[1:], "--weights", file)[0] == 0
    assert run("verify", NET[0], "same.py:same", *NET[1:])[0] == 3


def test_sources() -> None:
    built = find_model("torchvision:resnet18?num_classes=7").build()
    assert built.fc.out_features == 7
    inputs = make_inputs(find_model("torchvision:resnet18"), built, None, 2, 0)
    assert inputs[0].shape == (2, 3, 224, 224)
    source = find_model("timm:test_vit")
    model = source.build()
    assert make_inputs(source, model, None, 3, 0)[0].shape == (3, *model.default_cfg["input_size"])
    assert isinstance(find_model("torch.nn:Linear?in_features=2&out_features=3").build(), nn.Linear)
    x, scale = make_inputs(source, model, "int9:4;scale=2,5", 2, 0)
    assert (x.shape, x.dtype, scale["scale"].shape) == ((2, 4), torch.int64, (2, 2, 5))


def test_a_saved_model_by_name(run: Run, tmp_path: Path) -> None:
    name = "torchvision:squeezenet1_1?num_classes=4"
    mask = torch.ones(16, 1, 1, 1)
    mask[[2, 5]] = 0
    torch.save({"features.3.squeeze": {"weight": mask, "bias": mask.flatten()}}, tmp_path / "masks.pt")
    options = ("--input", "3,48,48", "--masks", "masks.pt")
    assert run("compact", name, *options, "--out", "small")[0] == 0
    assert run("verify", name, "saved:small", *options, "--samples", "1")[0] == 0
    assert run("compact", "saved:small", "--input", "3,48,48", "--masks", "masks.pt", "--out", "x")[0] == 1  # 14 rows


def test_inputs_of_timm_models_follow_their_arguments() -> None:
    for name, shape in (
        ("timm:vit_tiny_patch16_224?img_size=64&depth=1", (2, 3, 64, 64)),
        ("timm:vit_tiny_patch16_224?img_size=(32, 64)&in_chans=1&depth=1", (2, 1, 32, 64)),
        ("timm:resnet10t", (2, 3, 176, 176)),
    ):
        source = find_model(name)
        made = make_inputs(source, source.build(), None, 2, 0)
        assert isinstance(made, tuple)
        assert tuple(made[0].shape) == shape


def test_show_shortens_long_lists(run: Run, tmp_path: Path) -> None:
    mask = torch.ones(60, 1, 1, 1)
    mask[::3] = 0
    save_file({"0.weight": mask, "0.bias": mask.flatten().clone()}, tmp_path / "masks.safetensors")
    wide = ("net.py:build?width=60", *NET[1:], "--masks", "masks.safetensors")
    assert run("compact", *wide, "--out", "small")[0] == 0
    assert "…" in run("show", "small")[1]
    text = run("show", "small", "--units")[1]
    assert "…" not in text
    assert "58-59" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "resnet18"], "ModelNameError: 'resnet18' names no model. Known forms: "),
        (["inspect", "torchvision:resnet1"], "ModelNameError: 'torchvision:resnet1': torchvision has no"),
        (["inspect", "timm:nothing"], "ModelNameError: 'timm:nothing': timm has no model 'nothing'"),
        (["inspect", "net.py:nothing"], "ModelNameError: 'net.py:nothing': 'net.py' has no function"),
        (["inspect", "none.py:x"], "ModelNameError: 'none.py:x': 'none.py' cannot be imported"),
        (["inspect", "net.py:number"], "ModelNameError: 'net.py:number' made a int, not a torch.nn.Module."),
        (["inspect", "net.py:build?x"], "ModelNameError: 'net.py:build?x': 'x' is no list of arguments."),
        (["inspect", "hf:nowhere"], "ModelNameError: 'hf:nowhere': 'nowhere' holds no config.json."),
        (["inspect", "saved:nowhere"], "LoadError: 'nowhere' holds no plan.json."),
        (["inspect", "net.py:build"], "OptionError: the inputs of 'net.py:build' are not known."),
        (["inspect", "net.py:build", "--input", "3,x"], "OptionError: --input '3,x' is not understood."),
        (["inspect", *NET, "--batch", "0"], "OptionError: --batch is 0; give at least 1."),
        (["inspect", *NET, "--weights", "none.pt"], "OptionError: --weights none.pt: "),
        (["inspect", *NET, "--weights", "net.py"], "OptionError: --weights net.py: "),
        (["inspect", "net.py:broken", "--input", "3"], "ValueError: a first line (run again with --debug"),
        (["inspect", "net.py:build", "--input", "5"], "DummyInputError: the forward of Sequential failed"),
        (["verify", *NET], "OptionError: verify needs something to compare with"),
        (["verify", *NET, "--masks", "masks.safetensors", "--samples", "0"], "OptionError: --samples is 0"),
        (["bench", *NET, "--batches", "0"], "OptionError: --batches and --rounds take"),
        (["export", *NET, "--out", "x.y"], "OptionError: --out x.y: the suffix tells no form."),
        (["export", *NET, "--out", "no/x.onnx"], "OptionError: --out no/x.onnx: there is no directory"),
        (["export", *NET, "--out", "x.onnx", "--batch", "1"], "OptionError: --batch is 1; an export"),
        (["compact", *NET, "--masks", "none.pt", "--out", "x"], "MaskFileError: masks file 'none.pt'"),
        (["compact", *NET, "--masks", "none.pt", "--out", "net.py/x"], "OptionError: --out net.py/x"),
        (["compact", *NET, "--masks", ".", "--out", "x"], "MaskFileError: masks file '.': that is a directory."),
        (["compact", *NET, "--masks", "hi.pt", "--out", "x"], "MaskFileError: masks file 'hi.pt': torch.load cannot"),
        (["verify", NET[0], "net.py:Masked", *NET[1:]], "DummyInputError: the forward of 'net.py:Masked' failed with"),
        (["prune", *NET, "--out", "x.npz"], "OptionError: --out x.npz: give a file that ends in .pt, .pth or"),
        (["prune", *NET, "--out", "no/x.pt"], "OptionError: --out no/x.pt: there is no directory 'no'"),
        (["prune", *NET, "--max-flops", "0"], "RatioError: flops is 0: what is left must be"),
        (["show", "nowhere"], "LoadError: 'nowhere' holds no plan.json."),
    ],
)  # fmt: skip
def test_errors_are_one_line(run: Run, argv: list[str], message: str) -> None:
    status, out, err = run(*argv)
    assert status == 1
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert out == ""


def test_debug_shows_the_traceback(run: Run) -> None:
    status, _, err = run("inspect", "net.py:broken", "--input", "3", "--debug")
    assert status == 1
    assert "Traceback" in err
    assert "and a second" in err


def test_saved_code_is_not_run_by_name(run: Run) -> None:
    run("compact", *NET, "--masks", "masks.safetensors", "--out", "small")
    with pytest.raises(ModelNameError, match="without running code of yours"):
        find_model("saved:small")


def test_weights_that_could_run_code(tmp_path: Path, run: Run) -> None:
    torch.save({"x": OptionError("a class")}, tmp_path / "code.pt")
    status, _, err = run("inspect", *NET, "--weights", "code.pt")
    assert status == 1
    assert "could run code" in err


def test_unused_values_are_plain(run: Run) -> None:
    found: dict[str, Any] = json.loads(run("inspect", *NET, "--json")[1])
    assert found["model"] == "net.py:build"
