"""torchvision: every classification model, the segmentation models, FPN backbones, and video models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from maskprop._torchvision import import_torchvision

from .specimen import Specimen, Zoo, images

import_torchvision()

from torchvision import models  # noqa: E402
from torchvision.models.detection import backbone_utils  # noqa: E402
from torchvision.models.regnet import BlockParams, RegNet  # noqa: E402
from torchvision.models.vision_transformer import VisionTransformer  # noqa: E402

TORCHVISION = Zoo()

#: Image sizes by name prefix, where 64 is too small or leaves nothing to see.
_SIZES = {"maxvit": 224, "inception_v3": 96, "vit_h_14": 56, "alexnet": 96, "squeezenet": 96}
#: Arguments by name prefix.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "vit_": {"image_size": 64},
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}


def _shallow_vit_h_14() -> nn.Module:
    """ViT-H/14 with a quarter of its depth; all of it would take 2.5 GB."""
    return VisionTransformer(56, 14, num_layers=8, num_heads=16, hidden_dim=1280, mlp_dim=5120)


def _narrow_regnet_y_128gf() -> nn.Module:
    """RegNetY-128GF with its group width and a third of its width; all of it would take 2.6 GB."""
    return RegNet(BlockParams.from_init_params(27, 160, 53.61, 2.52, 264, se_ratio=0.25))


_REDUCED: dict[str, Callable[[], nn.Module]] = {
    "vit_h_14": _shallow_vit_h_14,
    "regnet_y_128gf": _narrow_regnet_y_128gf,
}


def _by_prefix(table: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for prefix, value in table.items() if name.startswith(prefix)), default)


for _name in models.list_models(models):
    _build = _REDUCED.get(_name) or partial(models.get_model, _name, **_by_prefix(_ARGUMENTS, _name, {}))
    _size = _by_prefix(_SIZES, _name, 64)
    TORCHVISION.add(Specimen(_name, _build, images(3, _size, _size)))

for _name in models.list_models(models.segmentation):
    _build = partial(models.get_model, _name, weights_backbone=None, aux_loss="lraspp" not in _name or None)
    if "lraspp" in _name:
        _build = partial(models.get_model, _name, weights_backbone=None)
    TORCHVISION.add(Specimen(_name, _build, images(3, 64, 64)))

for _name in ("resnet18", "resnet50"):
    _build = partial(backbone_utils.resnet_fpn_backbone, backbone_name=_name, weights=None)
    TORCHVISION.add(Specimen(f"{_name}_fpn", _build, images(3, 96, 96)))
for _name in ("mobilenet_v2", "mobilenet_v3_large"):
    _build = partial(backbone_utils.mobilenet_backbone, _name, fpn=True, weights=None)
    TORCHVISION.add(Specimen(f"{_name}_fpn", _build, images(3, 96, 96)))

for _name in ("r3d_18", "mc3_18", "r2plus1d_18", "swin3d_t"):
    TORCHVISION.add(Specimen(_name, partial(models.get_model, _name), images(3, 16, 64, 64)))
for _name in ("s3d", "mvit_v1_b", "mvit_v2_s"):  # these fix the size of the video
    _build = partial(models.get_model, _name)
    TORCHVISION.add(Specimen(_name, _build, images(3, 16, 224, 224), batch=1, fresh=(1, 2)))
