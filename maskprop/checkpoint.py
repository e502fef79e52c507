"""Compact a Hugging Face checkpoint without ever loading it: one shard and the plan are all that is held.

The model is built on the meta device, its tensors are read one by one where a value matters, and the compact shards
are written one after the other::

    checkpoint = Checkpoint("llama-7b")
    speedup = ModelSpeedup(checkpoint.model, {"input_ids": ids}, "masks.safetensors", read=checkpoint.read)
    speedup.speedup_model()
    checkpoint.write(speedup, "llama-small")
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskprop._directory import appearing
from maskprop.errors import LoadError, SaveError
from maskprop.graph.randomness import generators_kept
from maskprop.hf import (
    BUFFERS,
    PLAN,
    example,
    expressing_config,
    flagged,
    hidden_buffers,
    model_class,
    read_plan,
    shapes_of,
    write_plan,
)
from maskprop.modules import modules_by_path, named_tensors
from maskprop.rewrite.apply import compact_tensor
from maskprop.rewrite.steps import apply_record, read_record
from maskprop.rewrite.verify import compare_outputs, run_read
from maskprop.speedup import ModelSpeedup
from maskprop.storage import PathLike

log = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


class Shards:
    """The tensors of a directory's safetensors files, read one at a time.

    Raises:
        LoadError: there are none, or they are damaged.
    """

    def __init__(self, directory: PathLike) -> None:
        self.directory = Path(directory)
        self.files: dict[str, list[str]] = {}
        try:
            if (self.directory / INDEX).is_file():
                index = json.loads((self.directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
                for name, file in index.items():
                    self.files.setdefault(Path(file).name, []).append(name)
            else:
                with safe_open(self.directory / SINGLE, "pt") as file:
                    self.files[SINGLE] = list(file.keys())
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
            raise LoadError(
                f"'{self.directory}' holds no readable {INDEX} or {SINGLE} ({error}). Give a directory that "
                "save_pretrained wrote, with safetensors."
            ) from error
        self._file = {name: file for file, names in self.files.items() for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __getitem__(self, name: str) -> Tensor:
        path = self.directory / self._file[name]
        try:
            with safe_open(path, "pt") as file:
                return torch.clone(file.get_tensor(name))  # or the whole file stays mapped as long as the tensor lives
        except (OSError, RuntimeError, SafetensorError) as error:
            raise LoadError(
                f"'{name}' in '{path}' cannot be read: {error}. Restore the file from where it came, or free memory."
            ) from error


class Checkpoint:
    """A directory that ``save_pretrained`` wrote, with its model on the meta device.

    Args:
        directory: with ``config.json`` and safetensors; it may hold a model that is compact already.
        trust_code: see :func:`maskprop.load`.

    Attributes:
        model: on the meta device, in evaluation mode.

    Raises:
        LoadError: files are missing or damaged, or hold the tensors under other names than the model does.
    """

    model: Any

    def __init__(self, directory: PathLike, *, trust_code: bool = False) -> None:
        self.directory = Path(directory)
        self.shards = Shards(directory)
        cls, config = model_class(directory)
        self.model, self._buffers = _skeleton(cls, config)
        if (self.directory / PLAN).is_file():
            apply_record(self.model, read_plan(self.directory, PLAN)["record"], trust_code)
            if (self.directory / BUFFERS).is_file():
                self._buffers |= load_file(self.directory / BUFFERS)
        self._names = _stored_names(self.model, self.shards, self._buffers)

    def read(self, name: str) -> Tensor:
        """The value of one of the model's tensors, in the model's dtype."""
        return _read(self.model, self.shards, self._buffers, self._names, name)

    def write(self, speedup: ModelSpeedup, out: PathLike) -> None:
        """Write the compact model as ``save_pretrained`` would, shard by shard.

        Args:
            speedup: of :attr:`model`, after ``speedup_model()``.
            out: a directory that is empty or not there yet. It appears whole, or not at all.

        Raises:
            SaveError: the files cannot be written, or ``out`` holds some already.
        """
        target = Path(out)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise SaveError(f"'{target}' exists and is not empty. Choose another directory.")
        try:
            with appearing(target) as partial:
                self._write_shards(speedup, partial)
                self._write_config(speedup, partial)
                for file in self.directory.iterdir():  # the tokenizer and what else there is
                    skipped = file.name == PLAN or file.name.endswith(_WEIGHTS) or (partial / file.name).exists()
                    if file.is_file() and not skipped:
                        shutil.copyfile(file, partial / file.name)
        except (OSError, SafetensorError) as error:
            if isinstance(error, SaveError):
                raise
            raise SaveError(
                f"the model could not be saved to '{target}': {error}. Free space, or choose another directory."
            ) from error

    def _write_shards(self, speedup: ModelSpeedup, target: Path) -> None:
        plan, masks = speedup.plan, speedup.inference.masks
        first = {stored: name for name, stored in self._names.items()}
        biases = {name.rpartition(".")[0]: name for name in plan.new_bias}
        kept = {name for names in _all_names(self.model).values() for name in names}
        index: dict[str, str] = {}
        size = 0
        for file, names in self.shards.files.items():
            shard: dict[str, Tensor] = {}
            for stored in names:
                bias = biases.pop(stored.rpartition(".")[0], None)
                if bias is not None:
                    shard[bias] = plan.new_bias[bias].to(self.shards[stored].dtype)
                if stored in kept:  # and not of a layer that left
                    name = first.get(stored, stored)
                    shard[stored] = compact_tensor(plan, name, self.shards[stored], masks).contiguous()
            size += sum(t.numel() * t.element_size() for t in shard.values())
            index |= dict.fromkeys(shard, file)
            log.info("writing %s", file)
            save_file(shard, target / file, metadata={"format": "pt"})
        if len(self.shards.files) > 1:
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2, sort_keys=True)
            (target / INDEX).write_text(text + "\n", encoding="utf-8")

    def _write_config(self, speedup: ModelSpeedup, target: Path) -> None:
        """A config that says the new sizes where there is one, else the plan."""
        model = self.model
        record = read_record(model)
        if record is None:
            model.config.save_pretrained(target)
            return
        plan, masks = speedup.plan, speedup.inference.masks
        buffers = {name: compact_tensor(plan, name, t, masks) for name, t in self._buffers.items()}
        shards, inputs = Shards(target), example(model)

        def outputs(candidate: Any, own: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
            names = _stored_names(candidate, shards, own)
            return run_read(candidate, lambda name: _read(candidate, shards, own, names, name), ((), inputs or {}))

        def same(config: Any) -> bool:
            candidate, own = _skeleton(type(model), config)
            if shapes_of(candidate) != shapes_of(model):
                return False
            return all(check.passed for check in compare_outputs(outputs(candidate, own), outputs(model, buffers)))

        config = None if inputs is None else expressing_config(model, record, same)
        if config is None:
            config = flagged(model.config)
            write_plan(model, target, record, buffers)
        config.save_pretrained(target)


def _skeleton(cls: type[Any], config: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model on the meta device, and the values of the tensors that no checkpoint holds."""
    with _parameters_on_meta(), generators_kept(), _default_dtype(config.dtype):
        model = cls(config).eval()
    model.tie_weights()
    buffers = {name: t.clone() for name, t in hidden_buffers(model).items()}
    return model.to("meta"), buffers


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made inside keep no parameter's memory; buffers get their values."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = registered  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _all_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter and buffer, by identity; the first is the one that plans use."""
    found: dict[int, list[str]] = {}
    for name, tensor in named_tensors(modules_by_path(model, aliases=True)):
        found.setdefault(id(tensor), []).append(name)
    return found


def _stored_names(model: nn.Module, shards: Shards, buffers: Mapping[str, Tensor]) -> dict[str, str]:
    """The name in the files for the first name of each tensor.

    Raises:
        LoadError: the files have other names, which ``from_pretrained`` would translate.
    """
    names: dict[str, str] = {}
    known: set[str] = set()
    for aliases in _all_names(model).values():
        known.update(aliases)
        stored = [name for name in aliases if name in shards]
        if stored:
            names[aliases[0]] = stored[0]
        elif aliases[0] not in buffers:
            raise LoadError(f"the files in '{shards.directory}' lack '{aliases[0]}'. {_TRANSLATE}")
    extra = [name for name in shards if name not in known]
    if extra:
        raise LoadError(f"the files in '{shards.directory}' hold '{extra[0]}', which the model lacks. {_TRANSLATE}")
    return names


_TRANSLATE = (
    "If from_pretrained loads it all the same, it translates the names: load it with that, and compact it in memory."
)


def _read(
    model: nn.Module, shards: Shards, buffers: Mapping[str, Tensor], names: Mapping[str, str], name: str
) -> Tensor:
    if name in buffers:
        return buffers[name]
    module, _, key = name.rpartition(".")
    wanted: Tensor = getattr(model.get_submodule(module), key)
    return shards[names[name]].to(wanted.dtype)
