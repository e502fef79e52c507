"""Transformers called otherwise than with the dummy input: caches, padding, embeddings, another attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.coverage import load_zoo
from benchmarks.zoo.check import masked_reference, relative_error
from benchmarks.zoo.maskings import make_masks
from benchmarks.zoo.randomise import randomise
from maskprop import ModelSpeedup

IDS = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(1))
LEFT = (torch.arange(8) >= torch.tensor([[3], [1], [0]])).long()
STEPS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def generated(model: Any) -> Any:
    """Tokens and the logits of each step, with the cache on and padding at the left."""
    kept = {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(IDS * LEFT, attention_mask=LEFT, **STEPS, **kept)
    return found.sequences, found.logits


def continued(model: Any) -> Any:
    """A cache handed on by hand."""
    first = model(IDS[:, :5], use_cache=True)
    return model(IDS[:, 5:], use_cache=True, past_key_values=first.past_key_values).logits


def labelled(model: Any) -> Any:
    """A loss, from embeddings."""
    return model(inputs_embeds=model.get_input_embeddings()(IDS), labels=IDS, output_hidden_states=True).loss


def attended(model: Any) -> Any:
    """A branch that falcon takes to return its attention weights."""
    return model(IDS, output_attentions=True).logits


def switched(model: Any) -> Any:
    """The other implementation of attention."""
    model.set_attn_implementation("sdpa")
    return model(IDS).logits


def translated(model: Any) -> Any:
    """From a source, with the decoder's cache."""
    found = model.generate(IDS, return_dict_in_generate=True, output_logits=True, **STEPS)
    return found.sequences, found.logits


@pytest.mark.parametrize(
    ("name", "masking", "calls"),
    [
        ("llama-sdpa", "dims_out", (generated, continued, labelled)),
        ("gpt2-eager", "dims_out", (generated, continued)),
        ("falcon-sdpa", "dims", (generated, attended)),
        ("phi3-eager", "heads", (generated, switched)),
        ("bloom-eager", "heads_out", (generated, continued)),
        ("qwen2_moe-sdpa", "mlp", (generated,)),
        ("t5-eager", "heads", (translated,)),
    ],
)
def test_other_calls(name: str, masking: str, calls: tuple[Callable[[Any], Any], ...]) -> None:
    specimen = load_zoo("hf")[name]
    torch.manual_seed(0)
    model = randomise(specimen.build(), specimen.inputs()).eval()
    masks = make_masks(model, specimen.inputs(), [masking])[masking]
    reference = masked_reference(model, masks).eval()
    before = sum(p.numel() for p in model.parameters())
    ModelSpeedup(model, specimen.inputs(), masks).speedup_model()
    assert sum(p.numel() for p in model.parameters()) < before
    with torch.no_grad():
        for call in calls:
            assert relative_error(call(model), call(reference)) < 1e-4
