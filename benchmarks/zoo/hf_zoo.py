"""transformers: a small random config of each family, with eager and with sdpa attention."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import nn

from maskprop._torchvision import import_torchvision

from .specimen import InputMaker, Inputs, Specimen, Zoo

import_torchvision()

import transformers  # noqa: E402

HF = Zoo()

_VOCABULARY = 60
_LENGTH = 9
ATTENTIONS = ("eager", "sdpa")


def _ids(batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, _VOCABULARY, (batch, length), generator=generator)


def padded(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
    """Token ids with a padding mask: for encoders."""
    ids = _ids(batch, _LENGTH + stretch, generator)
    lengths = torch.randint(4, _LENGTH + stretch + 1, (batch, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(_LENGTH + stretch)[None] < lengths).long()}


def causal(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
    """Token ids, without the cache: what it holds would be an output."""
    return {"input_ids": _ids(batch, _LENGTH + stretch, generator), "use_cache": False}


def translated(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
    """Source and target token ids."""
    target = _ids(batch, 6 + stretch, generator)
    source = _ids(batch, _LENGTH + stretch, generator)
    return {"input_ids": source, "decoder_input_ids": target, "use_cache": False}


def pictures(size: int) -> InputMaker:
    """Pixel values."""

    def make(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}

    return make


def captioned(size: int) -> InputMaker:
    """Pixel values and token ids."""

    def make(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
        pixels = torch.randn(batch, 3, size, size, generator=generator)
        return {"pixel_values": pixels, "input_ids": _ids(batch, _LENGTH + stretch, generator)}

    return make


def spectrogram(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
    """Mel features and target token ids."""
    features = torch.randn(batch, 16, 40, generator=generator)
    target = _ids(batch, 6 + stretch, generator)
    return {"input_features": features, "decoder_input_ids": target, "use_cache": False}


def waveform(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
    """Samples of audio."""
    return {"input_values": torch.randn(batch, 400 + 40 * stretch, generator=generator)}


def spoken(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
    """Samples of audio and target token ids."""
    target = _ids(batch, 6 + stretch, generator)
    return {**waveform(batch, stretch, generator), "decoder_input_ids": target, "use_cache": False}


def _build(model: str, config: Any, attention: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(transformers, model)
        made = config()
        # A backbone may lack what the rest has.
        parts = {name: "eager" for name in made.sub_configs if name == "backbone_config"}
        return kind._from_config(made, attn_implementation={"": attention, **parts}).float()


def family(
    name: str,
    model: str,
    config: str,
    make: InputMaker,
    *,
    attentions: tuple[str, ...] = ATTENTIONS,
    stretches: bool = True,
    generates: bool = False,
    **arguments: Any,
) -> None:
    """Adds a family once for each implementation of attention, as ``name-eager`` and ``name-sdpa``."""

    def build_config() -> Any:
        return getattr(transformers, config)(**{k: v() if callable(v) else v for k, v in arguments.items()})

    for attention in attentions:
        HF.add(
            Specimen(
                f"{name}-{attention}",
                partial(_build, model, build_config, attention),
                make,
                stretches=stretches,
                generates=generates,
            )
        )


# --- encoders ---------------------------------------------------------------------------------------------

_BERT = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_SMALL_BERT = {"pad_token_id": 1, **_BERT}
family("bert", "BertForSequenceClassification", "BertConfig", padded, **_BERT)
family("bert_mlm", "BertForMaskedLM", "BertConfig", padded, attentions=("sdpa",), **_BERT)
family("roberta", "RobertaForSequenceClassification", "RobertaConfig", padded, **_SMALL_BERT)
family("albert", "AlbertModel", "AlbertConfig", padded, embedding_size=16, **_BERT)
family("electra", "ElectraForPreTraining", "ElectraConfig", padded, embedding_size=16, **_BERT)
family(
    "deberta_v2",
    "DebertaV2ForSequenceClassification",
    "DebertaV2Config",
    padded,
    attentions=("eager",),
    relative_attention=True,
    position_buckets=8,
    pos_att_type=["p2c", "c2p"],
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    type_vocab_size=0,
    **_BERT,
)
family(
    "distilbert",
    "DistilBertForSequenceClassification",
    "DistilBertConfig",
    padded,
    vocab_size=_VOCABULARY,
    dim=32,
    n_layers=2,
    n_heads=4,
    hidden_dim=48,
    max_position_embeddings=40,
)
family("mpnet", "MPNetForSequenceClassification", "MPNetConfig", padded, attentions=("eager",), **_SMALL_BERT)

# --- decoders ---------------------------------------------------------------------------------------------

_CAUSAL = {"generates": True}
_LLAMA = {
    **_CAUSAL,
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {**_LLAMA, "head_dim": 8}
family(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2Config",
    causal,
    vocab_size=_VOCABULARY,
    n_positions=64,
    n_embd=32,
    n_layer=2,
    n_head=4,
    bos_token_id=1,
    eos_token_id=2,
    **_CAUSAL,
)
family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    causal,
    **{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
)
family(
    "opt",
    "OPTForCausalLM",
    "OPTConfig",
    causal,
    vocab_size=_VOCABULARY,
    hidden_size=32,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    word_embed_proj_dim=32,
    pad_token_id=1,
    **_CAUSAL,
)
family(
    "bloom",
    "BloomForCausalLM",
    "BloomConfig",
    causal,
    attentions=("eager",),
    vocab_size=_VOCABULARY,
    hidden_size=32,
    n_layer=2,
    n_head=4,
    **_CAUSAL,
)
family("llama", "LlamaForCausalLM", "LlamaConfig", causal, **_LLAMA)
family("mistral", "MistralForCausalLM", "MistralConfig", causal, **{**_LLAMA, "sliding_window": 4})
family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", causal, **_LLAMA)
family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", causal, **_HEADS)
family("gemma", "GemmaForCausalLM", "GemmaConfig", causal, **_HEADS)
family(
    "gemma2",
    "Gemma2ForCausalLM",
    "Gemma2Config",
    causal,
    attentions=("eager",),  # the class refuses sdpa: its scores are soft-capped
    sliding_window=4,
    query_pre_attn_scalar=8,
    **_HEADS,
)
family(
    "gemma3",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    causal,
    sliding_window=4,
    query_pre_attn_scalar=8,
    **_HEADS,
)
family("phi3", "Phi3ForCausalLM", "Phi3Config", causal, **_LLAMA)
family("phi", "PhiForCausalLM", "PhiConfig", causal, **_LLAMA)
family("olmo2", "Olmo2ForCausalLM", "Olmo2Config", causal, **_LLAMA)
family(
    "falcon",
    "FalconForCausalLM",
    "FalconConfig",
    causal,
    **{k: v for k, v in _LLAMA.items() if "key" not in k},
)
family("mixtral", "MixtralForCausalLM", "MixtralConfig", causal, num_local_experts=4, **_LLAMA)
family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    "Qwen2MoeConfig",
    causal,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    **_LLAMA,
)
family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    causal,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    **_HEADS,
)
family(
    "mamba",
    "MambaForCausalLM",
    "MambaConfig",
    causal,
    attentions=("eager",),
    vocab_size=_VOCABULARY,
    hidden_size=32,
    state_size=8,
    num_hidden_layers=2,
    time_step_rank=4,
    bos_token_id=1,
    eos_token_id=2,
    **_CAUSAL,
)
family(
    "mamba2",
    "Mamba2ForCausalLM",
    "Mamba2Config",
    causal,
    attentions=("eager",),
    vocab_size=_VOCABULARY,
    hidden_size=32,
    state_size=8,
    num_hidden_layers=2,
    num_heads=4,
    head_dim=16,
    n_groups=2,
    chunk_size=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    **_CAUSAL,
)
family(
    "dbrx",
    "DbrxForCausalLM",
    "DbrxConfig",
    causal,
    attentions=("sdpa",),
    vocab_size=_VOCABULARY,
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=64,
    attn_config=lambda: {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    ffn_config=lambda: {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    **_CAUSAL,
)

# --- encoder-decoders -------------------------------------------------------------------------------------

_BART = {
    "vocab_size": _VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
family(
    "t5",
    "T5ForConditionalGeneration",
    "T5Config",
    translated,
    attentions=("eager",),
    vocab_size=_VOCABULARY,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    decoder_start_token_id=0,
)
family(
    "t5_gated",
    "T5ForConditionalGeneration",
    "T5Config",
    translated,
    attentions=("eager",),
    vocab_size=_VOCABULARY,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=32,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    decoder_start_token_id=0,
)
family("bart", "BartForConditionalGeneration", "BartConfig", translated, max_position_embeddings=40, **_BART)
family(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    spectrogram,
    num_mel_bins=16,
    max_source_positions=20,
    max_target_positions=40,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    **_BART,
)

# --- audio and pictures -----------------------------------------------------------------------------------

family(
    "wav2vec2",
    "Wav2Vec2ForCTC",
    "Wav2Vec2Config",
    waveform,
    vocab_size=20,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=(16, 16, 16),
    conv_kernel=(8, 3, 3),
    conv_stride=(4, 2, 2),
    num_feat_extract_layers=3,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    apply_spec_augment=False,
)
family(
    "speecht5",
    "SpeechT5ForSpeechToText",
    "SpeechT5Config",
    spoken,
    attentions=("eager",),
    vocab_size=_VOCABULARY,
    conv_dim=(16, 16, 16),
    conv_kernel=(8, 3, 3),
    conv_stride=(4, 2, 2),
    num_feat_extract_layers=3,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    encoder_max_relative_position=8,
    apply_spec_augment=False,
    **{k: v for k, v in _BART.items() if k not in ("vocab_size", "d_model")},
    hidden_size=32,
)
_VIT = {
    "stretches": False,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
_SWIN = {
    "stretches": False,
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
family("vit", "ViTForImageClassification", "ViTConfig", pictures(16), **_VIT)
family("deit", "DeiTForImageClassificationWithTeacher", "DeiTConfig", pictures(16), **_VIT)
family("dinov2", "Dinov2ForImageClassification", "Dinov2Config", pictures(16), **_VIT)
family("swin", "SwinForImageClassification", "SwinConfig", pictures(32), **_SWIN)
family("swin_v2", "Swinv2ForImageClassification", "Swinv2Config", pictures(32), attentions=("eager",), **_SWIN)
family(
    "convnext",
    "ConvNextForImageClassification",
    "ConvNextConfig",
    pictures(32),
    attentions=("eager",),
    stretches=False,
    hidden_sizes=[16, 24, 32, 48],
    depths=[1, 1, 2, 1],
)
family(
    "segformer",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    pictures(64),
    attentions=("eager",),
    stretches=False,
    num_labels=5,
    hidden_sizes=[16, 32, 32, 48],
    depths=[1, 1, 2, 1],
    num_attention_heads=[1, 2, 4, 4],
    decoder_hidden_size=32,
)
family(
    "detr",
    "DetrForObjectDetection",
    "DetrConfig",
    pictures(64),
    stretches=False,
    use_timm_backbone=False,
    use_pretrained_backbone=False,
    backbone=None,
    backbone_config=lambda: transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1], out_features=["stage4"]
    ),
    num_queries=6,
    num_labels=4,
    **{k: v for k, v in _BART.items() if k != "vocab_size"},
)
family(
    "clip",
    "CLIPModel",
    "CLIPConfig",
    captioned(16),
    projection_dim=24,
    text_config=lambda: {
        "vocab_size": _VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "eos_token_id": 2,
        "projection_dim": 24,
    },
    vision_config=lambda: {**{k: v for k, v in _VIT.items() if k != "stretches"}, "projection_dim": 24},
)
family(
    "chameleon",  # its norms of queries and keys have a weight for each head
    "ChameleonForConditionalGeneration",
    "ChameleonConfig",
    causal,
    vq_config=lambda: {
        "embed_dim": 8,
        "num_embeddings": 16,
        "resolution": 16,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "latent_channels": 8,
        "attn_resolutions": [],
    },
    vocabulary_map={"<image>": 4},
    **_LLAMA,
)
family(
    "paligemma",  # on fake tensors it makes another mask than on real ones
    "PaliGemmaForConditionalGeneration",
    "PaliGemmaConfig",
    causal,
    vision_config=lambda: transformers.SiglipVisionConfig(
        **{k: v for k, v in _VIT.items() if k != "stretches"}, vision_use_head=False
    ),
    text_config=lambda: transformers.GemmaConfig(**{k: v for k, v in _HEADS.items() if k != "generates"}),
    image_token_index=59,
    projection_dim=32,
)
family(
    "sam",
    "SamModel",
    "SamConfig",
    pictures(32),
    stretches=False,
    vision_config=lambda: {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
        "num_pos_feats": 8,
    },
    prompt_encoder_config=lambda: {
        "hidden_size": 16,
        "image_size": 32,
        "patch_size": 4,
        "mask_input_channels": 4,
    },
    mask_decoder_config=lambda: {
        "hidden_size": 16,
        "mlp_dim": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
)
