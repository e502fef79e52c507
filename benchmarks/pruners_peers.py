"""Parameters left at ratio 0.5 by maskprop's pruners and by Torch-Pruning, on the same models.

    pip install --no-deps torch-pruning==1.6.1
    python -m benchmarks.pruners_peers [--model NAME ...]

Both prune half of the units of every group by L1 norm. Torch-Pruning is told the number of heads, which
it cannot find, and to leave out the last layer, which it cannot see to be one. By default it also cuts
axes that a layer norm normalises over; what is left is then another function than the masked model,
which is why maskprop never does. The last column is Torch-Pruning told to leave those axes alone. Where
it fails, or leaves a model that does not run, the table says so. Whether its outputs are right is not
asked here. Seconds go to stderr.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from maskprop import ModelSpeedup
from maskprop._torchvision import import_torchvision
from maskprop.graph.trace import split_inputs
from maskprop.pruning import L1NormPruner, measure, prunable_groups

IMAGE = torch.randn(1, 3, 224, 224)
TOKENS = {"input_ids": torch.arange(32).reshape(1, 32)}


def models() -> dict[str, tuple[Callable[[], nn.Module], Any]]:
    import_torchvision()
    import timm
    import torchvision
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    small_llama = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
    )
    vision = torchvision.models
    return {
        "ResNet-18": (vision.resnet18, IMAGE),
        "ResNet-50": (vision.resnet50, IMAGE),
        "MobileNetV2": (vision.mobilenet_v2, IMAGE),
        "DenseNet-121": (vision.densenet121, IMAGE),
        "ViT-S/16 (timm)": (lambda: timm.create_model("vit_small_patch16_224"), IMAGE),
        "BERT-base": (lambda: BertModel(BertConfig(num_hidden_layers=4)), TOKENS),
        "Llama config": (lambda: LlamaForCausalLM(small_llama), TOKENS),
    }


def by_maskprop(model: nn.Module, dummy: Any) -> tuple[int, dict[str, float]]:
    """Parameters that are left, and seconds a stage."""
    start = time.perf_counter()
    groups = prunable_groups(model, dummy)
    found = time.perf_counter()
    pruner = L1NormPruner(model, 0.5, groups=groups)
    removal = pruner.prune()
    chosen = time.perf_counter()
    speedup = ModelSpeedup(model, dummy, removal.masks, tracer=groups.tracer)
    speedup.speedup_model()
    done = time.perf_counter()
    assert removal.forecast == measure(model, split_inputs(dummy))
    return (
        sum(p.numel() for p in model.parameters()),
        {"groups": found - start, "masks": chosen - found, "speedup": done - chosen},
    )


def by_torch_pruning(model: nn.Module, dummy: Any, keep_normalised: bool) -> int:
    import torch_pruning as tp

    heads = {}
    for module in model.modules():
        count = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
        if count is None and "Attention" in type(module).__name__:
            count = getattr(getattr(module, "config", None), "num_attention_heads", None)
        if isinstance(count, int):
            for path, child in module.named_modules():
                if isinstance(child, nn.Linear) and path.split(".")[-1] in (
                    "qkv",
                    "query",
                    "key",
                    "value",
                    "q_proj",
                ):
                    heads[child] = count
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    ignored: list[nn.Module] = [m for m in last if m.out_features == 1000]
    if keep_normalised:
        ignored += [m for m in model.modules() if isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("RMSNorm")]
    pruner = tp.pruner.MetaPruner(
        model,
        dummy,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
    )
    pruner.step()
    with torch.no_grad():
        args, kwargs = split_inputs(dummy)
        model(*args, **kwargs)
    return sum(p.numel() for p in model.parameters())


def peer(model: nn.Module, dummy: Any, keep_normalised: bool, ours: int) -> str:
    """A cell: parameters, and how far ours are from them."""
    try:
        theirs = by_torch_pruning(copy.deepcopy(model), dummy, keep_normalised)
    except Exception as error:  # whatever it fails with belongs in the table
        print(repr(error)[:300], file=sys.stderr)
        return f"fails: {type(error).__name__}"
    return f"{theirs:,} ({(ours - theirs) / theirs:+.2%})"


def rows(wanted: list[str]) -> Iterator[str]:
    titles = ("model", "dense", "maskprop", "Torch-Pruning", "the same, normalised axes kept")
    yield "| " + " | ".join(titles) + " |"
    yield "|---" * len(titles) + "|"
    for name, (make, dummy) in models().items():
        if wanted and name not in wanted:
            continue
        torch.manual_seed(0)
        model = make().eval()
        dense = sum(p.numel() for p in model.parameters())
        original = copy.deepcopy(model)
        ours, seconds = by_maskprop(model, dummy)
        print(name, {stage: round(s, 2) for stage, s in seconds.items()}, file=sys.stderr, flush=True)
        cells = [peer(original, dummy, keep, ours) for keep in (False, True)]
        yield f"| {name} | {dense:,} | {ours:,} | {cells[0]} | {cells[1]} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for row in rows(parser.parse_args().model):
        print(row, flush=True)
