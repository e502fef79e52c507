"""What a speedup changed, as data: enough to make the dense architecture compact again without tracing it.

The changes are found by comparing the model after the rewrite with a :class:`Snapshot` from before it, so
that nothing depends on which repair or replace function made them. The *record* of a model is a JSON text on
its root module, written when it is first needed; it survives ``copy.deepcopy`` and pickling, costs nothing to copy,
and needs no maskprop to be unpickled.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from maskprop.align.plan import Plan
from maskprop.errors import ArchitectureError, LoadError, PlanError
from maskprop.modules import modules_by_path, named_tensors
from maskprop.rewrite.apply import apply_tensors
from maskprop.rewrite.attention import CompactMultiheadAttention
from maskprop.rewrite.authored import NoSource, Patch
from maskprop.rewrite.constant import Constant
from maskprop.rewrite.edits import Edits
from maskprop.rewrite.generated import build_class
from maskprop.rewrite.patched import patched_class
from maskprop.rewrite.vetting import names_in, vet

RECORD = "_maskprop_record"
FORMAT = 1

# Classes of maskprop's own that a module may be turned into.
_CLASSES: dict[str, type[nn.Module]] = {
    "CompactMultiheadAttention": CompactMultiheadAttention,
    "Constant": Constant,
}
_INTERNAL = set(nn.Module().__dict__) | {RECORD}


class Snapshot:
    """Classes, attributes and tensor shapes of a model before a speedup."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = modules_by_path(model)
        self.classes = {path: type(m) for path, m in self.modules.items()}
        self.attributes = {path: vars(m).copy() for path, m in self.modules.items()}
        self.architecture = architecture(model, self.modules)
        self.shapes = {name: tuple(shape) for name, shape in self.architecture["tensors"].items()}
        self.parameters, self.bytes = count(self.modules)

    def changes(self, model: nn.Module) -> dict[str, ModuleChange]:
        """What is different now, by module path."""
        now = modules_by_path(model)
        gone = [path for path in self.modules if path not in now]
        found = defaultdict(ModuleChange, {path: ModuleChange(obstacle="it was removed") for path in gone})
        for path, module in now.items():
            if self.modules.get(path) is not module:
                found[path].obstacle = f"a {type(module).__name__} was put in its place"
                continue
            if type(module) is not self.classes[path]:
                found[path].cls = _describe_class(type(module))
                if found[path].cls is None:
                    found[path].obstacle = f"it was turned into a {type(module).__qualname__}"
            for name, old, value in self._set(path, module):
                if _is_plain(value):
                    found[path].attributes[name] = (None if old is _ABSENT else old, value)
                else:
                    found[path].obstacle = f"its attribute '{name}' became a {type(value).__name__}"
        for name in sorted(self.shapes.keys() - dict(named_tensors(now)).keys()):
            path, _, key = name.rpartition(".")
            if self.modules.get(path) is now.get(path, _ABSENT):
                found[path].dropped.append(key)
        return dict(found)

    def _set(self, path: str, module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
        """Attributes of a module that are others than before, with the old and the new value."""
        before = self.attributes[path]
        for name, value in vars(module).items():
            old = before.get(name, _ABSENT)
            if old is value or name in _INTERNAL:
                continue
            if not (_is_plain(old) and _is_plain(value) and type(old) is type(value) and old == value):
                yield name, old, value


@dataclass
class ModuleChange:
    """What a speedup did to one module.

    Attributes:
        attributes: old and new value by name.
        cls: the class it was turned into, as data.
        dropped: its parameters and buffers that are gone.
        obstacle: why the change cannot be written down, if so.
    """

    attributes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    cls: dict[str, Any] | None = None
    dropped: list[str] = field(default_factory=list)
    obstacle: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is absent is left out."""
        return {
            "attributes": {name: [_encode(old), _encode(new)] for name, (old, new) in self.attributes.items()},
            **({"class": self.cls} if self.cls else {}),
            **({"dropped": self.dropped} if self.dropped else {}),
            **({"obstacle": self.obstacle} if self.obstacle else {}),
        }


def architecture(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The fingerprint of a model: shapes of its parameters and buffers, class and settings of its modules."""
    return {
        "tensors": {name: list(t.shape) for name, t in named_tensors(modules_by_path(model, aliases=True))},
        "modules": {path: [type(m).__name__, m.extra_repr()] for path, m in modules.items()},
        "torch": _minor(torch.__version__),
    }


def check_architecture(model: nn.Module, expected: dict[str, Any]) -> None:
    """Compare a dense model with a fingerprint.

    Raises:
        ArchitectureError: they differ; the message names the first difference.
    """
    actual = architecture(model, modules_by_path(model))
    advice = "Build the dense architecture that was sped up, with the same arguments."
    same_torch = expected["torch"] == actual["torch"]  # other versions may print a module's settings otherwise
    for path, (kind, settings) in expected["modules"].items():
        if path not in actual["modules"]:
            raise ArchitectureError(
                f"the plan was made for a model with a {kind} at '{path}'; this model has none. {advice}"
            )
        got, got_settings = actual["modules"][path]
        if got != kind or (same_torch and settings != got_settings):
            raise ArchitectureError(
                f"the plan was made for {kind}({settings}) at '{path}'; this model has {got}({got_settings}). {advice}"
            )
    for name, shape in expected["tensors"].items():
        found = actual["tensors"].get(name)
        if found != shape:
            has = "no such tensor" if found is None else f"shape {tuple(found)}"
            raise ArchitectureError(
                f"the plan was made for '{name}' of shape {tuple(shape)}; this model has {has}. {advice}"
            )
    extra = [n for n in actual["tensors"] if n not in expected["tensors"]] + [
        p for p in actual["modules"] if p not in expected["modules"]
    ]
    if extra:
        raise ArchitectureError(
            f"this model has '{extra[0]}', which the model that the plan was made for does not. {advice}"
        )


class NewRecord:
    """The record of a model after one more speedup: written out only when it is read, copied (shared) or pickled.

    Args:
        model: sped up; it may bear the record of earlier speedups.
        before: what the model was.
        changes: what became of its modules.
        plan: what became of its tensors.
    """

    def __init__(self, model: nn.Module, before: Snapshot, changes: Mapping[str, ModuleChange], plan: Plan) -> None:
        self._earlier = model.__dict__.get(RECORD)
        self._dense, self._changes, self._plan = before.architecture, changes, plan

    @cached_property
    def text(self) -> str:
        """The record as JSON."""
        record = _parsed(self._earlier) or {"format": FORMAT, "dense": self._dense, "steps": []}
        modules = {path: change.to_dict() for path, change in self._changes.items()}
        record["steps"].append({"plan": self._plan.to_dict(), "modules": modules})
        return json.dumps(record)

    def __deepcopy__(self, memo: Any) -> NewRecord:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.text,)


def read_record(module: nn.Module) -> dict[str, Any] | None:
    """The record that speedups left on a module, if any."""
    return _parsed(module.__dict__.get(RECORD))


def _parsed(record: Any) -> dict[str, Any] | None:
    text = record.text if isinstance(record, NewRecord) else record
    return json.loads(text) if isinstance(text, str) else None


def apply_record(model: nn.Module, record: dict[str, Any], trust_code: bool = False) -> None:
    """Make a dense model, usually on the meta device, as compact as the record says.

    Args:
        model: changed in place; its values are sliced and get their constants, but no masks are applied.
        record: what :func:`read_record` gave.
        trust_code: take generated forwards that call more than torch's own functions.

    Raises:
        ArchitectureError: the model is not the one that was sped up.
        LoadError: a generated forward is not safe to run, or the record is damaged.
        PlanError: a plan in the record is damaged.
    """
    if record.get("format") != FORMAT:
        raise LoadError(
            f"the plan has format {record.get('format')!r}; this version of maskprop reads format {FORMAT}. "
            f"Save the model again with this version."
        )
    try:
        check_architecture(model, record["dense"])
        for step in record["steps"]:
            _apply_step(Edits(model), step, trust_code)
        model.__dict__[RECORD] = json.dumps(record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, (ArchitectureError, LoadError, PlanError)):
            raise
        raise LoadError(
            f"the plan is damaged: {type(error).__name__}: {error}. Restore the file from where it came."
        ) from error


def _apply_step(edits: Edits, step: dict[str, Any], trust_code: bool) -> None:
    apply_tensors(edits, modules_by_path(edits.model, aliases=True), Plan.from_dict(step["plan"]), {})
    for path, change in step["modules"].items():
        module = edits.model.get_submodule(path)
        if "class" in change:
            edits.set_class(module, _build_class(module, path, change["class"], trust_code))
        for name, (_, new) in change["attributes"].items():
            edits.set_attribute(module, name, _decode(new))
        for name in change.get("dropped", []):
            edits.drop_tensor(module, name)


def sub_record(record: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The part of a record that concerns one submodule, as a record of its own."""
    dot = prefix + "."

    def cut(table: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(dot): value for name, value in table.items() if name.startswith(dot)}

    def own(table: dict[str, Any]) -> dict[str, Any]:
        return ({"": table[prefix]} if prefix in table else {}) | cut(table)

    dense = record["dense"]
    steps = []
    for step in record["steps"]:
        plan = step["plan"]
        named = [{**a, "name": a["name"].removeprefix(dot)} for a in plan["add"] if a["name"].startswith(dot)]
        tables = {key: cut(plan[key]) for key in ("shapes", "keep", "new_bias")}
        steps.append({"plan": {**plan, **tables, "add": named, "attributes": []}, "modules": own(step["modules"])})
    architecture = {**dense, "tensors": cut(dense["tensors"]), "modules": own(dense["modules"])}
    return {**record, "dense": architecture, "steps": steps}


def obstacles(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Module paths, and why what became of them cannot be written down."""
    for step in record["steps"]:
        for path, change in step["modules"].items():
            if "obstacle" in change:
                yield path, change["obstacle"]


def count(modules: Mapping[str, nn.Module]) -> tuple[int, int]:
    """Elements of the parameters, and bytes of these and the persistent buffers; shared ones once."""
    parameters: dict[int, torch.Tensor] = {}
    buffers: dict[int, torch.Tensor] = {}
    for module in modules.values():
        parameters.update((id(t), t) for t in module._parameters.values() if t is not None)
        for name, t in module._buffers.items():
            if t is not None and name not in module._non_persistent_buffers_set:
                buffers[id(t)] = t
    sizes = [t.numel() for t in parameters.values()]
    held = [*zip(sizes, parameters.values(), strict=True), *((t.numel(), t) for t in buffers.values())]
    return sum(sizes), sum(n * t.element_size() for n, t in held)


# -- classes ------------------------------------------------------------------------------------


def _describe_class(cls: type) -> dict[str, Any] | None:
    members = vars(cls)
    if "generated_patches" in members:
        patches = [patch.to_dict() for patch in members["generated_patches"]]
        return {"patches": patches, "text": members["generated_text"]}
    if "generated_source" in members:
        return {
            "source": members["generated_source"],
            "imports": [[n, list(a)] for n, a in members["generated_imports"]],
        }
    return {"name": cls.__name__} if _CLASSES.get(cls.__name__) is cls else None


def _build_class(module: nn.Module, path: str, data: dict[str, Any], trust_code: bool) -> type:
    if "name" in data:
        return _CLASSES[data["name"]]
    if "patches" in data:
        author = getattr(type(module), "generated_from", type(module))
        try:
            return patched_class(author, tuple(Patch.from_dict(patch) for patch in data["patches"]))
        except NoSource as error:
            raise LoadError(
                f"the forward of '{path}' was changed in places that cannot be found again: {error}. "
                "Install the version of its library that the model was saved with, or speed the dense model up again."
            ) from error
    used = names_in(data["source"])
    imports = tuple((name, (home, attribute)) for name, (home, attribute) in data["imports"] if name in used)
    children = {part for name, _ in [*module.named_modules(), *module.named_parameters()] for part in name.split(".")}
    complaint = None if trust_code else vet(data["source"], imports, children)
    if complaint is not None:
        raise LoadError(
            f"the generated forward of '{path}' {complaint}, and loading would run it. "
            "Read it with `maskprop show`, and pass trust_code=True if you trust where the file came from."
        )
    return build_class(type(module), data["source"], imports)


# -- plain values -------------------------------------------------------------------------------


class _Absent:
    pass


_ABSENT = _Absent()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return type(value) in (tuple, list, torch.Size) and all(_is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def _encode(value: Any) -> Any:
    """JSON has no tuples."""
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    return [_encode(v) for v in value] if isinstance(value, list) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(_decode(v) for v in value["tuple"])
    return [_decode(v) for v in value] if isinstance(value, list) else value


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
