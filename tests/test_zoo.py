"""Forty models of the public zoos, small and quick ones, under the masking that tells most about each.

``python -m benchmarks.coverage`` runs all of them under all maskings.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.coverage import load_zoo
from benchmarks.zoo.check import check_specimen
from benchmarks.zoo.maskings import make_masks
from benchmarks.zoo.randomise import randomise

SUBSET = {
    "torchvision": {
        "resnet18": "zeros",
        "resnet50": "constants",
        "mobilenet_v2": "constants",
        "mobilenet_v3_small": "conflicts",
        "shufflenet_v2_x0_5": "zeros",
        "squeezenet1_1": "zeros",
        "regnet_y_400mf": "conflicts",
        "mnasnet0_5": "zeros",
        "efficientnet_b0": "constants",
        "googlenet": "conflicts",
        "densenet121": "constants",
        "resnet18_fpn": "zeros",
        "lraspp_mobilenet_v3_large": "zeros",
    },
    "timm": {
        "test_vit": "heads",
        "test_convnext": "mlp",
        "test_efficientnet": "constants",
        "test_resnet-features": "conflicts",
        "test_nfnet": "zeros",
        "test_byobnet": "zeros",
        "mobilevit_xxs": "heads_out",
        "deit_tiny_patch16_224": "mlp_out",
        "pvt_v2_b0": "heads",
        "repvit_m1": "zeros",
        "ghostnet_050": "conflicts",
        "levit_128s": "constants",
    },
    "hf": {
        "bert-sdpa": "heads",
        "albert-eager": "heads_out",
        "distilbert-sdpa": "mlp",
        "deberta_v2-eager": "mlp_out",
        "gpt2-sdpa": "heads",
        "opt-eager": "heads_out",
        "llama-sdpa": "dims_out",
        "qwen3-eager": "heads",
        "gemma2-eager": "mlp",
        "phi3-sdpa": "heads",
        "mixtral-eager": "mlp",
        "t5-eager": "heads",
        "bart-sdpa": "mlp",
        "whisper-eager": "heads_out",
        "wav2vec2-sdpa": "heads",
        "swin-eager": "heads",
        "segformer-eager": "conflicts",
        "clip-sdpa": "heads_out",
    },
}
CASES = [(zoo, name, masking) for zoo, names in SUBSET.items() for name, masking in names.items()]


@pytest.mark.parametrize(("zoo", "name", "masking"), CASES)
def test_equals_the_masked_model_and_is_smaller(zoo: str, name: str, masking: str) -> None:
    specimen = load_zoo(zoo)[name]
    torch.manual_seed(0)
    model = randomise(specimen.build(), specimen.inputs())
    masks = make_masks(model, specimen.inputs(), [masking])[masking]
    result = check_specimen(specimen, model, masks)
    assert result.outcome == "exact", result.detail
    assert result.smaller
    assert result.variation is not None
    assert result.variation > 1e-3  # else the comparison would see nothing
