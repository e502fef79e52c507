"""Hugging Face: compact models through save_pretrained and from_pretrained."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from maskprop import ModelSpeedup, cli, hf
from maskprop.errors import ArchitectureError, LoadError, SaveError
from tests.models import rows

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def llama() -> nn.Module:
    sizes = {**SMALL, "vocab_size": 50, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def bert() -> nn.Module:
    sizes = {**SMALL, "vocab_size": 50, "max_position_embeddings": 64}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4))


# The rows of the MLP's first layer, and the parameters in which they are.
MLP: dict[str, tuple[str, ...]] = {
    "llama": ("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
    "bert": (
        "bert.encoder.layer.{}.intermediate.dense.weight",
        "bert.encoder.layer.{}.intermediate.dense.bias",
    ),
    "gpt2": ("transformer.h.{}.mlp.c_fc.weight", "transformer.h.{}.mlp.c_fc.bias"),
}
MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "bert": bert, "gpt2": gpt2}


def randomise(model: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            made = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(made + 1 if parameter.ndim == 1 and name.endswith("weight") else made)
    return model.eval()


def masks_of(name: str, model: nn.Module, uniform: bool, biases: bool) -> dict[str, Tensor]:
    """MLP units pruned; with their biases left alone, they leave constants behind."""
    masks: dict[str, Tensor] = {}
    for layer in range(3):
        keep = torch.ones(48)
        keep[: 8 if uniform else 8 + 4 * layer] = 0
        for pattern in MLP[name]:
            parameter = model.get_parameter(pattern.format(layer))
            if parameter.ndim == 1 and not biases:
                continue
            transposed = parameter.ndim == 2 and parameter.shape[0] != 48
            masks[pattern.format(layer)] = keep if parameter.ndim == 1 or transposed else keep[:, None]
    return masks


def compact(name: str, generator: torch.Generator, uniform: bool) -> nn.Module:
    """The model with units of its MLPs gone: as many in every layer, or more with every layer."""
    model = randomise(MODELS[name](), generator)
    masks = masks_of(name, model, uniform, biases=True)
    ids = torch.randint(0, 50, (2, 7), generator=generator)
    ModelSpeedup(model, {"input_ids": ids}, masks).speedup_model()
    return model


def same(a: nn.Module, b: nn.Module, generator: torch.Generator) -> None:
    ids = torch.randint(0, 50, (3, 9), generator=generator)
    with torch.no_grad():
        for x, y in zip(a(input_ids=ids).to_tuple(), b(input_ids=ids).to_tuple(), strict=True):
            assert not isinstance(x, Tensor) or torch.equal(x, y)


def assert_plain(model: nn.Module) -> None:
    """Nothing says that the model is quantised; what transformers refuses of quantised ones works."""
    for module in model.modules():
        assert not getattr(module, "is_quantized", False)
    assert getattr(model, "hf_quantizer", None) is None
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model.config, "_is_quantized")
    copy.deepcopy(model).half().float()


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "by layer"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, uniform: bool, generator: torch.Generator, tmp_path: Path) -> None:
    model = compact(name, generator, uniform)
    hf.save_pretrained(model, tmp_path)
    assert (tmp_path / "maskprop.json").exists() is not uniform
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in config) is not uniform
    if uniform:
        assert config.get("intermediate_size", config.get("n_inner")) == 40
    assert not hasattr(model.config, "quantization_config")
    loaded = type(model).from_pretrained(tmp_path)
    same(model, loaded, generator)
    same(model, hf.load_pretrained(tmp_path), generator)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    hf.save_pretrained(loaded, tmp_path / "again")
    same(model, type(model).from_pretrained(tmp_path / "again"), generator)
    assert_plain(loaded)


def test_generation_and_other_classes(generator: torch.Generator, tmp_path: Path) -> None:
    model = compact("llama", generator, uniform=False)
    hf.save_pretrained(model, tmp_path)
    ids = torch.randint(3, 50, (1, 6), generator=generator)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for cache in (True, False):
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache, "pad_token_id": 0}
        assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))
    base = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert_plain(base)
    head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    with torch.no_grad():
        assert torch.equal(head.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    hf.save_pretrained(base, tmp_path / "base")
    again = transformers.AutoModel.from_pretrained(tmp_path / "base")
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, base(ids).last_hidden_state)
        assert torch.equal(wrapped.model(ids).last_hidden_state, base(ids).last_hidden_state)


def test_shards_and_dtypes(generator: torch.Generator, tmp_path: Path) -> None:
    model = compact("llama", generator, uniform=False)
    hf.save_pretrained(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    same(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path), generator)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.model.layers[2].mlp.up_proj.out_features == 32


def test_whole_heads_in_the_config(generator: torch.Generator, tmp_path: Path) -> None:
    """A head of BERT is gone in every layer: no field of its config says so, and the plan does."""
    model = randomise(bert(), generator)
    masks: dict[str, Tensor] = {}
    for layer in range(3):
        for part in ("query", "key", "value"):
            masks |= rows(model, f"bert.encoder.layer.{layer}.attention.self.{part}", list(range(8)))
    ids = torch.randint(0, 50, (2, 7), generator=generator)
    ModelSpeedup(model, {"input_ids": ids}, masks).speedup_model()
    assert model.bert.encoder.layer[0].attention.self.query.out_features == 24
    hf.save_pretrained(model, tmp_path)
    same(model, transformers.BertForSequenceClassification.from_pretrained(tmp_path), generator)


def test_training_goes_on(generator: torch.Generator, tmp_path: Path) -> None:
    hf.save_pretrained(compact("gpt2", generator, uniform=False), tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    ids = torch.randint(0, 50, (2, 7), generator=generator)
    loss = loaded(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight  # tied still


@pytest.mark.parametrize("fault", ["os.replace", "safetensors.torch.save_file", "pathlib.Path.write_text"])
def test_a_full_disk_leaves_what_was_there(
    fault: str, generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails, the old model still loads; a new directory does not appear half."""
    old = compact("llama", generator, uniform=True)
    hf.save_pretrained(old, tmp_path / "there", max_shard_size="20KB")
    before = {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()}
    new = compact("llama", generator, uniform=False)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for target in ("there", "fresh"):
        with monkeypatch.context() as patch:
            patch.setattr(fault, full)
            if fault.startswith("safetensors"):
                patch.setattr(transformers.modeling_utils, "safe_save_file", full)
            with pytest.raises(SaveError, match=r"could not be saved.*No space left.*before is unchanged"):
                hf.save_pretrained(new, tmp_path / target)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()} == before
    (tmp_path / "there" / "notes.txt").write_text("mine")
    hf.save_pretrained(new, tmp_path / "there")  # in place of shards and a config that says it: a plan, and one file
    assert {p.name for p in (tmp_path / "there").iterdir()} == {
        "config.json", "generation_config.json", "maskprop.json", "model.safetensors", "notes.txt",
    }  # fmt: skip
    same(new, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "there"), generator)


def test_trainer(generator: torch.Generator, tmp_path: Path) -> None:
    """The loaded model is no quantised one: transformers' own trainer takes it, and it is cast both ways."""
    hf.save_pretrained(compact("llama", generator, uniform=False), tmp_path / "small")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    ids = torch.randint(0, 50, (6, 7), generator=generator)
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(loaded, settings, train_dataset=[{"input_ids": i, "labels": i} for i in ids])
    result = trainer.train()
    assert result.global_step == 3
    assert math.isfinite(result.training_loss)
    assert not any(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
    hf.save_pretrained(trainer.model, tmp_path / "trained")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    same(loaded.eval(), again, generator)
    half = copy.deepcopy(again).half()
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    for (name, p), q in zip(half.float().named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q.half().float()), name


def test_a_dense_model_saves_as_ever(generator: torch.Generator, tmp_path: Path) -> None:
    model = randomise(bert(), generator)
    hf.save_pretrained(model, tmp_path)
    assert not (tmp_path / "maskprop.json").exists()
    same(model, transformers.BertForSequenceClassification.from_pretrained(tmp_path), generator)


class ScaledConfig(transformers.PretrainedConfig):
    model_type = "maskprop_test_scaled"

    def __init__(self, width: int = 6, **options: Any) -> None:
        self.width = width
        super().__init__(**options)


class Scaled(transformers.PreTrainedModel):
    """Holds a buffer that no checkpoint holds, and that shrinks."""

    config_class = ScaledConfig

    def __init__(self, config: ScaledConfig) -> None:
        super().__init__(config)
        self.a, self.b = nn.Linear(4, config.width), nn.Linear(config.width, 3)
        self.register_buffer("scale", torch.arange(1.0, config.width + 1), persistent=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Scaled):
            with torch.no_grad():
                module.scale.copy_(torch.arange(1.0, self.config.width + 1))  # as rotary embeddings do: at dense size

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.scale)


def test_buffers_that_no_checkpoint_holds(generator: torch.Generator, tmp_path: Path) -> None:
    model = randomise(Scaled(ScaledConfig()), generator)
    x = torch.randn(2, 4, generator=generator)
    ModelSpeedup(model, x, rows(model, "a", [0, 2])).speedup_model()
    assert model.scale.tolist() == [2, 4, 5, 6]
    hf.save_pretrained(model, tmp_path)
    loaded = Scaled.from_pretrained(tmp_path)
    assert loaded.scale.tolist() == [2, 4, 5, 6]
    assert torch.equal(loaded(x), model(x))


def test_faults(generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compact("llama", generator, uniform=False)
    hf.save_pretrained(model, tmp_path)
    text = (tmp_path / "maskprop.json").read_text()
    (tmp_path / "maskprop.json").write_text(text[: len(text) // 2])
    with pytest.raises(LoadError, match=r"maskprop\.json in .* is damaged"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "maskprop.json").unlink()
    with pytest.raises(LoadError, match=r"holds no maskprop\.json, which its config\.json asks for"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "maskprop.json").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ArchitectureError, match="the plan was made for Embedding"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Nothing"]}))
    with pytest.raises(LoadError, match="names Nothing, which transformers does not have"):
        hf.load_pretrained(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="could not be saved"):
        hf.save_pretrained(model, tmp_path / "file" / "below")
    assert not hasattr(model.config, "quantization_config")


def test_command_line(
    generator: torch.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    randomise(vit(), generator).save_pretrained("dense")
    keep = torch.ones(48)
    keep[:9] = 0
    names = [n for n, p in vit().named_parameters() if p.shape[0] == 48]
    model = vit()
    masks = {n: keep if model.get_parameter(n).ndim == 1 else keep[:, None] for n in names[:4]}
    torch.save(masks, "masks.pt")
    assert cli.main(["compact", "hf:dense", "--masks", "masks.pt", "--out", "small", "--no-progress"]) == 0
    assert cli.main(["verify", "hf:dense", "hf:small", "--masks", "masks.pt", "--no-progress"]) == 0
    assert "equal" in capsys.readouterr().out
    small = transformers.AutoModelForImageClassification.from_pretrained("small")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
