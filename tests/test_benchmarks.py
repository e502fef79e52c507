"""The benchmarks' own parts: subjects and their masks, pages out of results, memory and exponents."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import coverage, engine, latency, machine, scaling, zoo_peer_table
from benchmarks.coverage_table import write_table
from benchmarks.engine_table import section
from benchmarks.latency_table import tables
from benchmarks.subjects import SUBJECTS, half, rows
from benchmarks.thin import calls, natively_thin
from maskprop import load_masks
from tests.small import compact, dense, inputs


@pytest.mark.parametrize("name", SUBJECTS)
def test_masks_fit_their_model(name: str) -> None:
    with torch.device("meta"):
        model = SUBJECTS[name].build()
    masks = SUBJECTS[name].masks(model)
    assert len(load_masks(model, masks).parameters) == len(masks) > 0
    for key, mask in masks.items():
        assert 0.5 <= mask.mean() <= 2 / 3, key  # of three heads, one leaves
        assert mask.numel() == max(mask.shape), key
    heads = SUBJECTS[name].heads
    if heads is not None:
        for layer, count in heads.by_layer(model).items():
            assert layer.weight.shape[0] % (count * heads.parts) == 0


def test_equal_widths_lose_the_same_half() -> None:
    assert torch.equal(half(64), half(64))
    assert half(64).sum() == 32
    masks = rows("fc", nn.Linear(3, 8), half(8))
    assert masks["fc.weight"].shape == (8, 1)
    assert masks["fc.bias"].shape == (8,)


def test_exponent() -> None:
    sizes = [10.0, 100.0, 1000.0]
    assert scaling.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_peak_memory() -> None:
    result, peak = machine.peak_memory(lambda n: torch.ones(n).sum(), 1 << 24)
    assert result == 1 << 24
    assert peak is None or peak >= 0.9 * (1 << 26)


def row(warm: float, **more: Any) -> dict[str, Any]:
    found = {"parameters": {"before": 100, "after": 25}, "peers": {}, "nodes": 9, "solves": 1}
    times = {"forward": 0.5, "copy": 0.1, "cold": 9.0, "warm": warm, "verified": 2 * warm}
    return {**found, **times, "stages": {"trace": warm / 2, "align": warm / 2}, **more}


RESULTS = {
    "machine": machine.describe(),
    "peers": {"Torch-Pruning": "1.6.1", "torch-simplify": None},
    "rounds": 3,
    "models": {
        "ResNet-50": row(1.0, peers={"Torch-Pruning": {"seconds": 4.0, "parameters": 25}}),
        "Swin-T": row(2.0, peers={"Torch-Pruning": {"seconds": 2.0, "parameters": 30}}),
        "BERT-base": row(9.0, peers={"Torch-Pruning": {"seconds": 2.0, "parameters": 100}}),
        "GPT-2": row(1.0, peers={"Torch-Pruning": {"failure": "KeyError: 'c_attn'"}}),
        "Llama-1B": {"failure": "exit status -9: no output"},
    },
}


def test_page_of_the_engine() -> None:
    results = json.loads(json.dumps(RESULTS))
    results["models"]["Swin-T"]["memory"] = {"bytes": 4e6, "peak": 2e6, "verified": 6e6, "peers": {}}
    text = "\n".join(section(results))
    assert "**0.50** of the time of Torch-Pruning 1.6.1 in the geometric mean over the 2 models" in text
    assert "at most 1.00 (Swin-T)" in text
    assert "did not make BERT-base smaller" in text
    assert "torch-simplify was not installed" in text
    assert "ResNet-50: **2.0** dense forward passes" in text
    assert "| Swin-T | 4 | 2 | 6 | 0.50 | 1.50 | — | — |" in text
    assert "* Torch-Pruning on GPT-2: `KeyError: 'c_attn'`" in text
    assert "* Llama-1B: `exit status -9: no output`" in text


def test_page_of_the_scaling() -> None:
    def one(size: int) -> dict[str, Any]:
        counts = {"size": size, "parameters": size, "weights": size, "nodes": 7 * size, "units": size}
        return {**counts, "seconds": {"trace": size / 10}, "total": size / 10, "bytes": size**2}

    results = {"machine": machine.describe(), "families": {"depth": [one(10), one(100), one(1000)]}}
    text = "\n".join(scaling.page(results, plot=False))
    assert "Seconds grow with the graph nodes to the power of **1.00**; 1.00 at the end." in text
    assert "Bytes grow with the graph nodes to the power of **2.00**" in text


def test_page_of_the_latency() -> None:
    setting = {"device": "cpu", "mode": "eager", "dtype": "float32", "layout": "contiguous", "batch": 1}
    common = {**setting, "model": "a", "machine": "m", "multiple": 1, "memory": 1e6, "spread": 0.1, "throughput": 9.0}
    rows = [
        {**common, "kind": "dense", "seconds": 4.0, "flops": 400, "products": 0.75},
        {**common, "kind": "compact", "seconds": 2.0, "flops": 100, "products": 0.5, "same_calls": True},
        {**common, "kind": "thin", "seconds": 1.9, "flops": 100},
        {**common, "kind": "control", "seconds": 1.9, "flops": 100, "to_thin": 0.999, "to_thin_error": 0.004},
    ]
    rows[1] |= {"to_thin": 1.05, "to_thin_error": 0.01}
    text = "\n".join(tables({"rows": rows}))
    assert "Compact against natively thin: 0 of 1 measurements within 3%" in text
    assert "Further apart than 3% by more than the interval says: 1." in text
    assert "As a control, a second natively thin model against natively thin: 1 of 1" in text
    # of 4 s, 3 s in products; of 2 s, 1 s: three times as fast, and the rest as fast as before
    assert "| 1.050 ± 0.010 | 0.999 ± 0.004 | 4.00 | **2.00** | 0.50 | 75% | 3.00 | 1.00 |" in text


def test_models_are_compared_within_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 2.0, 1.0] * 3)
    monkeypatch.setattr(latency, "clocked", lambda run, device, least: next(seconds))
    monkeypatch.setattr(latency.random.Random, "shuffle", lambda self, order: None)
    models = {(kind, 1): nn.Conv2d(3, 4, 3) for kind in ("dense", "compact", "thin")}
    setting = {"device": "cpu", "mode": "eager", "dtype": "float32", "layout": "contiguous", "batch": 2}
    options = argparse.Namespace(rounds=3, patience=60, seconds=0.1)
    found = latency.measure(models, SUBJECTS["MobileNetV2"], setting, options)
    assert found["compact", 1]["to_thin"] == 2.0
    assert found["dense", 1]["throughput"] == 0.5
    assert 0 < found["dense", 1]["products"] <= 1
    assert "to_thin" not in found["thin", 1]


def test_a_worker_measures_and_tells_why_a_peer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: nn.Module, subject: Any) -> None:
        raise TypeError("no")

    monkeypatch.setattr(engine, "RUN_PEER", {"Torch-Pruning": failing})
    monkeypatch.setattr(engine, "version_of", lambda name: "1")
    found = engine.Worker("MobileNetV2").times(1)
    assert found["peers"] == {"Torch-Pruning": {"failure": "TypeError: no"}}
    assert found["parameters"]["after"] < found["parameters"]["before"]
    assert found["error"] < 1e-5
    assert set(found["stages"]) >= {"trace", "infer", "align", "rewrite"}
    assert all(found[key] > 0 for key in ("cold", "warm", "verified", "forward", "copy"))


def test_coverage_page_merges_the_runs_of_several_zoos(tmp_path: Path) -> None:
    row = {
        "masking": "heads",
        "outcome": "exact",
        "before": 10,
        "after": 6,
        "error": 1e-7,
        "seconds": 0.1,
        "how": "modules",
    }
    extra = {
        "generated": {"x.Attention": "a number", "x.Other": "another"},
        "changed": {"x.Attention": {"y.view(4, -1)": "literal"}, "x.Other": {}},
    }
    first = [
        {**row, "zoo": "timm", "model": "a", "outcome": "refused", "detail": "VerifyError: no"},
        {**row, "zoo": "timm", "model": "a", "extra": extra},  # run again
        {"zoo": "timm", "model": "a", "masking": "done", "outcome": "exact"},
    ]
    second = [{**row, "zoo": "hf", "model": "b", "outcome": "mismatch", "detail": "relative error 0.5"}]
    for name, lines in (("timm", first), ("elsewhere", second)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    write_table(list(coverage.read_results(tmp_path).values()), tmp_path / "coverage.md")
    page = (tmp_path / "coverage.md").read_text()
    assert "**1 of 2 models are exact under every masking**" in page
    assert "1 of 2 speedups are exact; 1 of those removed parameters." in page
    assert "**Silent mismatches: 1.** Not exact, for whatever reason: 1." in page
    assert "| b | heads | 10 | 6 | 1.0e-07 | 0.1 | **mismatch**: relative error 0.5 |" in page
    assert "| `x.Attention` | literal: `y.view(4, -1)` | a number | a |" in page
    assert "| `x.Other` | whole | another | a |" in page
    assert "* a number that stands in the code: 1 classes;" in page
    assert "VerifyError" not in page


def test_coverage_page_puts_torch_pruning_beside_ours() -> None:
    row = {"zoo": "timm", "asked": "default", "before": 100, "parameters": 30}
    ours = {"ours": "exact", "ours_error": 1e-7}
    rows = [
        {**row, **ours, "model": "a", "theirs": "right", "error": 1e-7, "after": 30},
        {**row, **ours, "model": "b", "theirs": "right", "error": 1e-7, "after": 31},
        {**row, **ours, "model": "c", "theirs": "wrong", "error": 0.4, "after": 50},
        {**row, "model": "d", "theirs": "fails", "why": "KeyError: 'x'"},
        {**row, **ours, "model": "d", "asked": "told", "theirs": "right", "error": 1e-7, "after": 29},
    ]
    text = "\n".join(zoo_peer_table.section(rows))
    assert "a model that runs for 3 of 4 models, and one that computes what the\n  masked model does for **2**" in text
    assert "maskprop, on what it removed: **4 of 4 exact**" in text
    assert "leaves more parameters than it does in **1 of\n  3** rows, and fewer in 1." in text
    assert "| timm | d | default | fails: KeyError: 'x' |  | 100 | 30 |  |  |" in text
    assert not list(zoo_peer_table.section([]))


@pytest.mark.parametrize("name", ["cnn", "vit", "bert", "llama"])
def test_a_compact_model_does_the_work_of_a_thin_one(name: str) -> None:
    """Call for call, on tensors laid out alike: that is what makes it as fast, whatever a clock shows."""
    small = compact(name)
    given = inputs(name)
    sample = given if isinstance(given, dict) else {"": given}

    def made_by(model: nn.Module) -> list[Any]:
        return calls(lambda: latency.call(model, sample))

    made = made_by(small)
    assert made == made_by(natively_thin(small))
    assert made != made_by(dense(name))
