"""Attributes that name a size which changed, though ``forward`` does not read them.

``num_heads`` of a block that reshapes by ``head_dim`` alone is one: nothing goes wrong where it stays, but whoever
reads it later (another pruning, a logger, a user) is told the dense size. An attribute is set only where it cannot
mean anything else: all sizes of its value around the module changed to one and the same number, and in every other
module of the class, too, it is one of the sizes around. The number of a layer is not, nor what is called a position:
a cache may read those later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from maskprop.align.plan import AttributeChange
from maskprop.modules import modules_by_path, own_tensors
from maskprop.rewrite.replay import Replay

# Widths that torch's modules check at most.
_WIDTHS = ("num_features", "num_channels")
# What such numbers are called that are no width, though one may be as large by chance.
_NO_WIDTH = re.compile("idx|index|position|length|seq|vocab|token|pad|layers|depth")


def unread_attributes(model: nn.Module, replay: Replay) -> list[AttributeChange]:
    """Changes of integer attributes that follow from the sizes around each module.

    Args:
        model: the compact model, which follows the plan.
        replay: what the plan expects.
    """
    plan = replay.alignment.plan
    changed = {(c.module, c.attribute) for c in plan.attributes}
    found: dict[tuple[type, str], list[AttributeChange]] = {}
    others: set[tuple[type, str]] = set()  # what is no size in some module of the class
    for path, module in modules_by_path(model).items():
        # what torch's own modules hold follows their tensors; a norm without any still says how wide it is
        attributes = vars(module)
        if type(module).__module__.startswith("torch.nn."):
            attributes = {} if own_tensors(module) else {k: attributes[k] for k in _WIDTHS if k in attributes}
        numbers = {name: value for name, value in attributes.items() if type(value) is int}
        if not numbers:
            continue
        sizes: dict[int, set[int]] = {}
        for old, new in _sizes(module, path, replay):
            sizes.setdefault(old, set()).add(new)
        for name, value in numbers.items():
            key, to = (type(module), name), sizes.get(value, set())
            if (sizes and not to) or _NO_WIDTH.search(name):
                others.add(key)
            if len(to) == 1 and value > 1 and value not in to and (path, name) not in changed:
                found.setdefault(key, []).append(AttributeChange(path, name, value, *to))
    return [change for key, changes in found.items() if key not in others for change in changes]


def _sizes(module: nn.Module, path: str, replay: Replay) -> Iterator[tuple[int, int]]:
    """Dense and compact sizes in the ops that a module makes itself, and in its and its children's tensors."""
    for op in replay.ops_of(path):
        for dense, compact in replay.around(op):
            yield from zip(dense or (), compact or (), strict=False)
    for key, owner in [("", module), *module.named_children()]:
        prefix = ".".join(part for part in (path, key) if part)
        for name, tensor in own_tensors(owner).items():
            dense = replay.alignment.plan.shapes.get(f"{prefix}.{name}".lstrip("."), tuple(tensor.shape))
            yield from zip(dense, tensor.shape, strict=False)
