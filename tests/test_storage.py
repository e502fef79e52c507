"""Save and load: bit for bit, atomic, and clear about what is wrong."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import maskprop
from maskprop import ModelSpeedup, storage
from maskprop.errors import ArchitectureError, LoadError, SaveError
from maskprop.rewrite.steps import RECORD, read_record
from tests.models import ConvNet, LeNet, Transformer, example, randomise, rows, sped_up

FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "cnn": ConvNet,
    "generated": LeNet,
    "attention": Transformer,
    "tokens": lambda: Transformer(tokens=20),
}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def assert_same(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    """Equal to the bit: tensors, classes, attributes that print, outputs."""
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
        assert tensor.dtype == right[name].dtype
        assert tensor.requires_grad == right[name].requires_grad
        assert tensor.stride() == right[name].stride()
    assert repr(a) == repr(b)
    with torch.no_grad():
        assert torch.equal(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize("name", FACTORIES)
def test_round_trip(name: str, generator: torch.Generator, tmp_path: Path) -> None:
    speedup = sped_up(FACTORIES[name](), generator)
    maskprop.save(speedup.model, tmp_path / "new" / "dir")
    loaded = maskprop.load(tmp_path / "new" / "dir", FACTORIES[name])
    assert_same(speedup.model, loaded, example(speedup.model, 3, generator))
    assert sorted(p.name for p in (tmp_path / "new" / "dir").iterdir()) == ["model.safetensors", "plan.json"]


def test_a_second_round_trip(generator: torch.Generator, tmp_path: Path) -> None:
    speedup = sped_up(LeNet(), generator)
    maskprop.save(speedup.model, tmp_path / "one")
    loaded = maskprop.load(tmp_path / "one", LeNet)
    maskprop.save(loaded, tmp_path / "two")
    for file in ("plan.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_nothing_is_traced_or_allocated_twice(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speedup = sped_up(ConvNet(), generator)
    maskprop.save(speedup.model, tmp_path)
    devices = []

    def factory() -> nn.Module:
        model = ConvNet()
        devices.append(model.head.weight.device.type)
        return model

    monkeypatch.setattr(ConvNet, "forward", None)
    state = torch.get_rng_state()
    maskprop.load(tmp_path, factory)
    assert devices == ["meta"]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_factory_that_does_not_run_on_meta(generator: torch.Generator, tmp_path: Path) -> None:
    class Reads(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.rates = [r.item() for r in torch.linspace(0, 1, 3)]
            self.anchors = [torch.ones(2)]

    speedup = sped_up(Reads(), generator)
    maskprop.save(speedup.model, tmp_path)
    loaded = maskprop.load(tmp_path, Reads)
    assert_same(speedup.model, loaded, example(speedup.model, 1, generator))
    assert torch.equal(loaded.anchors[0], torch.ones(2))


def test_a_model_sped_up_twice(generator: torch.Generator, tmp_path: Path) -> None:
    model = sped_up(ConvNet(), generator).model
    second = ModelSpeedup(model, example(model, 2, generator), rows(model, "block.conv1", [1, 2]))
    second.speedup_model()
    record = read_record(model)
    assert record is not None
    assert len(record["steps"]) == 2
    maskprop.save(model, tmp_path)
    assert_same(model, maskprop.load(tmp_path, ConvNet), example(model, 3, generator))


def test_a_generated_forward_sped_up_twice(generator: torch.Generator, tmp_path: Path) -> None:
    model = sped_up(LeNet(), generator).model
    ModelSpeedup(model, example(model, 2, generator), rows(model, "conv", [1])).speedup_model()
    maskprop.save(model, tmp_path)
    x = example(model, 3, generator)
    assert_same(model, maskprop.load(tmp_path, LeNet), x)
    assert_same(model, pickle.loads(pickle.dumps(model)), x)


def test_nothing_left_leaves_no_record(generator: torch.Generator) -> None:
    model = sped_up(ConvNet(), generator).model
    before = model.__dict__[RECORD]
    ModelSpeedup(model, example(model, 2, generator), {}).speedup_model()
    assert model.__dict__[RECORD] == before


def test_the_record_survives_copies(generator: torch.Generator, tmp_path: Path) -> None:
    speedup = sped_up(ConvNet(), generator)
    x = example(speedup.model, 1, generator)
    for copied in (copy.deepcopy(speedup.model), pickle.loads(pickle.dumps(speedup.model))):
        maskprop.save(copied, tmp_path)
        assert_same(speedup.model, maskprop.load(tmp_path, ConvNet), x)


def test_a_part_of_a_model(generator: torch.Generator, tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = ConvNet(), ConvNet()

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x)

    model = randomise(Twins(), generator)
    sped_up(model.right, generator)
    maskprop.save(model, tmp_path / "part")
    x = example(model.right, 2, generator)
    assert_same(model, maskprop.load(tmp_path / "part", Twins), x)
    ModelSpeedup(model, x, rows(model, "left.stem", [4])).speedup_model()  # and then the whole
    ModelSpeedup(model.left, x, rows(model.left, "block.conv1", [7])).speedup_model()  # and another part
    maskprop.save(model, tmp_path / "whole")
    assert_same(model, maskprop.load(tmp_path / "whole", Twins), x)


def test_dtypes_devices_and_memory_formats(generator: torch.Generator, tmp_path: Path) -> None:
    model = sped_up(ConvNet(), generator).model.to(torch.float64, memory_format=torch.channels_last)
    model.stem.weight.requires_grad_(False)
    maskprop.save(model, tmp_path)
    x = example(model, 2, generator).double()
    loaded = maskprop.load(tmp_path, ConvNet)
    loaded.stem.weight.requires_grad_(False)  # the factory decides about training
    assert_same(model, loaded, x)
    hollow = maskprop.load(tmp_path, ConvNet, device="meta")
    assert {n: (t.shape, t.device.type) for n, t in tensors(hollow).items()} == {
        n: (t.shape, "meta") for n, t in tensors(model).items()
    }
    half = maskprop.load(tmp_path, ConvNet, dtype=torch.bfloat16)
    assert {t.dtype for t in half.parameters()} == {torch.bfloat16}
    assert half.block.norm.num_batches_tracked.dtype == torch.int64


def test_tied_and_shared_tensors(generator: torch.Generator, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.head = nn.Embedding(9, 6), nn.Linear(6, 10), nn.Linear(6, 9, bias=False)
            self.down = nn.Linear(10, 6)
            self.head.weight = self.embed.weight
            self.recurrent = nn.GRU(6, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(self.down(torch.relu(self.up(self.embed(x)))))[0])

    model = randomise(Tied(), generator)
    x = torch.randint(0, 9, (2, 5), generator=generator)
    ModelSpeedup(model, x, rows(model, "up", [0, 3])).speedup_model()
    maskprop.save(model, tmp_path)
    loaded = maskprop.load(tmp_path, Tied)
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.up.out_features == 8
    assert_same(model, loaded, x)
    loaded(x).sum().backward()
    assert loaded.embed.weight.grad is not None
    assert loaded.recurrent.weight_ih_l0.grad is not None  # the module's own list of weights follows


def test_the_loaded_model_lives(generator: torch.Generator, tmp_path: Path) -> None:
    model = sped_up(Transformer(), generator).model
    maskprop.save(model, tmp_path)
    loaded = maskprop.load(tmp_path, Transformer).train()
    x = example(model, 2, generator)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(x).square().sum().backward()
    optimizer.step()
    again = ModelSpeedup(loaded, x, rows(loaded, "encoder.layers.0.linear1", [0]))
    again.speedup_model()
    maskprop.save(loaded, tmp_path)
    assert_same(loaded, maskprop.load(tmp_path, Transformer), x)


def test_the_plan_is_readable(generator: torch.Generator, tmp_path: Path) -> None:
    speedup = sped_up(ConvNet(), generator)
    maskprop.save(speedup.model, tmp_path)
    text = (tmp_path / "plan.json").read_text()
    plan = json.loads(text)
    (step,) = plan["parts"][""]["steps"]
    keep = step["plan"]["keep"]["block.conv1.weight"]
    assert keep[0]["axis"] == 0
    assert keep[0]["index"] == speedup.explain("block.conv1").stayed
    assert step["modules"]["block.conv1"]["attributes"]["out_channels"] == [12, len(keep[0]["index"])]
    assert plan["parts"][""]["dense"]["tensors"]["stem.weight"] == [8, 3, 3, 3]
    assert plan["versions"]["maskprop"] == maskprop.__version__
    assert max(map(len, text.splitlines())) < 4000


# -- the wrong architecture -----------------------------------------------------------------------


class Wider(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 6)


class Longer(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(5, 5)


class Other(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 5))


def test_wrong_architecture(generator: torch.Generator, tmp_path: Path) -> None:
    maskprop.save(sped_up(ConvNet(), generator).model, tmp_path)
    advice = "Build the dense architecture that was sped up, with the same arguments."
    linear = "Linear(in_features=8, out_features={}, bias=True)"
    expected = f"the plan was made for {linear.format(5)} at 'head'; this model has"
    tail = "this model has 'tail.weight', which the model that the plan was made for does not."
    for factory, message in (
        (Wider, "the plan was made for ConvNet() at ''; this model has Wider()."),
        (lambda: renamed(Wider), f"{expected} {linear.format(6)}."),
        (lambda: renamed(Longer), tail),
        (lambda: renamed(Other), f"{expected} Sequential()."),
    ):
        with pytest.raises(ArchitectureError) as caught:
            maskprop.load(tmp_path, factory)
        assert str(caught.value) == f"{message} {advice}"


def renamed(cls: type[nn.Module]) -> nn.Module:
    model = cls()
    model.__class__ = ConvNet
    return model


def test_weights_that_do_not_fit(generator: torch.Generator, tmp_path: Path) -> None:
    model = sped_up(ConvNet(), generator).model
    model.head = nn.Linear(model.head.in_features, 7)  # changed after the speedup
    maskprop.save(model, tmp_path)
    with pytest.raises(ArchitectureError, match=r"'head.bias' was saved with shape \(7,\)"):
        maskprop.load(tmp_path, ConvNet)
    model.extra = nn.Linear(2, 2)
    maskprop.save(model, tmp_path)
    with pytest.raises(ArchitectureError, match=r"holds 'extra\.\w+', which the model lacks"):
        maskprop.load(tmp_path, ConvNet)


# -- damaged files --------------------------------------------------------------------------------


@pytest.fixture
def saved(generator: torch.Generator, tmp_path: Path) -> Path:
    maskprop.save(sped_up(ConvNet(), generator).model, tmp_path / "saved")
    return tmp_path / "saved"


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no plan\.json. Give the directory that maskprop.save wrote"):
        maskprop.load(tmp_path, ConvNet)
    (saved / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"holds no model\.safetensors"):
        maskprop.load(saved, ConvNet)


@pytest.mark.parametrize("file", ["plan.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_half_written_files(saved: Path, file: str, share: float) -> None:
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(LoadError, match="damaged"):
        maskprop.load(saved, ConvNet)


def test_a_flipped_bit(saved: Path) -> None:
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(LoadError, match=r"is not the file that plan.json was written with"):
        maskprop.load(saved, ConvNet)


@pytest.mark.parametrize(
    "edit",
    [
        lambda plan: plan["parts"][""].pop("steps"),
        lambda plan: plan["parts"][""]["steps"][0]["plan"]["keep"]["stem.weight"][0].pop("axis"),
        lambda plan: plan["parts"][""]["steps"][0]["plan"]["keep"].update(nothing=[]),
        lambda plan: plan["parts"][""]["steps"][0]["plan"]["keep"]["stem.weight"][0].update(index=[99]),
        lambda plan: plan["parts"][""]["steps"][0]["modules"].update(nothing={"attributes": {}}),
        lambda plan: plan["parts"].update(nothing={}),
        lambda plan: plan.pop("parts"),
    ],
)
def test_a_damaged_plan(saved: Path, edit: Callable[[dict[str, object]], object]) -> None:
    plan = json.loads((saved / "plan.json").read_text())
    edit(plan)
    (saved / "plan.json").write_text(json.dumps(plan))
    messages = r"damaged|the model does not have|this model has none|saved with"
    with pytest.raises(maskprop.MaskpropError, match=messages):
        maskprop.load(saved, ConvNet)


def test_other_versions(saved: Path) -> None:
    plan = json.loads((saved / "plan.json").read_text())
    for text, change in (
        (
            f"has format 99, written by maskprop 7.0; maskprop {maskprop.__version__} reads format 1",
            {"format": 99},
        ),
        (
            "the plan has format 99; this version of maskprop reads format 1",
            {"parts": {"": {**plan["parts"][""], "format": 99}}},
        ),
    ):
        (saved / "plan.json").write_text(json.dumps({**plan, "versions": {"maskprop": "7.0"}, **change}))
        with pytest.raises(LoadError, match=text):
            maskprop.load(saved, ConvNet)


def test_another_torch_may_print_settings_otherwise(saved: Path) -> None:
    plan = json.loads((saved / "plan.json").read_text())
    dense = plan["parts"][""]["dense"]
    dense["modules"]["stem"][1] = "3, 8, kernel_size=(3, 3), padding=(1, 1), something=new"
    (saved / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ArchitectureError, match="something=new"):
        maskprop.load(saved, ConvNet)
    dense["torch"] = "2.99"
    (saved / "plan.json").write_text(json.dumps(plan))
    maskprop.load(saved, ConvNet)


class Sourceless(LeNet):
    """Its source cannot be found, so its forward is traced, and saved as code."""

    forward = types.FunctionType(LeNet.forward.__code__.replace(co_filename="<nowhere>"), LeNet.forward.__globals__)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import os\ndef forward(self, x): return x", "is more than one function"),
        ("def forward(self, x):\n    __import__('os').system('true')", "calls .system"),
        ("def forward(self, x):\n    if x.max():\n        raise SystemExit()", "calls SystemExit"),
        ("def forward(self, x):\n    return torch.load('x')", "uses torch.load"),
        ("def forward(self, x):\n    return torch.hub.load('x', 'y')", "uses torch.hub.load"),
        ("def forward(self, x):\n    return x.numpy().tofile('/tmp/x')", "calls .tofile"),
        ("def forward(self, x):\n    return eval('x')", "calls eval"),
        ("def forward(self, x):\n    return x.numpy", "reads .numpy"),
        ("def forward(self, x):\n    return self.save_pretrained('/tmp/x')", "calls .save_pretrained"),
        ("def forward(self, x):\n    return getattr(self, '__class__')", "uses getattr"),
        ("def forward(self, x):\n    return [f for f in (1,)]", "holds a ListComp"),
        ("def forward(self, x):\n    return (lambda: x)()", "holds a Lambda|calls the result"),
        ("def forward(self, x:", "is not Python"),
    ],
)
def test_code_in_a_plan_is_vetted(generator: torch.Generator, tmp_path: Path, source: str, complaint: str) -> None:
    maskprop.save(sped_up(Sourceless(), generator).model, tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["parts"][""]["steps"][0]["modules"][""]["class"]["source"] = source
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(LoadError, match=complaint):
        maskprop.load(tmp_path, Sourceless)


def test_code_is_trusted_on_request(generator: torch.Generator, tmp_path: Path) -> None:
    maskprop.save(sped_up(Sourceless(), generator).model, tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    described = plan["parts"][""]["steps"][0]["modules"][""]["class"]
    described["imports"].append(["json", ["json", ""]])
    described["source"] = described["source"].replace("return ", "json.dumps(0);  return ")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(LoadError, match="uses the module json, and loading would run it"):
        maskprop.load(tmp_path, Sourceless)
    maskprop.load(tmp_path, Sourceless, trust_code=True)


# -- what cannot be saved, and where --------------------------------------------------------------


def test_replaced_modules_cannot_be_saved(generator: torch.Generator, tmp_path: Path) -> None:
    model = randomise(ConvNet(), generator)

    def replace(module: nn.Module, masks: tuple[object, object, dict[str, Tensor]]) -> nn.Module:
        keep = masks[2]["weight"].bool()
        new = nn.BatchNorm2d(int(keep.sum())).eval()
        new.load_state_dict({k: v[keep] if v.ndim else v for k, v in module.state_dict().items()})
        return new

    pruned, x = rows(model, "block.conv1", [1, 2, 3]), example(model, 2, generator)
    speedup = ModelSpeedup(model, x, pruned, customized_replace_func={nn.BatchNorm2d: replace})
    speedup.speedup_model()
    with pytest.raises(SaveError, match=r"'block\.norm' cannot be saved as data: a BatchNorm2d was put in"):
        maskprop.save(speedup.model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_meta_tensors_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="'weight' is on the meta device"):
        maskprop.save(nn.Linear(2, 2, device="meta"), tmp_path)


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "pathlib.Path.write_text"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_leaves_the_old_save(
    saved: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    before = files(saved)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    other = sped_up(ConvNet(), generator.manual_seed(7)).model
    with monkeypatch.context() as patch:
        patch.setattr(function, fail)
        with pytest.raises(SaveError, match=f"could not be saved.*{os.strerror(code)}"):
            maskprop.save(other, saved)
    assert files(saved) == before


def test_a_full_disk_for_real(saved: Path) -> None:
    """A process that may write no more than 4 KiB to a file."""
    before = files(saved)
    code = (
        "import resource, signal, sys, torch, maskprop\n"
        "from maskprop.errors import SaveError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    maskprop.save(torch.nn.Linear(200, 200), sys.argv[1])\n"
        "except SaveError as error:\n    sys.exit(0 if 'could not be saved' in str(error) else 2)\n"
        "sys.exit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(saved) == before


def test_a_read_only_directory(saved: Path) -> None:
    """For real, as a user whom permissions bind: root gives up its own."""
    directory = Path(tempfile.mkdtemp())  # where another user gets to
    try:
        for name, content in files(saved).items():
            (directory / name).write_bytes(content)
        directory.chmod(0o555)
        code = (
            "import os, sys, torch, maskprop\n"
            "from maskprop.errors import SaveError\n"
            "os.geteuid() or os.seteuid(65534)\n"
            "try:\n    maskprop.save(torch.nn.Linear(200, 200), sys.argv[1])\n"
            "except SaveError as error:\n    sys.exit(0 if 'Permission denied' in str(error) else 2)\n"
            "sys.exit(3)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert files(directory) == files(saved)
        maskprop.load(directory, ConvNet)
    finally:
        directory.chmod(0o755)
        shutil.rmtree(directory)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="could not be saved to"):
        maskprop.save(nn.Linear(2, 2), tmp_path / "file" / "below")


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_process_killed_while_saving(saved: Path, tmp_path: Path, renames: int) -> None:
    """Killed before, between and after the renames: either the old or the new model loads, whole."""
    code = (
        "import os, signal, sys, torch, maskprop\n"
        "from tests.models import ConvNet, sped_up\n"
        "model = sped_up(ConvNet(), torch.Generator().manual_seed(99)).model\n"
        "maskprop.save(model, sys.argv[2])\n"
        "done, replace = [0], os.replace\n"
        "def killing(a, b):\n"
        "    if done[0] == int(sys.argv[3]):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    done[0] += 1\n    replace(a, b)\n"
        "os.replace = killing\n"
        "maskprop.save(model, sys.argv[1])\n"
    )
    old = maskprop.load(saved, ConvNet)
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, str(saved), str(tmp_path / "new"), str(renames)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    wanted = old if renames < 2 else maskprop.load(tmp_path / "new", ConvNet)
    assert_same(maskprop.load(saved, ConvNet), wanted, torch.ones(1, 3, 10, 10))
    maskprop.save(old, saved)  # and the next save clears what the killed one left
    assert sorted(files(saved)) == ["model.safetensors", "plan.json"]
    assert storage.read_plan(saved).versions["maskprop"] == maskprop.__version__
