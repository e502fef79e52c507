"""Save a compact model and load it again: no pickle, no tracing, no dummy input.

A directory holds ``plan.json`` (readable: the fingerprint of the dense architecture, and what every speedup
kept and changed) and ``model.safetensors`` (all parameters and buffers of the compact model). Loading builds
the dense architecture on the meta device, applies the plan and puts the weights in, bit for bit.

A save is atomic. The files are written under other names, and three renames put them in place: the plan as
``plan.json.next``, the weights, the plan as ``plan.json``. Each plan names its weights by their hash, so that
whenever the process dies one of the two plans belongs to the weights that are there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskprop import __version__
from maskprop.errors import ArchitectureError, LoadError, SaveError
from maskprop.graph.randomness import generators_kept
from maskprop.modules import modules_by_path, named_tensors
from maskprop.rewrite.steps import apply_record, obstacles, read_record

log = logging.getLogger(__name__)

PLAN = "plan.json"
NEXT = "plan.json.next"
WEIGHTS = "model.safetensors"
FORMAT = 1

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Saved:
    """What ``plan.json`` says.

    Attributes:
        directory: where the model is.
        versions: of maskprop and torch, when it was saved.
        source: how the dense architecture was named on the command line, if it was.
        records: what speedups left on the model's modules, by path (``""`` is the model itself).
        strides: of tensors that are laid out otherwise than row by row (channels-last, say).
    """

    directory: Path
    versions: dict[str, str]
    source: str | None
    records: dict[str, dict[str, Any]]
    strides: dict[str, list[int]]


def save(model: nn.Module, directory: PathLike, *, source: str | None = None) -> None:
    """Write a model, usually a compact one, into a directory.

    Args:
        model: left as it is. Speedups leave on it what has to be known; it may have been sped up several
            times, and parts of it apart.
        directory: created if it is missing. Other files in it stay.
        source: a name for the dense architecture, kept for the command line.

    Raises:
        SaveError: the files cannot be written, or something in the model cannot be written down. What the
            directory held before is as it was.
    """
    target = Path(directory)
    records = {path: record for path, m in model.named_modules() if (record := read_record(m)) is not None}
    for root, record in records.items():
        for path, obstacle in obstacles(record):
            raise SaveError(
                f"'{'.'.join(p for p in (root, path) if p)}' cannot be saved as data: {obstacle}. Save the "
                f"model with torch.save, "
                "or build the replaced modules in the factory and save the state_dict."
            )
    state, strides = _state_to_save(model)
    plan = {
        "format": FORMAT,
        "versions": {"maskprop": __version__, "torch": torch.__version__},
        "source": source,
        "strides": strides,
        "parts": records,
    }
    try:
        _write(target, plan, state)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"the model could not be saved to '{target}': {error}. What was there before is unchanged. Free "
            f"space, or choose another directory."
        ) from error


def load(
    directory: PathLike,
    factory: Callable[[], nn.Module],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_code: bool = False,
) -> nn.Module:
    """Build the model that :func:`save` wrote.

    Args:
        directory: what was given to :func:`save`.
        factory: makes the *dense* architecture, with any weights. It runs on the meta device, so that nothing
            is allocated twice; where it cannot run there, it runs as it is.
        device: where the tensors go.
        dtype: of floating tensors; by default the one that they were saved in.
        trust_code: a plan may hold forwards that maskprop generated. Those that call anything but torch's own
            functions are refused, unless this is set.

    Returns:
        The compact model, in the train or eval mode that ``factory`` gives it.

    Raises:
        LoadError: files are missing, damaged, half-written, of another version, or not to be trusted.
        ArchitectureError: ``factory`` makes another model than the one that was sped up.
    """
    saved = read_plan(directory)
    state = _read_weights(saved.directory, device)
    model = _build(factory)
    apply_records(model, saved.records, trust_code)
    _fill(model, state, saved, dtype)
    return model


def read_plan(directory: PathLike) -> Saved:
    """Read and check ``plan.json``, without the weights.

    Raises:
        LoadError: see :func:`load`.
    """
    target = Path(directory)
    if not (target / PLAN).is_file() and not (target / NEXT).is_file():
        raise LoadError(f"'{target}' holds no {PLAN}. Give the directory that maskprop.save wrote.")
    if not (target / WEIGHTS).is_file():
        raise LoadError(
            f"'{target}' holds no {WEIGHTS}. Restore the file from where the directory came, or save the model again."
        )
    digest = _digest(target / WEIGHTS)
    complaint = ""
    for name in (PLAN, NEXT):  # the second is there only if a save was interrupted between its renames
        if (target / name).is_file():
            try:
                return _parse(target, (target / name).read_text(encoding="utf-8"), digest)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                complaint = complaint or (
                    str(error)
                    if isinstance(error, LoadError)
                    else f"{name} in '{target}' is damaged ({type(error).__name__}: {error})"
                )
    raise LoadError(
        complaint
        if complaint.endswith(".")
        else f"{complaint}. Restore the file from where the directory came, or save the model again."
    )


def apply_records(model: nn.Module, records: dict[str, dict[str, Any]], trust_code: bool = False) -> None:
    """Apply the records of a model and its parts, each as soon as its part is what it was made for."""
    waiting = dict(records)
    while waiting:
        first: ArchitectureError | None = None
        for path, record in waiting.items():
            try:
                part = model.get_submodule(path)
                apply_record(part, record, trust_code)
            except ArchitectureError as error:
                first = first or error
            except AttributeError as error:
                raise ArchitectureError(
                    f"the plan was made for a model with a module '{path}'; this model has none. Build the "
                    f"dense architecture that was sped up."
                ) from error
            else:
                del waiting[path]
                break
        else:
            assert first is not None
            raise first


# -- writing ------------------------------------------------------------------------------------


def _state_to_save(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """All tensors of the model under their first names, row by row, and the strides of those that were not."""
    state: dict[str, Tensor] = {}
    strides: dict[str, list[int]] = {}
    storages: set[int] = set()
    first: dict[int, tuple[str, Tensor]] = {}
    for named in _names(model).items():
        first.setdefault(id(named[1]), named)
    for name, tensor in first.values():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise SaveError(
                f"'{name}' is on the meta device, sparse or quantized; only dense tensors with values can "
                f"be saved. Materialise or convert it first."
            )
        if tensor.stride() != torch.empty(tensor.shape, device="meta").stride() and _is_dense(tensor):
            strides[name] = list(tensor.stride())
        data = tensor.detach().contiguous()
        shared = (
            data.untyped_storage().data_ptr() in storages
            or data.untyped_storage().nbytes() != data.numel() * data.element_size()
        )
        state[name] = data.clone() if shared else data
        storages.add(state[name].untyped_storage().data_ptr())
    return state, strides


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _write(target: Path, plan: dict[str, Any], state: dict[str, Tensor]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in (PLAN, WEIGHTS):  # what a killed process left
        for stale in target.glob(f".{name}.*.tmp"):
            stale.unlink()
    weights, text = target / f".{WEIGHTS}.{os.getpid()}.tmp", target / f".{PLAN}.{os.getpid()}.tmp"
    try:
        save_file(state, weights, metadata={"format": "pt"})
        _sync(weights)
        plan["weights"] = _digest(weights)
        text.write_text(to_text(plan), encoding="utf-8")
        _sync(text)
        os.chmod(weights, text.stat().st_mode)  # safetensors makes it readable by its owner alone
        os.replace(text, target / NEXT)
        os.replace(weights, target / WEIGHTS)
        os.replace(target / NEXT, target / PLAN)
        _sync(target)
    finally:
        for leftover in (weights, text):
            leftover.unlink(missing_ok=True)


def to_text(value: Any, depth: int = 0) -> str:
    """JSON with a line for every entry of the outer dicts, and lists on one line: for people who read it."""
    pad = " " * (depth + 1)
    if isinstance(value, dict) and value and any(isinstance(v, (dict, list)) for v in value.values()):
        entries = [f"{pad}{json.dumps(k)}: {to_text(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(entries) + "\n" + " " * depth + "}"
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return "[\n" + ",\n".join(pad + to_text(v, depth + 1) for v in value) + "\n" + " " * depth + "]"
    return json.dumps(value)


def _sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return (
                hashlib.file_digest(file, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else _digest_by_parts(file)
            )
    except OSError as error:
        raise LoadError(f"'{path}' cannot be read ({error.strerror}). Check its permissions.") from error


def _digest_by_parts(file: Any) -> str:
    """For Python 3.10, whose hashlib reads no files."""
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()


# -- reading ------------------------------------------------------------------------------------


def _parse(target: Path, text: str, digest: str) -> Saved:
    data = json.loads(text)
    if data["format"] != FORMAT:
        made = data.get("versions", {}).get("maskprop", "another version")
        raise LoadError(
            f"{PLAN} in '{target}' has format {data['format']!r}, written by maskprop {made}; maskprop "
            f"{__version__} reads format {FORMAT}. Load it with that version and save it again."
        )
    if data["weights"] != digest:
        raise LoadError(
            f"{WEIGHTS} in '{target}' is not the file that {PLAN} was written with: it is damaged, "
            f"half-written, or from another save. "
            "Restore both files from where they came, or save the model again."
        )
    return Saved(target, dict(data["versions"]), data["source"], dict(data["parts"]), dict(data["strides"]))


def _read_weights(target: Path, device: str | torch.device) -> dict[str, Tensor]:
    on_meta = torch.device(device).type == "meta"
    try:
        state = load_file(target / WEIGHTS, device="cpu" if on_meta else str(device))
        return {name: t.to("meta") for name, t in state.items()} if on_meta else state
    except (SafetensorError, OSError) as error:
        raise LoadError(
            f"{WEIGHTS} in '{target}' cannot be read: {error}. Restore the file from where it came."
        ) from error


def _build(factory: Callable[[], nn.Module]) -> nn.Module:
    """The dense architecture, on the meta device where it can be built there."""
    try:
        with torch.device("meta"), generators_kept():
            model = factory()
        if not any(_hidden_meta(m) for m in model.modules()):
            return model
        log.info("the factory keeps tensors in containers, which a plan does not hold; building it for real")
    except Exception as error:  # any failure on meta only means that it has to be built for real
        log.info("the factory does not run on the meta device (%s: %s)", type(error).__name__, error)
    with generators_kept():
        return factory()


def _hidden_meta(module: nn.Module) -> bool:
    """Whether a module holds meta tensors inside lists or dicts, which no file can fill."""
    for key, value in vars(module).items():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        if key not in ("_parameters", "_buffers", "_modules") and any(
            isinstance(v, Tensor) and v.is_meta and not isinstance(v, nn.Parameter) for v in items
        ):
            return True
    return False


def _fill(model: nn.Module, state: dict[str, Tensor], saved: Saved, dtype: torch.dtype | None) -> None:
    """Put the saved values into the model's tensors, which keep their identity."""
    names = _names(model)
    unknown = [n for n in state if n not in names]
    if unknown:
        raise ArchitectureError(
            f"{WEIGHTS} in '{saved.directory}' holds '{unknown[0]}', which the model lacks. Build the "
            f"architecture that was saved."
        )
    filled: set[int] = set()
    for name, value in state.items():
        tensor = names[name]
        if tensor.shape != value.shape:
            raise ArchitectureError(
                f"'{name}' was saved with shape {tuple(value.shape)}; the model has {tuple(tensor.shape)}. "
                f"Build the architecture that was saved."
            )
        # a copy, so that the memory is aligned (kernels round by it) and no longer that of the file
        made = value.new_empty_strided(value.shape, saved.strides.get(name, value.stride()))
        value = made.copy_(value)
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        filled.add(id(tensor))
        _replace(model, tensor, value)
    missing = [n for n, t in names.items() if id(t) not in filled]
    if missing:
        raise ArchitectureError(
            f"the model has '{missing[0]}', which {WEIGHTS} in '{saved.directory}' lacks. Build the "
            f"architecture that was saved."
        )


def _replace(model: nn.Module, tensor: Tensor, value: Tensor) -> None:
    """Give a tensor other contents, on another device too; whoever holds it holds the new contents."""
    made = nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    notes = dict(vars(tensor))
    try:
        torch.utils.swap_tensors(tensor, made)
        made = tensor
    except RuntimeError:  # recurrent layers keep weak references, and follow an assignment instead
        for module in model.modules():
            for table in (module._parameters, module._buffers, vars(module)):
                for key in [k for k, v in table.items() if v is tensor]:
                    setattr(module, key, made)
    vars(made).update(notes)


def _names(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers (persistent or not) and tensor attributes, by all of their names."""
    return dict(named_tensors(modules_by_path(model, aliases=True), bare=True))
