"""Randomly initialised Qwen-Image-Edit pipelines of a few hundred kilobytes, in the diffusers layout."""

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from aot_fast.config import AttackerConfig, LoraConfig, OptimizerConfig

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = "Describe the key features of the input image (color, shape, size, texture, objects, background) Picture 1: Add a distractor"
TRANSFORMER = dict(num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32, axes_dims_rope=(4, 6, 6))

BASE = AttackerConfig(
    target_pixels=64 * 64,
    reference_pixels=64 * 64,
    condition_pixels=64 * 64,
    num_steps=4,
    window=2,
    window_range=(0, 3),
    eta=0.7,
    group_size=4,
    prompts_per_step=2,
    rollout_batch=4,
    microbatch=4,
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0),
)
LORA = LoraConfig(rank=4, alpha=8)


def tokenizer():
    """Byte-level, so that any text encodes."""
    from transformers import Qwen2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([WORDS] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    made = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return made


def text_encoder(made):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {name: made.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=14, window_size=56)
    config = Qwen2_5_VLConfig(
        text_config=text | dict(vocab_size=len(made), rope_parameters=rope, bos_token_id=None, eos_token_id=None),
        vision_config=vision | dict(fullatt_block_indexes=[0]),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def make_pipeline(folder: Path, plus: bool = False, max_shard_size: str = "10GB", seed: int = 0) -> Path:
    """Write a pipeline folder: VAE scale 4 (unit 8), text width 32, transformer of 2 layers."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(**TRANSFORMER)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("norm_out.linear.weight") or "mod" in name:
                parameter.mul_(3)  # a fresh model hardly sees its prompt or its time; these tests need one that does
    transformer.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
    AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[False, True]).save_pretrained(
        folder / "vae"
    )
    made = tokenizer()
    made.save_pretrained(folder / "tokenizer")
    text_encoder(made).save_pretrained(folder / "text_encoder")
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64).save_pretrained(folder / "processor")
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02
    ).save_pretrained(folder / "scheduler")
    name = "QwenImageEditPlusPipeline" if plus else "QwenImageEditPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.42.1"}))
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A smooth random RGB picture."""
    noise = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(noise[None], size=size[::-1], mode="bicubic")[0].clamp(0, 1)
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy())


def perturb(player, seed, scale=0.05):
    """Add seeded noise to the trained weights, in the optimizer's fp32 copies too; the same on any number of ranks."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    generator = torch.Generator().manual_seed(seed)
    for parameter in player.trainable:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.add_(scale * torch.randn(parameter.ds_shape, generator=generator))
            changed = parameter.detach().clone()
        safe_set_full_fp32_param(parameter, changed.float())
