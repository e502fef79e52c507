"""Work that a speedup does and what it leaves, counted: a change shows here before it shows in seconds."""

from __future__ import annotations

import json

import pytest

from benchmarks.counters import MODELS, PATH, count, differences

EXPECTED = json.loads(PATH.read_text())
ADVICE = "If that is meant, run `python -m benchmarks.counters` and commit tests/counters.json."


def test_every_model_is_counted() -> None:
    assert EXPECTED.keys() == MODELS.keys(), ADVICE


@pytest.mark.parametrize("name", MODELS)
def test_counters(name: str) -> None:
    changed = list(differences({name: EXPECTED.get(name, {})}, {name: count(name)}))
    assert not changed, "\n".join([*changed, ADVICE])


def test_counting_again_gives_the_same() -> None:
    assert count("llama/heads") == count("llama/heads")


def test_differences_are_told() -> None:
    before, after = {"a": {"nodes": 3, "sweeps": 1}}, {"a": {"nodes": 4, "sweeps": 1}, "b": {"nodes": 1}}
    assert list(differences(before, after)) == ["a: nodes: 3 -> 4", "b: nodes: None -> 1"]
