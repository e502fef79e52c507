"""Models by name on the command line, and inputs for them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from maskprop._extras import require
from maskprop._torchvision import import_torchvision
from maskprop.errors import ModelNameError, OptionError
from maskprop.storage import load, read_plan

_FORMS = (
    "torchvision:resnet50, timm:vit_tiny_patch16_224, hf:DIR, saved:DIR, file.py:factory, package.module:factory; "
    "a directory stands for hf:DIR or saved:DIR"
)


@dataclass(frozen=True)
class Source:
    """A model by name.

    Attributes:
        name: as it was typed.
        kind: what stands before the colon, or ``"code"`` for a factory of the user's.
        build: makes the model; on the meta device too, unless it loads weights.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]


def find_model(name: str, trust_code: bool = False) -> Source:
    """Resolve a name; nothing is built yet, but the code of a factory is imported.

    Args:
        name: see the messages of the error, or ``maskprop inspect --help``.
        trust_code: for ``saved:DIR``, see :func:`maskprop.load`.

    Raises:
        ModelNameError: the name has none of the known forms, or names something that is not there.
    """
    if Path(name).is_dir():
        name = ("hf:" if (Path(name) / "config.json").is_file() else "saved:") + name
    prefix, _, rest = name.partition(":")
    if not rest:
        raise ModelNameError(f"'{name}' names no model. Known forms: {_FORMS}.")
    rest, _, query = rest.partition("?")
    arguments = _arguments(name, query)
    if prefix == "torchvision":
        return Source(name, prefix, _torchvision(name, rest, arguments))
    if prefix == "timm":
        return Source(name, prefix, _timm(name, rest, arguments))
    if prefix == "hf":
        return Source(name, prefix, _hugging_face(name, rest))
    if prefix == "saved":
        return Source(name, prefix, _saved(name, rest, trust_code))
    return Source(name, "code", _factory(name, prefix, rest, arguments))


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a ``state_dict`` file, strictly.

    Raises:
        OptionError: the file is missing, unreadable, or not of this model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
        model.load_state_dict(state)
    except (OSError, RuntimeError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()
        raise OptionError(
            f"--weights {file}: {' '.join(line.strip() for line in reason[:3])}. Give a state_dict of the "
            f"model, as .pt or .safetensors."
        ) from error
    except Exception as error:  # the unpickler refuses what is not tensors
        raise OptionError(
            f"--weights {file}: it holds more than tensors ({type(error).__name__}), and loading it could "
            f"run code. Save a state_dict."
        ) from error


def make_inputs(
    source: Source, model: nn.Module, text: str | None, batch: int, seed: int
) -> dict[str, Any] | tuple[Any, ...]:
    """Random inputs for a model.

    Args:
        source: where the model came from, which may tell the shapes.
        model: the model.
        text: shapes as typed, such as ``3,224,224`` or ``ids=int30522:16``; without the batch. ``None``
            to guess.
        batch: the batch size, put before every shape.
        seed: of the random values.

    Raises:
        OptionError: the text is not understood, or nothing was typed and nothing can be guessed.
    """
    generator = torch.Generator().manual_seed(seed)
    if text is not None:
        parts = [_parse_input(part, batch, generator) for part in text.split(";")]
        keywords = {key: value for key, value in parts if key}
        positional = tuple(value for key, value in parts if not key)
        return (*positional, keywords)
    timm_settings: Any = getattr(model, "default_cfg", None)
    if source.kind == "timm" and timm_settings is not None:
        channels, *size = timm_settings["input_size"]
        asked = _arguments(source.name, source.name.partition("?")[2])
        channels, edge = asked.get("in_chans", channels), asked.get("img_size", tuple(size))
        size = edge if isinstance(edge, tuple) else (edge, edge)
        return (torch.randn(batch, channels, *size, generator=generator), {})
    if source.kind == "torchvision":
        size = getattr(model, "image_size", 224)
        return (torch.randn(batch, 3, size, size, generator=generator), {})
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "main_input_name"):
        return hugging_face_inputs(model, config, batch, generator)
    if source.kind == "saved":
        origin = read_plan(source.name.partition(":")[2]).source
        if origin is not None:
            return make_inputs(Source(origin, origin.partition(":")[0], source.build), model, None, batch, seed)
    raise OptionError(
        f"the inputs of '{source.name}' are not known. Give their shapes without the batch, for example "
        "--input 3,224,224; "
        "several inputs are separated by ';', token ids are written as int1000:16."
    )


def call(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    """Run a model on what :func:`make_inputs` made."""
    if isinstance(inputs, tuple):
        return model(*inputs[:-1], **inputs[-1])
    return model(**inputs)


# -- the forms ----------------------------------------------------------------------------------


def _torchvision(name: str, model: str, arguments: dict[str, Any]) -> Callable[[], nn.Module]:
    models = importlib.import_module(f"{import_torchvision().__name__}.models")
    known = models.list_models()
    if model not in known:
        raise ModelNameError(f"'{name}': torchvision has no model '{model}'{_near(model, known)}.")
    return lambda: models.get_model(model, **{"weights": None, **arguments})


def _timm(name: str, model: str, arguments: dict[str, Any]) -> Callable[[], nn.Module]:
    import_torchvision()  # before timm, which imports it on its own
    timm = require("timm", "vision", f"the model name '{name}'")
    known = timm.list_models()
    if model not in known:
        raise ModelNameError(f"'{name}': timm has no model '{model}'{_near(model, known)}.")
    return lambda: timm.create_model(model, **arguments)


def _hugging_face(name: str, directory: str) -> Callable[[], nn.Module]:
    if not (Path(directory) / "config.json").is_file():
        raise ModelNameError(
            f"'{name}': '{directory}' holds no config.json. Give a directory that save_pretrained wrote."
        )
    hf = importlib.import_module("maskprop.hf")
    return lambda: hf.load_pretrained(directory)


def _saved(name: str, directory: str, trust_code: bool) -> Callable[[], nn.Module]:
    origin = read_plan(directory).source
    if origin is None or origin.partition(":")[0] not in ("torchvision", "timm"):
        raise ModelNameError(
            f"'{name}': the plan does not name an architecture that can be built without running code of "
            "yours. "
            "Use a factory that calls maskprop.load(DIR, ...), as file.py:factory."
        )
    factory = find_model(origin)
    return lambda: load(directory, factory.build, trust_code=trust_code)


def _factory(name: str, module: str, attribute: str, arguments: dict[str, Any]) -> Callable[[], nn.Module]:
    """A function or class of the user's. This runs the user's code."""
    try:
        loaded = _import_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise ModelNameError(f"'{name}': '{module}' cannot be imported ({error}). Known forms: {_FORMS}.") from error
    factory: Any = loaded
    for part in attribute.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise ModelNameError(f"'{name}': '{module}' has no function or class '{attribute}'.")

    def build() -> nn.Module:
        model = factory(**arguments)
        if not isinstance(model, nn.Module):
            raise ModelNameError(f"'{name}' made a {type(model).__name__}, not a torch.nn.Module.")
        return model

    return build


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that its classes pickle
    spec.loader.exec_module(module)
    return module


# -- small things -------------------------------------------------------------------------------


def _arguments(name: str, query: str) -> dict[str, Any]:
    """``?num_classes=10&image_size=64`` as keyword arguments."""
    if query and not all("=" in part for part in query.split("&")):
        raise ModelNameError(f"'{name}': '{query}' is no list of arguments. Write them as ?num_classes=10&width=64.")
    found = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _near(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=3)
    return f"; similar are {', '.join(close)}" if close else ""


def _parse_input(text: str, batch: int, generator: torch.Generator) -> tuple[str, Tensor]:
    """``name=3,224,224`` is noise, ``name=int100:16`` whole numbers below 100."""
    key, _, shape = text.rpartition("=")
    kind, _, sizes = shape.rpartition(":")
    try:
        size = [batch, *(int(n) for n in sizes.split(",") if n)]
        if kind.startswith("int"):
            return key.strip(), torch.randint(0, int(kind[3:]), size, generator=generator)
        if kind:
            raise ValueError(kind)
        return key.strip(), torch.randn(size, generator=generator)
    except ValueError as error:
        raise OptionError(
            f"--input '{text}' is not understood. Write sizes without the batch, as 3,224,224; token ids as "
            f"int1000:16; a keyword as mask=16."
        ) from error


def hugging_face_inputs(model: nn.Module, config: Any, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random inputs of a transformers model, by its main input.

    Raises:
        OptionError: its main input is of a kind that cannot be guessed.
    """
    name = str(model.main_input_name)
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (batch, getattr(config, "num_channels", 3), height, width)
        return {name: torch.randn(shape, generator=generator)}
    if name == "input_ids":
        vocabulary = int(getattr(config, "vocab_size", 100))
        return {name: torch.randint(0, vocabulary, (batch, 16), generator=generator)}
    raise OptionError(
        f"the model reads '{name}', for which no input can be guessed. Give its shape without the batch, as "
        f"--input {name}=..."
    )
