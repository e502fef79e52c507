"""Hugging Face: compact models through ``save_pretrained`` and ``from_pretrained``.

Where the config can express the result (one width in all layers), the directory is an ordinary one that loads
without maskprop. Where it cannot, the plan is stored beside the weights, and after ``import maskprop.hf``
every ``Auto*``
class loads it: transformers lets a registered quantiser change the modules on the meta device before the
weights are read, and that is where the plan is applied. The loaded model is not flagged as quantised.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import json
import logging
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskprop._directory import appearing
from maskprop._extras import require
from maskprop._torchvision import import_torchvision
from maskprop.align.plan import Plan
from maskprop.errors import LoadError, MissingExtraError, SaveError
from maskprop.graph.paths import lineage
from maskprop.rewrite.constant import Constant
from maskprop.rewrite.steps import apply_record, obstacles, read_record, sub_record
from maskprop.rewrite.verify import compare_outputs, run_model
from maskprop.storage import PathLike, to_text

with contextlib.suppress(MissingExtraError):
    import_torchvision()  # before transformers, which imports it on its own
transformers = require("transformers", "hf", "maskprop.hf")
from transformers.quantizers.auto import register_quantization_config, register_quantizer  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.utils.hub import cached_file  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

log = logging.getLogger(__name__)

METHOD = "maskprop"
PLAN = "maskprop.json"
BUFFERS = "maskprop.safetensors"
_STALE = ("model*.safetensors", "model.safetensors.index.json", PLAN, BUFFERS)
_trust: contextvars.ContextVar[bool] = contextvars.ContextVar("trust_code", default=False)


def save_pretrained(model: Any, directory: PathLike, **options: Any) -> None:
    """``model.save_pretrained(directory)`` for a compact model.

    Args:
        model: a ``PreTrainedModel`` that was sped up (one that was not is saved as ever); left as it is.
        directory: what ``from_pretrained`` takes. A new one appears whole or not at all; in one that is there, files
            are replaced when all of them are written. With one width in all layers the config says it; otherwise
            a file ``maskprop.json`` is written too, and loading needs ``import maskprop.hf``.
        options: for the model's own ``save_pretrained``, such as ``max_shard_size``.

    Raises:
        SaveError: something in the model cannot be written down, or the files cannot be written.
    """
    record = read_record(model)
    target = Path(directory)
    config = model.config
    try:
        if record is None:
            model.save_pretrained(directory, **options)
            return
        for path, obstacle in obstacles(record):
            raise SaveError(f"'{path}' cannot be saved as data: {obstacle}. Save the model with torch.save.")
        inputs = example(model)
        expressed = expressing_config(model, record, lambda c: inputs is not None and _expresses(model, c, inputs))
        if options.get("push_to_hub"):
            options.setdefault("repo_id", target.name)
        with appearing(target, _STALE, "config.json") as partial:
            if expressed is None:
                expressed = flagged(config)
                write_plan(model, partial, record, hidden_buffers(model))
            model.config = expressed
            model.save_pretrained(partial, **options)
    except (OSError, SafetensorError) as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(
            f"the model could not be saved to '{target}': {error}. What was there before is unchanged. Free space, or "
            "choose another directory."
        ) from error
    finally:
        model.config = config


def load_pretrained(directory: PathLike, *, trust_code: bool = False, **options: Any) -> nn.Module:
    """Load a directory with the class that its config names, compact or not.

    Args:
        directory: written by ``save_pretrained``, this module's or a model's own.
        trust_code: see :func:`maskprop.load`.
        options: for ``from_pretrained``.

    Raises:
        LoadError: the config names no class of transformers, or the plan is damaged.
    """
    cls, _ = model_class(directory)
    token = _trust.set(trust_code)
    try:
        model: nn.Module = cls.from_pretrained(directory, **options)
    finally:
        _trust.reset(token)
    return model


def model_class(directory: PathLike) -> tuple[type[Any], Any]:
    """The class that a directory's config names, and the config, without a word of its being compact.

    Raises:
        LoadError: the config names no class of transformers.
    """
    config = transformers.AutoConfig.from_pretrained(directory)
    name = (config.architectures or ["no class"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise LoadError(
            f"config.json in '{directory}' names {name}, which transformers does not have. Load it with its own class."
        )
    if getattr(config, "quantization_config", {}).get("quant_method") == METHOD:
        del config.quantization_config
    return cls, config


# -- loading, as transformers asks for it -------------------------------------------------------


@register_quantization_config(METHOD)
class PlanConfig(QuantizationConfigMixin):
    """The entry in ``config.json`` that says that there is a plan."""

    def __init__(self, plan_file: str = PLAN, quant_method: str = METHOD, **options: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # theirs are an enumeration
        self.plan_file = plan_file


@register_quantizer(METHOD)
class PlanQuantizer(HfQuantizer):
    """Applies a plan to the model on the meta device. Nothing is quantised."""

    def preprocess_model(self, model: Any, dtype: Any = None, **options: Any) -> None:
        """Make the dense skeleton compact, before the weights are read."""
        self._buffers: dict[str, Tensor] = {}
        data, folder = self._read(model, options.get("checkpoint_files"))
        record, part, prefix = _fit(data, model)
        left_out = {name: buffer.clone() for name, buffer in hidden_buffers(part).items()}  # the plan works in place
        apply_record(part, record, _trust.get())
        for path in [path for path, module in part.named_modules() if isinstance(module, Constant)]:
            for outer in lineage(path):  # which have no weights that transformers could initialise
                part.get_submodule(outer).__dict__["_is_hf_initialized"] = True
        if (folder / BUFFERS).is_file():
            saved = load_file(folder / BUFFERS)
            root = data["prefix"] + "." if prefix else ""
            self._buffers = {name.removeprefix(root): t for name, t in saved.items() if name.startswith(root)}
            for name in self._buffers:  # transformers fills these by itself, at their dense size
                owner, _, key = name.rpartition(".")
                part.get_submodule(owner)._buffers[key] = left_out[name]
        self._part = part

    def postprocess_model(self, model: Any, **options: Any) -> None:
        """Take every trace of quantisation away, and put the compact hidden buffers in."""
        for name, value in self._buffers.items():
            owner, _, key = name.rpartition(".")
            module = self._part.get_submodule(owner)
            old = module._buffers[key]
            assert old is not None
            module._buffers[key] = value.to(old.device)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for module in model.modules():
            module.__dict__.pop("is_quantized", None)
        self._buffers, self._part = {}, nn.Module()

    def _read(self, model: Any, files: list[str] | None) -> tuple[dict[str, Any], Path]:
        """The plan beside the weights, or from where the model came."""
        name = str(getattr(self.quantization_config, "plan_file", PLAN))
        folder = Path(files[0]).parent if files else Path(str(model.config.name_or_path))
        if not (folder / name).is_file():
            found = cached_file(str(model.config.name_or_path), name, _raise_exceptions_for_missing_entries=False)
            if found is None:
                raise LoadError(
                    f"'{folder}' holds no {name}, which its config.json asks for. Restore the file from "
                    f"where the model came."
                )
            folder = Path(found).parent
        return read_plan(folder, name), folder

    def is_serializable(self) -> bool:
        """The compact model saves as ever."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The compact model trains as ever."""
        return True


def read_plan(folder: Path, name: str) -> dict[str, Any]:
    """What :func:`write_plan` wrote.

    Raises:
        LoadError: the file is damaged.
    """
    try:
        data: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        if not {"prefix", "record"} <= data.keys():
            raise ValueError("it has no 'prefix' or 'record'")
    except (OSError, ValueError, AttributeError) as error:
        raise LoadError(
            f"{name} in '{folder}' is damaged ({error}). Restore the file from where the model came."
        ) from error
    return data


def _fit(data: dict[str, Any], model: nn.Module) -> tuple[dict[str, Any], nn.Module, str]:
    """The record for this class, the module that it belongs to, and the prefix that was cut off.

    A directory of a causal language model also serves its base model, and other heads on that base.
    """
    record = data["record"]
    if record["dense"]["modules"][""][0] == type(model).__name__:
        return record, model, ""
    prefix = data["prefix"]
    if prefix and prefix in record["dense"]["modules"]:
        record = sub_record(record, prefix)
    else:
        prefix = ""
    own = str(getattr(model, "base_model_prefix", ""))
    part = getattr(model, own, model) if own else model
    return record, part, prefix


def hidden_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a checkpoint does not hold."""
    found = {}
    for path, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            value = module._buffers.get(key)
            if value is not None:
                found[f"{path}.{key}" if path else key] = value
    return found


# -- saving -------------------------------------------------------------------------------------


def flagged(config: Any) -> Any:
    """A copy of a config that tells ``from_pretrained`` to apply the plan."""
    config = copy.deepcopy(config)
    config.quantization_config = {"quant_method": METHOD, "plan_file": PLAN}
    return config


def write_plan(model: nn.Module, target: Path, record: dict[str, Any], buffers: Mapping[str, Tensor]) -> None:
    """Write the record, and those of the buffers, which no checkpoint holds, that shrank, into a new directory."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    text = to_text({"prefix": prefix if hasattr(model, prefix) else "", "record": record})
    (target / PLAN).write_text(text, encoding="utf-8")
    sliced = {name for step in record["steps"] for name in step["plan"]["keep"]}
    held = {name: t.detach().contiguous().clone() for name, t in buffers.items() if name in sliced}
    if held:
        save_file(held, target / BUFFERS)


# -- a config that says it ----------------------------------------------------------------------


def expressing_config(model: nn.Module, record: dict[str, Any], same: Callable[[Any], bool]) -> Any:
    """A config whose dense model is the compact one, as ``same`` finds; ``None`` if there is none."""
    if any("class" in change for step in record["steps"] for change in step["modules"].values()):
        return None
    sizes = _sizes(record)
    if sizes is None:
        return None
    choices = [(field, new) for field, value in _fields(model.config) for new in _new_values(value, sizes)]
    for count in range(1, min(len(choices), 4) + 1):
        for changes in combinations(choices, count):
            if len({field for field, _ in changes}) < count:
                continue
            config: Any = copy.deepcopy(model.config)
            for field, new in changes:
                setattr(config, field, new)
            try:
                if same(type(config).from_dict(config.to_dict())):  # as it is loaded, with its own checks
                    return config
            except Exception as error:  # a config that its own model does not take
                log.debug("no such config: %s: %s", type(error).__name__, error)
    return None


def _sizes(record: dict[str, Any]) -> dict[int, int] | None:
    """New size by old size; ``None`` where one size became several, or a module got a bias."""
    found: dict[int, int] = {}
    for step in record["steps"]:
        plan = Plan.from_dict(step["plan"])
        if plan.new_bias:
            return None
        for name, keeps in plan.keep.items():
            for keep in keeps:
                old = plan.shapes[name][keep.axis]
                if found.setdefault(old, keep.count) != keep.count:
                    return None
    return found


def _fields(config: Any) -> list[tuple[str, int]]:
    """Whole-number fields of a config that may name a size."""
    skip = {
        "vocab_size",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "num_hidden_layers",
        "max_position_embeddings",
    }
    return [
        (k, v) for k, v in vars(config).items() if type(v) is int and v > 1 and k not in skip and not k.startswith("_")
    ]


def _new_values(value: int, sizes: dict[int, int]) -> list[int]:
    """What a field may become: the new size, or as many parts (heads) of the old one as are left."""
    found = []
    for old, new in sizes.items():
        if value == old:
            found.append(new)
        elif old % value == 0 and new % (old // value) == 0:
            found.append(new // (old // value))
    return list(dict.fromkeys(v for v in found if v != value and v > 0))


def _expresses(model: nn.Module, config: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether the config's own model has the shapes of this one, and with its weights the same outputs."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        candidate = type(model)(config)
    if shapes_of(candidate) != shapes_of(model):
        return False
    with torch.random.fork_rng(devices=[]):  # for real: buffers that no checkpoint holds must come out right
        candidate = type(model)(config).eval()
    candidate.load_state_dict(model.state_dict(), assign=True)
    candidate.to(next(model.parameters()).device)
    checks = compare_outputs(run_model(candidate, ((), inputs)), run_model(model, ((), inputs)))
    return all(check.passed for check in checks)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of what a checkpoint holds."""
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def example(model: nn.Module) -> dict[str, Tensor] | None:
    """Inputs that the model takes, or ``None`` if none can be guessed."""
    from maskprop.commands.sources import hugging_face_inputs
    from maskprop.errors import OptionError

    first = next(model.parameters())
    try:
        made = hugging_face_inputs(model, model.config, 2, torch.Generator().manual_seed(0))
    except OptionError:
        return None
    device = "cpu" if first.is_meta else first.device
    return {k: v.to(device, first.dtype if v.is_floating_point() else v.dtype) for k, v in made.items()}
