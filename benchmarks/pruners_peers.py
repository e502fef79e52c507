"""Parameters left at ratio 0.5 by maskprop's pruners and by Torch-Pruning, on the same models.

    pip install --no-deps torch-pruning==1.6.1
    python -m benchmarks.pruners_peers [--model NAME ...] [--write]

Both prune half of the units of every group by L1 norm. Torch-Pruning is asked three times: as it is by default (heads
are left alone, axes that a layer norm normalises over are cut), with heads cut too, and for the units that maskprop
takes: heads, and no axis that a layer norm normalises over. Beside each count stands how far the outputs are from
those of the model with what left set to zero. Weights are random, with biases and affines that matter. ``--write``
puts the table into docs/pruners.md. Seconds go to stderr.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from maskprop import ModelSpeedup
from maskprop._torchvision import import_torchvision
from maskprop.graph.trace import split_inputs
from maskprop.pruning import L1NormPruner, measure, prunable_groups

from .insert import put
from .torch_pruning_peer import prune_by_torch_pruning
from .zoo.check import masked_reference, relative_error
from .zoo.randomise import randomise
from .zoo.specimen import Inputs, call

ROOT = Path(__file__).parent.parent
IMAGE = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
TOKENS: Inputs = {"input_ids": torch.arange(32).reshape(1, 32)}
ASKED = (
    ("by default", {"heads": False, "layer_norms": True}),
    ("and heads", {"heads": True, "layer_norms": True}),
    ("heads, but no layer norm's axis", {"heads": True, "layer_norms": False}),
)


def models() -> dict[str, tuple[Callable[[], nn.Module], Inputs]]:
    import_torchvision()
    import timm
    import torchvision
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    def llama(key_value_heads: int) -> nn.Module:
        sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
        return LlamaForCausalLM(
            LlamaConfig(**sizes, num_key_value_heads=key_value_heads, vocab_size=1000, use_cache=False)
        )

    vision = torchvision.models
    return {
        "ResNet-18": (vision.resnet18, IMAGE),
        "ResNet-50": (vision.resnet50, IMAGE),
        "MobileNetV2": (vision.mobilenet_v2, IMAGE),
        "DenseNet-121": (vision.densenet121, IMAGE),
        "ViT-S/16 (timm)": (lambda: timm.create_model("vit_small_patch16_224"), IMAGE),
        "BERT, 4 layers": (lambda: BertForSequenceClassification(BertConfig(num_hidden_layers=4)), TOKENS),
        "Llama config, 8 heads": (lambda: llama(8), TOKENS),
        "Llama config, 4 key-value heads": (lambda: llama(4), TOKENS),
    }


def by_maskprop(model: nn.Module, dummy: Inputs) -> tuple[int, float, dict[str, float]]:
    """Parameters that are left, how far the outputs are from the masked model's, and seconds a stage."""
    original = copy.deepcopy(model)
    start = time.perf_counter()
    groups = prunable_groups(model, dummy)
    found = time.perf_counter()
    removal = L1NormPruner(model, 0.5, groups=groups).prune()
    chosen = time.perf_counter()
    ModelSpeedup(model, dummy, removal.masks, tracer=groups.tracer).speedup_model()
    done = time.perf_counter()
    assert removal.forecast == measure(model, split_inputs(dummy))
    masks = {f"{path}.{key}".lstrip("."): m for path, own in removal.masks.items() for key, m in own.items()}
    with torch.no_grad():
        error = relative_error(call(model, dummy), call(masked_reference(original, masks), dummy))
    seconds = {"groups": found - start, "masks": chosen - found, "speedup": done - chosen}
    return sum(p.numel() for p in model.parameters()), error, seconds


def cell(model: nn.Module, dummy: Inputs, options: dict[str, bool], ours: int) -> str:
    """Torch-Pruning's parameters, how far ours are from them, and how far its outputs are off."""
    try:
        theirs, error = prune_by_torch_pruning(copy.deepcopy(model), dummy, 0.5, **options)
    except Exception as fault:  # whatever it fails with belongs in the table
        print(repr(fault)[:300], file=sys.stderr)
        return f"fails: {type(fault).__name__}"
    return f"{theirs:,} ({(ours - theirs) / theirs:+.2%}), {error:.0e}"


def rows(wanted: list[str]) -> Iterator[str]:
    titles = ("model", "dense", "maskprop", *(f"Torch-Pruning, {title}" for title, _ in ASKED))
    yield "| " + " | ".join(titles) + " |"
    yield "|---" * len(titles) + "|"
    for name, (make, dummy) in models().items():
        if wanted and name not in wanted:
            continue
        torch.manual_seed(0)
        model = randomise(make().eval(), dummy)
        dense = sum(p.numel() for p in model.parameters())
        original = copy.deepcopy(model)
        ours, error, seconds = by_maskprop(model, dummy)
        print(name, {stage: round(s, 2) for stage, s in seconds.items()}, file=sys.stderr, flush=True)
        cells = [cell(original, dummy, options, ours) for _, options in ASKED]
        yield f"| {name} | {dense:,} | {ours:,}, {error:.0e} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[])
    parser.add_argument("--write", action="store_true", help="put the table into docs/pruners.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = []
    for row in rows(arguments.model):
        print(row, flush=True)
        table.append(row)
    if arguments.write:
        put(ROOT / "docs" / "pruners.md", "peers", "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
