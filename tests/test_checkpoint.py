"""A checkpoint is compacted shard by shard: bounded, verified, and as good as in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from maskprop import ModelSpeedup, checkpoint, cli, hf
from maskprop.checkpoint import Checkpoint, Shards
from maskprop.errors import LoadError, MetaValueError, SaveError, VerifyError
from tests.test_hf import MODELS, Scaled, ScaledConfig, masks_of, randomise, same

IDS = {"input_ids": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))}


def dense(name: str, generator: torch.Generator, path: Path, **options: Any) -> nn.Module:
    model = randomise(MODELS[name](), generator)
    model.save_pretrained(path, **options)
    return model


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "by layer"])
@pytest.mark.parametrize("name", MODELS)
def test_same_as_in_memory(name: str, uniform: bool, generator: torch.Generator, tmp_path: Path) -> None:
    """Shard by shard, with constants folded (BERT and GPT-2 keep their biases), what memory gives to the bit."""
    model = dense(name, generator, tmp_path / "dense", max_shard_size="20KB")
    masks = masks_of(name, model, uniform, biases=False)
    source = Checkpoint(tmp_path / "dense")
    assert all(t.is_meta for t in source.model.parameters())
    speedup = ModelSpeedup(source.model, IDS, masks, read=source.read)
    speedup.speedup_model()
    assert speedup.report.check is not None
    assert speedup.report.check.passed
    source.write(speedup, tmp_path / "small")
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "small" / hf.PLAN).exists() is not uniform
    ModelSpeedup(model, IDS, masks).speedup_model()
    hf.save_pretrained(model, tmp_path / "memory")
    ours = json.loads((tmp_path / "small" / "config.json").read_text())
    theirs = json.loads((tmp_path / "memory" / "config.json").read_text())
    assert ours == theirs
    same(model, hf.load_pretrained(tmp_path / "small"), generator)


def test_again(generator: torch.Generator, tmp_path: Path) -> None:
    """A compact checkpoint is compacted further; the plans compose."""
    model = dense("gpt2", generator, tmp_path / "0")
    masks = masks_of("gpt2", model, uniform=False, biases=True)
    for step in (0, 1):
        source = Checkpoint(tmp_path / str(step))
        speedup = ModelSpeedup(source.model, IDS, masks, read=source.read)
        speedup.speedup_model()
        source.write(speedup, tmp_path / str(step + 1))
        ModelSpeedup(model, IDS, masks).speedup_model()
        loaded = hf.load_pretrained(tmp_path / str(step + 1))
        same(model, loaded, generator)
        masks = {n: m[..., : model.get_parameter(n).shape[-1]] for n, m in masks.items()}
        masks = {n: torch.ones_like(m).index_fill_(-1, torch.tensor([0, 3]), 0) for n, m in masks.items()}
    assert loaded.transformer.h[2].mlp.c_fc.nf == 48 - 16 - 2


BRANCHES = {
    "llama": ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    "gpt2": ("transformer.h.0.attn.c_proj.weight", "transformer.h.1.mlp.c_fc.weight"),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_that_leave(name: str, generator: torch.Generator, tmp_path: Path) -> None:
    """What they leave is zero, or a constant that is not the bias that was there; shard by shard as in memory."""
    model = dense(name, generator, tmp_path / "dense")
    masks = {parameter: torch.zeros(1, 1) for parameter in BRANCHES[name]}
    source = Checkpoint(tmp_path / "dense")
    speedup = ModelSpeedup(source.model, IDS, masks, read=source.read)
    speedup.speedup_model()
    source.write(speedup, tmp_path / "small")
    ModelSpeedup(model, IDS, masks).speedup_model()
    assert len(speedup.report.repair.removed) > 4
    hf.save_pretrained(model, tmp_path / "memory")
    for directory in ("small", "memory"):
        same(model, hf.load_pretrained(tmp_path / directory), generator)
    assert Checkpoint(tmp_path / "small").model.num_parameters() == model.num_parameters()


def test_hidden_buffers(generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "Scaled", Scaled, raising=False)
    transformers.AutoConfig.register(ScaledConfig.model_type, ScaledConfig, exist_ok=True)
    model = randomise(Scaled(ScaledConfig()), generator)
    model.save_pretrained(tmp_path / "dense")
    keep = torch.tensor([0.0, 1, 0, 1, 1, 1])
    masks = {"a.weight": keep[:, None], "a.bias": keep}
    x = torch.randn(2, 4, generator=generator)
    source = Checkpoint(tmp_path / "dense")
    speedup = ModelSpeedup(source.model, x, masks, read=source.read)
    speedup.speedup_model()
    source.write(speedup, tmp_path / "small")
    ModelSpeedup(model, x, masks).speedup_model()
    loaded = Scaled.from_pretrained(tmp_path / "small")
    assert loaded.scale.tolist() == [2, 4, 5, 6]
    assert torch.equal(loaded(x), model(x))


def test_no_more_than_a_shard_is_held(generator: torch.Generator, tmp_path: Path, monkeypatch: Any) -> None:
    """Between two shards nothing of the weights is left; within one, no more than it."""
    model = dense("llama", generator, tmp_path / "dense", max_shard_size="20KB")
    source = Checkpoint(tmp_path / "dense")
    speedup = ModelSpeedup(source.model, IDS, masks_of("llama", model, False, False), read=source.read)
    speedup.speedup_model()
    sizes = [(tmp_path / "dense" / file).stat().st_size for file in source.shards.files]
    held: list[int] = []
    save = checkpoint.save_file

    def counted(shard: dict[str, Tensor], path: Path, **options: Any) -> None:
        held.append(sum(t.untyped_storage().nbytes() for t in shard.values()))
        save(shard, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", counted)
    source.write(speedup, tmp_path / "small")
    assert len(held) == len(sizes) > 4
    assert all(size <= whole for size, whole in zip(held, sizes, strict=True))


def test_a_wrong_plan_is_caught_before_anything_is_written(
    generator: torch.Generator, tmp_path: Path, monkeypatch: Any
) -> None:
    model = dense("bert", generator, tmp_path / "dense")
    source = Checkpoint(tmp_path / "dense")
    real = source.read
    reads: dict[str, int] = {}

    def drifting(name: str) -> Tensor:
        reads[name] = reads.get(name, 0) + 1
        return real(name) + (1 if name.endswith("classifier.bias") and reads[name] > 2 else 0)

    speedup = ModelSpeedup(source.model, IDS, masks_of("bert", model, True, True), read=drifting)
    with pytest.raises(VerifyError, match="after rewriting, output 'logits' differs"):
        speedup.speedup_model()
    assert source.model.bert.encoder.layer[0].intermediate.dense.out_features == 48


def test_without_values_constants_are_refused(generator: torch.Generator, tmp_path: Path) -> None:
    model = dense("bert", generator, tmp_path / "dense")
    source = Checkpoint(tmp_path / "dense")
    with pytest.raises(MetaValueError, match=r"which is on the meta device\. Pass read="):
        ModelSpeedup(source.model, IDS, masks_of("bert", model, True, False)).speedup_model()
    assert source.model.bert.encoder.layer[0].intermediate.dense.out_features == 48
    with torch.device("meta"):
        hollow = MODELS["llama"]()  # without biases there is nothing to fold, and nothing to verify with
    ModelSpeedup(hollow, IDS, masks_of("llama", hollow, True, False)).speedup_model()
    assert hollow.model.layers[0].mlp.gate_proj.out_features == 40


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "holds no readable"),
        (lambda d: (d / "model.safetensors").write_bytes(b"12"), "holds no readable"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "holds no readable"),
    ],
)
def test_damage(spoil: Callable[[Path], object], message: str, generator: torch.Generator, tmp_path: Path) -> None:
    dense("bert", generator, tmp_path)
    spoil(tmp_path)
    with pytest.raises(LoadError, match=message):
        Checkpoint(tmp_path)


def test_other_names(generator: torch.Generator, tmp_path: Path) -> None:
    """A base model's files: from_pretrained would translate the names."""
    model = randomise(MODELS["bert"](), generator)
    model.bert.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [type(model).__name__]}))
    with pytest.raises(LoadError, match=r"lack 'bert\.embeddings.*and compact it in memory"):
        Checkpoint(tmp_path)


def test_out_appears_whole_or_not_at_all(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dense("llama", generator, tmp_path / "dense", max_shard_size="20KB")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    source = Checkpoint(tmp_path / "dense")
    speedup = ModelSpeedup(source.model, IDS, masks_of("llama", model, True, False), read=source.read)
    speedup.speedup_model()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SaveError, match="exists and is not empty"):
        source.write(speedup, tmp_path / "full")
    calls: list[str] = []

    def full_disk(shard: dict[str, Tensor], path: Path, **options: Any) -> None:
        calls.append(path.name)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        path.touch()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises(SaveError, match="No space left"):
            source.write(speedup, tmp_path / "small")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "full"]
    source.write(speedup, tmp_path / "small")
    assert (tmp_path / "small" / "tokenizer.json").read_text() == "{}"
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    files = {file: load_file(tmp_path / "small" / file) for file in set(index["weight_map"].values())}
    assert all(name in files[file] for name, file in index["weight_map"].items())
    total = sum(t.numel() * t.element_size() for f in files.values() for t in f.values())
    assert index["metadata"]["total_size"] == total
    assert set(Shards(tmp_path / "small")) == set(index["weight_map"])


@pytest.mark.parametrize("way", [[], ["--whole"]], ids=["shards", "whole"])
def test_command_line(
    way: list[str], generator: torch.Generator, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model = dense("gpt2", generator, tmp_path / "dense", max_shard_size="20KB")
    torch.save(masks_of("gpt2", model, False, False), "masks.pt")
    command = ["compact", "dense", "--masks", "masks.pt", "--out", "small", "--no-progress", *way]
    assert cli.main(command) == 0
    assert "verification  passed" in capsys.readouterr().out
    assert {"report.json", "report.html", "maskprop.json", "config.json"} <= {p.name for p in Path("small").iterdir()}
    assert (len(list(Path("small").glob("model-*.safetensors"))) > 2) == (not way)
    assert cli.main(["verify", "hf:dense", "hf:small", "--masks", "masks.pt", "--no-progress"]) == 0
    capsys.readouterr()
    assert cli.main(["show", "small", "--json"]) == 0
    (step,) = json.loads(capsys.readouterr().out)["parts"][""]["steps"]
    assert len(step["plan"]["keep"]["transformer.h.0.mlp.c_proj.weight"][0]["index"]) == 40
    assert cli.main(["show", "small"]) == 0
    assert "40 of 48" in capsys.readouterr().out
    assert cli.main(["show", "dense"]) == 1
    assert "is a Hugging Face directory without a plan" in capsys.readouterr().err
