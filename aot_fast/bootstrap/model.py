"""The small Defender's network: Qwen2.5-VL's class with 1.4 M parameters, wired so that likeness is looked at from the start."""

from __future__ import annotations

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from aot_fast.bootstrap.folders import PATCH_PX, build_tokenizer


def defender_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL in small: 8-px patches, windows of 32 px, full attention in the last vision block."""
    token = tokenizer.get_vocab()
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        # The usual 0.02 leaves attention at this width nearly uniform.
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1000000.0},
    }
    vision = {
        "depth": 4,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 3,
        "out_hidden_size": 128,
        "patch_size": PATCH_PX,
        "window_size": 32,
        "fullatt_block_indexes": [1, 3],
        "initializer_range": 0.08,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
    )


@torch.no_grad()
def _make_likes_attend(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Start with queries equal to keys and with silent blocks: a word then looks at what resembles it, other words or picture tokens.

    Mimetic initialization (Trockman and Kolter, arXiv 2305.09828). From random queries, looking things up took three times the steps.
    """
    config = model.config.text_config
    shared = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.language_model.layers:
        keys = layer.self_attn.k_proj.weight.view(config.num_key_value_heads, 1, -1, config.hidden_size)
        queries = keys.expand(-1, shared, -1, -1).reshape_as(layer.self_attn.q_proj.weight)
        layer.self_attn.q_proj.weight.copy_(queries + 0.02 * torch.randn_like(queries))
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def build_defender(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained small Defender that stops at <|im_end|>."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = Qwen2_5_VLForConditionalGeneration(defender_config(tokenizer))
    _make_likes_attend(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model
