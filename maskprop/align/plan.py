"""The Plan: plain data that says how to make the model smaller.

For each of the model's tensors and axes the kept indices in order, what is added to the sliced tensors, which modules
get a bias, and which attributes change. It needs neither the trace nor the dummy input to be applied, and it
round-trips through JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maskprop.errors import PlanError

FORMAT = 1


@dataclass
class Keep:
    """Kept indices along one axis, in order.

    Attributes:
        axis: the axis.
        index: int64. One axis: the same everywhere. More: ragged, one row of indices for every *kept* index of the
            axes ``over`` (which must come before ``axis``).
        over: the axes along which the choice varies.
    """

    axis: int
    index: Tensor
    over: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many units stay."""
        return int(self.index.shape[-1])


@dataclass
class Add:
    """A constant to add to a sliced tensor.

    Attributes:
        name: the tensor.
        value: float64; has the compact tensor's shape, or that of one slice of it.
        axis: with ``at``, the compact slice to add to; ``None`` for the whole tensor.
    """

    name: str
    value: Tensor
    axis: int | None = None
    at: int = 0


@dataclass
class AttributeChange:
    """A module attribute that follows the new sizes."""

    module: str
    attribute: str
    old: Any
    new: Any


@dataclass
class Plan:
    """What leaves, what is folded, what changes.

    Attributes:
        shapes: dense shape of every tensor named in ``keep``.
        keep: by tensor name.
        add: constants that removed units leave behind.
        new_bias: values of biases that modules without one get, by parameter name (compact size).
        attributes: module attributes to set.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    keep: dict[str, list[Keep]] = field(default_factory=dict)
    add: list[Add] = field(default_factory=list)
    new_bias: dict[str, Tensor] = field(default_factory=dict)
    attributes: list[AttributeChange] = field(default_factory=list)

    def compact_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor after slicing."""
        shape = list(self.shapes[name])
        for keep in self.keep.get(name, []):
            shape[keep.axis] = keep.count
        return tuple(shape)

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """The kept part of a tensor, in its memory format.

        Raises:
            PlanError: the tensor's shape is not the one that the plan was made for.
        """
        if tuple(tensor.shape) != self.shapes[name]:
            raise PlanError(
                f"the plan was made for '{name}' of shape {self.shapes[name]}; the model has shape "
                f"{tuple(tensor.shape)}. "
                "Build the dense architecture that the plan was made from."
            )
        channels_last = (
            tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        )
        for keep in self.keep[name]:
            index = keep.index.to(tensor.device)
            if not keep.over:
                tensor = tensor.index_select(keep.axis, index)
            else:
                shape = [tensor.shape[d] if d in keep.over else 1 for d in range(tensor.ndim)]
                shape[keep.axis] = keep.count
                full = [*tensor.shape[: keep.axis], keep.count, *tensor.shape[keep.axis + 1 :]]
                tensor = tensor.gather(keep.axis, index.reshape(shape).expand(full))
        return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor.contiguous()

    def __or__(self, other: Plan) -> Plan:
        """Two plans for different tensors as one."""
        return Plan(
            self.shapes | other.shapes,
            self.keep | other.keep,
            self.add + other.add,
            self.new_bias | other.new_bias,
            self.attributes + other.attributes,
        )

    def only(self, belongs: Callable[[str], bool]) -> Plan:
        """The part of the plan that is about some tensors and modules, told by their names."""
        return Plan(
            shapes={k: v for k, v in self.shapes.items() if belongs(k)},
            keep={k: v for k, v in self.keep.items() if belongs(k)},
            add=[a for a in self.add if belongs(a.name)],
            new_bias={k: v for k, v in self.new_bias.items() if belongs(k)},
            attributes=[a for a in self.attributes if belongs(a.module)],
        )

    @property
    def empty(self) -> bool:
        """Whether nothing leaves."""
        return not self.keep

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings."""
        return {
            "format": FORMAT,
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "keep": {
                name: [{"axis": k.axis, "over": list(k.over), "index": k.index.tolist()} for k in keeps]
                for name, keeps in self.keep.items()
            },
            "add": [{"name": a.name, "axis": a.axis, "at": a.at, "value": a.value.tolist()} for a in self.add],
            "new_bias": {name: value.tolist() for name, value in self.new_bias.items()},
            "attributes": [
                {"module": c.module, "attribute": c.attribute, "old": _plain(c.old), "new": _plain(c.new)}
                for c in self.attributes
            ],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Read back what :meth:`to_dict` wrote.

        Raises:
            PlanError: it is not a plan, or one of another format.
        """
        if data.get("format") != FORMAT:
            raise PlanError(
                f"the plan has format {data.get('format')!r}; this version of maskprop reads format "
                f"{FORMAT}. Make the plan again with this version."
            )
        try:
            return cls(
                shapes={k: tuple(v) for k, v in data["shapes"].items()},
                keep={
                    name: [
                        Keep(k["axis"], torch.tensor(k["index"], dtype=torch.int64), tuple(k["over"])) for k in keeps
                    ]
                    for name, keeps in data["keep"].items()
                },
                add=[
                    Add(a["name"], torch.tensor(a["value"], dtype=torch.float64), a["axis"], a["at"])
                    for a in data["add"]
                ],
                new_bias={name: torch.tensor(value, dtype=torch.float64) for name, value in data["new_bias"].items()},
                attributes=[
                    AttributeChange(a["module"], a["attribute"], _unplain(a["old"]), _unplain(a["new"]))
                    for a in data["attributes"]
                ],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"the plan is damaged: {type(error).__name__}: {error}. Make it again, or restore the file "
                "from where it came."
            ) from error

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises: PlanError: the text is not a plan."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"the plan is not JSON: {error}. Restore the file from where it came.") from error
        return cls.from_dict(data)

    def __str__(self) -> str:
        lines = [f"{name}: {list(self.shapes[name])} -> {list(self.compact_shape(name))}" for name in self.keep]
        lines += [f"{a.name} += constant" for a in self.add]
        lines += [f"{name}: new bias" for name in self.new_bias]
        lines += [f"{c.module}.{c.attribute}: {c.old} -> {c.new}" for c in self.attributes]
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    return (
        {"tuple": [_plain(v) for v in value]}
        if isinstance(value, tuple)
        else [_plain(v) for v in value]
        if isinstance(value, list)
        else value
    )


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(_unplain(v) for v in value["tuple"])
    return [_unplain(v) for v in value] if isinstance(value, list) else value
