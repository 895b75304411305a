"""Qwen3-VL through the same code: shared prompts equal padded rows, and its rollout transformers' own."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from aot_fast.bootstrap.folders import build_tokenizer, save_defender
from aot_fast.defender.drawing import Sampling
from aot_fast.defender.model import load_frozen
from tests.defender.recorded import distance, gradient_of_update
from tests.models import answers_to, defender_config_of, scene_examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = build_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True, "rope_theta": 10000.0},
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 8,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    path = tmp_path_factory.mktemp("qwen3") / "defender"
    save_defender(model, path, torch.float32)
    return path


def test_gradient_is_the_plain_ones(folder, runtime):
    plain, expected = gradient_of_update(folder, 0, runtime, version=-1, shared_prefix=False, microbatch=3)
    for changes in ({"tokens_per_microbatch": 240}, {"prompts": "mixed"}):
        if "prompts" in changes:
            plain, expected = gradient_of_update(folder, 0, runtime, version=-1, shared_prefix=False, microbatch=3, **changes)
        got, gradients = gradient_of_update(folder, 0, runtime, version=-1, **changes)
        assert got["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert distance(gradients, expected) < 1e-5


def test_rollout_is_the_plain_one(folder, runtime):
    defender = load_frozen(folder, defender_config_of(folder), runtime)
    plain = replace(defender, config=replace(defender.config, shared_prefix=False))
    arguments = scene_examples(3), range(3), Sampling(3, 1.0, 1.0, 8)
    for a, b in zip(answers_to(defender, *arguments), answers_to(plain, *arguments), strict=True):
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one.ids, other.ids) and (one.logp - other.logp).abs().max() < 1e-5
