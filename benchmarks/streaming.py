"""A checkpoint larger than the memory it may use, compacted shard by shard.

    python -m benchmarks.streaming                    # 3.2 GB in bfloat16, a cap of 2.5 GB of address space
    python -m benchmarks.streaming --layers 48        # twice the layers, the same cap

Random weights of a Llama are written in shards, the command line compacts them in a process whose whole address
space is capped (``RLIMIT_AS``, which counts mapped files and code too), and the files are deleted. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from maskprop._torchvision import import_torchvision

HIDDEN, INNER, HEADS, VOCABULARY = 2048, 8192, 16, 32000
GB = 1e9


def write_dense(directory: Path, layers: int, shard_bytes: float) -> int:
    """Random weights, made and written a shard at a time; their size in bytes."""
    import_torchvision()  # before transformers, which imports it on its own
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    size = 0.0
    for name, shape in shapes.items():
        if size + shape.numel() * 2 > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += shape.numel() * 2
    index = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shard = {}
        for name in names:
            made = torch.randn(shapes[name], generator=generator, dtype=torch.float32).mul_(0.02)
            shard[name] = (made + 1 if len(shapes[name]) == 1 else made).bfloat16()
        save_file(shard, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(shape.numel() * 2 for shape in shapes.values())


def masks_of(layers: int) -> dict[str, Tensor]:
    """A quarter of every MLP and more with every layer, and one group of heads in every second layer."""
    masks: dict[str, Tensor] = {}
    head = HIDDEN // HEADS
    for layer in range(layers):
        root = f"model.layers.{layer}"
        keep = torch.ones(INNER, 1)
        keep[: INNER // 4 + 8 * layer] = 0
        masks[f"{root}.mlp.gate_proj.weight"] = masks[f"{root}.mlp.up_proj.weight"] = keep
        if layer % 2:
            for name, rows in (("q", 4 * head), ("k", head), ("v", head)):
                keep = torch.ones(HIDDEN if name == "q" else HIDDEN // 4, 1)
                keep[:rows] = 0
                masks[f"{root}.self_attn.{name}_proj.weight"] = keep
    return masks


def compact(dense: Path, masks: Path, out: Path, cap: float) -> dict[str, float]:
    """The command in a process of its own, with its peak of resident and of private memory, in bytes."""
    command = [sys.executable, "-m", "maskprop", "compact", str(dense), "--masks", str(masks), "--out", str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--no-progress"],
        stdout=subprocess.DEVNULL,
        # every thread reserves address space of its own, which is no memory and counts all the same
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (int(cap), int(cap))),
    )
    peak = {"VmHWM": 0.0, "RssAnon": 0.0, "VmPeak": 0.0}

    def watch() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for key, _, value in (line.partition(":") for line in lines):
                if key in peak:
                    peak[key] = max(peak[key], float(value.split()[0]) * 1024)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    watcher.join()
    if status:
        raise SystemExit(f"maskprop compact ended with {status}")
    return {"seconds": time.perf_counter() - start, **peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--cap", type=float, default=2.5, metavar="GB", help="of address space")
    parser.add_argument("--shard", type=float, default=0.25, metavar="GB")
    parser.add_argument("--folder", type=Path, help="where the files go meanwhile (default: the temporary folder)")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        dense, out, masks = Path(folder) / "dense", Path(folder) / "small", Path(folder) / "masks.pt"
        dense.mkdir()
        size = write_dense(dense, arguments.layers, arguments.shard * GB)
        torch.save(masks_of(arguments.layers), masks)
        found = compact(dense, masks, out, arguments.cap * GB)
        report = json.loads((out / "report.json").read_text())
        left = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        largest = max(p.stat().st_size for p in dense.glob("*.safetensors"))
    console.print(
        f"dense {size / GB:.2f} GB in shards of at most {largest / GB:.2f} GB, compact {left / GB:.2f} GB\n"
        f"cap on the address space {arguments.cap:.2f} GB; peak: address space {found['VmPeak'] / GB:.2f} GB, "
        f"resident {found['VmHWM'] / GB:.2f} GB, of which private {found['RssAnon'] / GB:.2f} GB\n"
        f"verification: {report['check']}\n{found['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
