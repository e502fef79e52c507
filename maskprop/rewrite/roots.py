"""Scales in branches that the dummy input did not take.

Attention divides its scores by the root of its head dim, often in one of several branches, each of which computes the
root anew. The replay sees the branch that was taken; in all others, a root of a size that shrank must stay the root of
the dense size, or every shape is right there and every number wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from maskprop.modules import modules_by_path
from maskprop.rewrite.authored import NoSource, Patch, Place, roots_in
from maskprop.rewrite.edits import Edits
from maskprop.rewrite.patched import patched_class
from maskprop.rewrite.replay import Replay


def root_patches(model: nn.Module, replay: Replay) -> list[tuple[str, Patch]]:
    """Patches and the paths of their modules, for modules whose batched products sum over fewer units than they did.

    Args:
        model: the compact model, which follows the plan.
        replay: what the plan expects.
    """
    found: list[tuple[str, Patch]] = []
    for path, module in modules_by_path(model).items():
        sizes = _shrunk_sums(replay, path)
        cls = type(module)
        if not sizes or hasattr(cls, "generated_source"):
            continue
        try:
            done = [patch.place for patch in getattr(cls, "generated_patches", ())]
            places = [place for place in roots_in(cls) if not any(_inside(place, other) for other in done)]
            patches = tuple(Patch(place, "root", 0, sizes) for place in places)
            if patches:
                patched_class(cls, patches)
        except NoSource:
            continue
        found += [(path, patch) for patch in patches]
    return found


def apply_roots(edits: Edits, patches: Sequence[tuple[str, Patch]]) -> None:
    """Put the dense sizes under the roots."""
    for path, patch in patches:
        module = edits.model.get_submodule(path)
        edits.set_class(module, patched_class(type(module), (patch,)))


def _shrunk_sums(replay: Replay, path: str) -> tuple[tuple[int, int], ...]:
    """``(compact, dense)`` lengths of the sums in a module's batched products; none if a length may mean several."""
    found: dict[int, int] = {}
    for op in replay.ops_of(path):
        if op.target is torch.ops.aten.bmm.default or op.target is torch.ops.aten.baddbmm.default:
            dense, compact = replay.around(op)[-2]
            if dense and compact and found.setdefault(compact[-1], dense[-1]) != dense[-1]:
                return ()
    return tuple((new, old) for new, old in sorted(found.items()) if new != old)


def _inside(place: Place, other: Place) -> bool:
    """Whether an expression overlaps another that is changed already."""
    first, last = (place.span[:2], place.span[2:]), (other.span[:2], other.span[2:])
    return place.chain == other.chain and first[0] <= last[1] and last[0] <= first[1]
