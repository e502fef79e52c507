"""Counters of speedups that do not depend on the machine; ``tests/test_counters.py`` holds the engine to them.

    python -m benchmarks.counters            # count again, write tests/counters.json, and say what changed
    python -m benchmarks.counters --check    # say it alone

They are: nodes of the graph; sweeps of the inference and rounds of the solver; how many ops each kind of rule served;
bytes of the facts; labels, that is units of all axes; tensors that shrink; parameters and operations before and after.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from .subjects import SUBJECTS, channels
from .zoo.handmade import HANDMADE
from .zoo.maskings import make_masks
from .zoo.randomise import randomise

PATH = Path(__file__).resolve().parent.parent / "tests" / "counters.json"
Counters = dict[str, Any]

# Name of the specimen -> masking.
SMALL = {
    "res_net": "constants",
    "inverted_residual": "zeros",
    "dense_net": "conflicts",
    "shuffle_net": "zeros",
    "unet": "constants",
    "hard_number": "zeros",
    "bert": "heads",
    "gpt2": "heads_out",
    "llama": "heads",
    "vi_t": "dims",
    "swin": "heads",
    "torch_encoder": "mlp_out",
}


def _small(name: str) -> Callable[[], tuple[nn.Module, Any, dict[str, Tensor]]]:
    def make() -> tuple[nn.Module, Any, dict[str, Tensor]]:
        specimen, masking = HANDMADE[name], SMALL[name]
        torch.manual_seed(0)
        model = randomise(specimen.build().eval(), specimen.inputs())
        return model, specimen.inputs(), make_masks(model, specimen.inputs(), [masking])[masking]

    return make


def _large(name: str) -> Callable[[], tuple[nn.Module, Any, dict[str, Tensor]]]:
    def make() -> tuple[nn.Module, Any, dict[str, Tensor]]:
        model = SUBJECTS[name].build()
        return model, SUBJECTS[name].inputs(), channels(model)

    return make


MODELS = {f"{name}/{masking}": _small(name) for name, masking in SMALL.items()}
MODELS |= {name: _large(name) for name in ("ResNet-50", "MobileNetV2")}


def count(name: str) -> Counters:
    """The counters of one speedup."""
    from maskprop import ModelSpeedup

    model, inputs, masks = MODELS[name]()
    speedup = ModelSpeedup(model, inputs, masks, verify=False)
    speedup.speedup_model()
    report, facts = speedup.report, speedup.facts
    return {
        "nodes": len(speedup.graph.nodes),
        "sweeps": report.sweeps,
        "solves": report.solves,
        "rules": dict(sorted(report.rules.items())),
        "fact_bytes": held(facts.known.values(), facts.needed.values()),
        "units": speedup.alignment.coupling.size,
        "tensors": len(speedup.plan.keep),
        "parameters": list(report.parameters),
        "flops": list(report.flops),
        "generated": len(report.repair.generated) if report.repair is not None else 0,
    }


def held(known: Iterable[Any], needed: Iterable[Any]) -> int:
    """Bytes of the facts' memory, values that were computed included."""
    facts = [fact for one in known for fact in (one if isinstance(one, tuple) else (one,))]
    tensors = [tensor for fact in facts for tensor in (fact.known, fact.zero, fact._value)]
    tensors += [tensor for one in needed for tensor in (one if isinstance(one, list) else (one,))]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def differences(before: dict[str, Counters], after: dict[str, Counters]) -> Iterator[str]:
    """What changed, a line a counter."""
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, {}), after.get(name, {})
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                yield f"{name}: {key}: {old.get(key)} -> {new.get(key)}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not write")
    arguments = parser.parse_args()
    console = Console(markup=False, highlight=False)
    with console.status("counting"):
        after = {name: count(name) for name in MODELS}
    before = json.loads(PATH.read_text()) if PATH.exists() else {}
    for line in differences(before, after):
        console.print(line)
    if not arguments.check:
        PATH.write_text(json.dumps(after, indent=1) + "\n")


if __name__ == "__main__":
    main()
