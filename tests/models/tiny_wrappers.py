"""Tiny models that see or hear around decoders of every family that transformers wraps, and what they are given.

What a picture, or a sound, is to the decoder is drawn, and not seen: no processor and no tower comes into it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import torch
import transformers
from tiny_models import END, HEADS, IMAGE, NO_END, SIZE, START
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

HEARD = 4  # tokens of each picture, or sound


def _text(name: str, model_type: str) -> dict[str, Any]:
    kwargs = families.FAMILIES[name]["kwargs"]
    return {**kwargs.get("text_config", kwargs), "model_type": model_type}


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
INKLING = {"hidden_size": 32, "num_attention_heads": 2, "text_hidden_size": 64}
MINICPM = {**TOWER, "image_size": 32, "patch_size": 4}
MARKS = {"image_start_id": 97, "image_end_id": 98, "slice_start_id": 90, "slice_end_id": 91, "newline_id": 92}
QFORMER = {**TOWER, "model_type": "blip_2_qformer", "encoder_hidden_size": 32}
CLIP = {**TOWER, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
EAR = {"input_dim": 8, "num_layers": 1, "hidden_dim": 32, "num_heads": 2, "output_dim": 8, "context_size": 20}
SIGLIP = {**TOWER, "model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 4}
RADIO = {**TOWER, "model_type": "radio", "patch_size": 4, "image_size": 16, "video_temporal_patch_size": 2}
GLM = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
ASR = {
    "asr_config": TOWER,
    "diarization_config": {"audio_config": TOWER, "head_config": {"hidden_size": 32, "audio_hidden_size": 32}},
}

# name: (configuration class, model class, the decoder's family and model type, arguments)
WRAPPERS: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "inkling": (
        *("InklingConfig", "InklingForConditionalGeneration", "inkling", "inkling_text"),
        {
            "vision_config": {**INKLING, "patch_size": 4, "temporal_patch_size": 2, "num_hidden_layers": 4},
            "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8},
            "image_token_id": IMAGE,
            "audio_token_id": IMAGE - 1,
        },
    ),
    "inkling2": (
        *("Inkling2Config", "Inkling2ForConditionalGeneration", "inkling2", "inkling2_text"),
        {"vision_config": {**INKLING, "num_hidden_layers": 1, "projection_hidden_dim": 32}, "image_token_id": IMAGE},
    ),
    "inkling2_loop": (
        *("Inkling2LoopConfig", "Inkling2LoopForConditionalGeneration", "inkling2_loop", "inkling2_loop_text"),
        {
            "vision_config": {
                **INKLING,
                "model_type": "inkling2_vision",
                "num_hidden_layers": 1,
                "projection_hidden_dim": 32,
            },
            "image_token_id": IMAGE,
        },
    ),
    "glm5_next": (
        *("Glm5NextConfig", "Glm5NextForConditionalGeneration", "glm5_next", "glm5_next_text"),
        {
            "vision_config": {**GLM, "projection_intermediate_size": 32},
            "image_token_id": IMAGE,
            "video_token_id": IMAGE + 1,
        },
    ),
    "lfm2_vl": (
        *("Lfm2VlConfig", "Lfm2VlForConditionalGeneration", "lfm2", "lfm2"),
        {"vision_config": SIGLIP, "image_token_id": IMAGE, "projector_hidden_size": 32},
    ),
    "lfm3_vl": (
        *("Lfm3VlConfig", "Lfm3VlForConditionalGeneration", "lfm3", "lfm3"),
        {
            "vision_config": {**TOWER, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
            "image_token_id": IMAGE,
            "video_token_id": IMAGE + 1,
            "projector_hidden_size": 32,
        },
    ),
    "minicpm_ocr": (
        *("MiniCPMOcrConfig", "MiniCPMOcrForConditionalGeneration", "qwen3_5", "qwen3_5_text"),
        {"vision_config": MINICPM, "insert_layer_id": 0, "image_token_id": IMAGE, "video_token_id": IMAGE + 1},
    ),
    "minicpmv4_7": (
        *("MiniCPMV4_7Config", "MiniCPMV4_7ForConditionalGeneration", "qwen3_5", "qwen3_5_text"),
        {"vision_config": MINICPM, "insert_layer_id": 0, "image_token_id": IMAGE, "video_token_id": IMAGE + 1, **MARKS},
    ),
    "nemotron_h_omni": (
        *("NemotronH_Omni_Reasoning_V3_Config", "NemotronH_Omni_Reasoning_V3", "nemotron_h", "nemotron_h"),
        {"vision_config": RADIO, "vision_hidden_size": 32, "projector_hidden_size": 32, "image_token_id": IMAGE},
    ),
    "nemotron3_5_transcribe": (
        *("Nemotron3_5TranscribeConfig", "Nemotron3_5TranscribeForConditionalGeneration", "nemotron_h", "nemotron_h"),
        {"audio_config": ASR, "audio_token_id": IMAGE},
    ),
    "granite_speech": (
        *("GraniteSpeechConfig", "GraniteSpeechForConditionalGeneration", "granitemoehybrid", "granitemoehybrid"),
        {
            "encoder_config": EAR,
            "projector_config": QFORMER,
            "audio_token_index": IMAGE,
            "has_lora_adapter": False,
        },
    ),
    # of any decoder
    "llava": (
        *("LlavaConfig", "LlavaForConditionalGeneration", "qwen3_next", "qwen3_next"),
        {"vision_config": CLIP, "image_token_index": IMAGE},
    ),
}
WRAPPERS = {
    name: row
    for name, row in WRAPPERS.items()
    if row[2] in families.FAMILIES and all(hasattr(transformers, cls) for cls in row[:2])
}


def build(name: str) -> Any:
    """A float64 model; float32 where its code computes in that alone."""
    config_class, model_class, family, model_type, more = WRAPPERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(text_config=_text(family, model_type), **more)
    config.get_text_config(decoder=True)._experts_implementation = "eager"  # torch has no grouped product in float64
    model = families._reinit(getattr(transformers, model_class)(config), 0, long_memory=True)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):  # which decoding does not know, as it is shipped
            module.time_step_limit = (0.0, float("inf"))
    for module in model.modules():  # what it hears is drawn as well
        if hasattr(module, "get_audio_features") and name in ("nemotron3_5_transcribe", "granite_speech"):
            module.get_audio_features = _heard(lambda: next(model.parameters()).dtype)
    model = model.to(torch.float32 if "inkling" in name or "omni" in name else torch.float64).eval()
    settings = model.generation_config
    settings.eos_token_id, settings.bos_token_id, settings.pad_token_id, settings.do_sample = None, None, 0, False
    return model


def build_placing(name: str) -> Any:
    """A hunyuan_vl, which numbers its pictures, or a thinking qwen2_5_omni, which finds them by itself."""
    sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}
    text = {**SIZE, **HEADS, **NO_END, "num_hidden_layers": 1, "head_dim": 16, "rope_parameters": sections}
    eye = {**TOWER, "num_hidden_layers": 1, "patch_size": 4, "out_hidden_size": 64}
    marks = {"image_token_id": IMAGE, "im_start_id": START, "im_end_id": END}
    torch.manual_seed(0)
    if name == "hunyuan_vl":
        eye["text_hidden_size"] = 64
        config = transformers.HunYuanVLConfig(text_config=text, vision_config=eye, im_newline_id=92, **marks)
        return transformers.HunYuanVLForConditionalGeneration(config).eval()
    sections["mrope_section"] = [2, 3, 3]
    eye = {**GLM, "patch_size": 4, "fullatt_block_indexes": [0], "window_size": 16}
    ear = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 64}
    config = transformers.Qwen2_5OmniThinkerConfig(text_config=text, vision_config=eye, audio_config=ear)
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config).eval()


def _drawn(dtype: torch.dtype) -> Tensor:
    return torch.randn(HEARD, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def _heard(dtype: Callable[[], torch.dtype]) -> Callable[..., BaseModelOutputWithPooling]:
    return lambda *_, **__: BaseModelOutputWithPooling(pooler_output=_drawn(dtype())[None])


def given(model: Any, name: str, ids: Tensor) -> dict[str, Any]:
    """What comes with ids (B, T) among which is one picture, or sound."""
    dtype = next(model.parameters()).dtype
    if name in ("nemotron3_5_transcribe", "granite_speech"):
        return {"input_features": torch.zeros(1, 4, 8, dtype=dtype)}
    seen = _drawn(dtype)
    more: dict[str, Any] = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=(seen,))}}
    if name == "inkling":
        more["mm_encoder_outputs"]["image"].pooler_output = seen
    if name == "minicpmv4_7":
        more.update(target_sizes=torch.tensor([[8, 8]]), mm_token_type_ids=(ids == IMAGE).long())
    return more
