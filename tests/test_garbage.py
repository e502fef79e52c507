"""What a speedup leaves behind in memory: nothing that lives longer than its user wants."""

from __future__ import annotations

import gc
import weakref

import pytest

from maskprop import ModelSpeedup
from maskprop.garbage import Garbage
from tests.small import MODELS, dense, inputs, masks


@pytest.mark.parametrize("name", MODELS)
def test_a_speedup_dies_when_it_is_let_go(name: str) -> None:
    """Without a collection: neither the undo log nor a traceback nor a frame keeps it, or the dense tensors, alive."""
    model = dense(name)
    speedup = ModelSpeedup(model, inputs(name), masks(name))
    gc.disable()
    try:
        speedup.speedup_model()
        held = [weakref.ref(speedup), weakref.ref(speedup.facts), weakref.ref(speedup.report)]
        del speedup
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()


class Ring:
    def __init__(self) -> None:
        self.me = self


def test_garbage_is_collected_when_there_is_much_of_it() -> None:
    garbage = Garbage()
    with garbage.ignored():
        assert not gc.isenabled()
        ring = weakref.ref(Ring())
    assert gc.isenabled()
    assert not garbage.due
    with garbage.ignored():
        assert ring() is not None, "an object is not many"
        kept = [[] for _ in range(gc.get_freeze_count() + len(gc.get_objects()) // 2)]
    assert garbage.due
    del kept
    with garbage.ignored():
        assert ring() is None
    assert not garbage.due


def test_what_the_caller_has_collected_is_not_collected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    garbage = Garbage()
    garbage.due = True
    gc.collect()
    monkeypatch.setattr(gc, "collect", lambda: pytest.fail("there is nothing to collect"))
    with garbage.ignored():
        assert not garbage.due


def test_what_the_caller_set_stays() -> None:
    gc.disable()
    try:
        with Garbage().ignored():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
