"""Import torchvision also where its compiled operators do not load.

A torchvision wheel built for CUDA does not load its operators on a CPU build of torch, and the import then
fails on `torchvision::nms`, which only detection models call. Declaring the operators' schemas is enough
for everything else.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from maskprop._extras import require

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # the schemas live as long as their Library does


def import_torchvision() -> ModuleType:
    """Import torchvision, with its missing operators declared where need be.

    timm and transformers import torchvision on their own: call this before them.

    Returns:
        The module `torchvision`.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    try:
        return require("torchvision", "vision", "import_torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    if not _declared:
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
    return importlib.import_module("torchvision")
