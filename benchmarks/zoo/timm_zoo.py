"""timm: the smallest model of every model file, and feature extractors.

The table was found by building every model of ``timm`` 1.0 on the meta device and taking, for each file, the
one with the fewest parameters; images are 96 pixels wide where the model can take that.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from maskprop._torchvision import import_torchvision

from .specimen import Specimen, Zoo, images

import_torchvision()

import timm  # noqa: E402

TIMM = Zoo()

_SIZE = 96
_SIZES = {"halonet_h1": 256, "deepseek_vit_412m": 224, "efficientformer_l1": 224}
#: Models that would be slow at full depth.
_ARGUMENTS: dict[str, dict[str, Any]] = {"deepseek_vit_412m": {"depth": 3}}

#: File of ``timm.models`` -> its smallest model; images of any size.
_ANY_SIZE = {
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "metaformer": "poolformerv2_s12",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "nasnet": "nasnetalarge",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "tiny_vit": "tiny_vit_5m_224",
    "tresnet": "tresnet_m",
    "vgg": "vgg11",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
}
#: The same, where the model is built for one image size.
_ONE_SIZE = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "hiera": "hiera_tiny_224",
    "levit": "levit_128s",
    "levit_conv": "levit_conv_128s",
    "maxxvit": "test_coatnet",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nest": "nest_tiny",
    "pit": "pit_ti_224",
    "qwen3_vit": "qwen3_vit_88m",
    "repvit": "repvit_m1",
    "sequencer": "sequencer2d_s",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "twins": "twins_svt_small",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "xcit": "xcit_nano_12_p8_224",
}
_FEATURES = (
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "hrnet_w18_small",
    "swin_tiny_patch4_window7_224",
)


def _add(name: str, label: str, **arguments: Any) -> None:
    size = _SIZES.get(name, _SIZE)
    if name in _ONE_SIZE.values():
        arguments["img_size"] = size
    build = partial(timm.create_model, name, pretrained=False, **arguments)
    TIMM.add(Specimen(label, build, images(3, size, size)))


for _name in (*_ANY_SIZE.values(), *_ONE_SIZE.values()):
    _add(_name, _name, **_ARGUMENTS.get(_name, {}))
for _name in _FEATURES:
    _add(_name, f"{_name}-features", features_only=True)
