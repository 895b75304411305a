"""The Attacker at Qwen-Image-Edit's true shape on one GPU: where a step's time and memory go. Called by bench/attacker.py.

    python bench/attacker.py --model qwen_image_edit --published --json bench/results/h100/attacker.json
    python bench/attacker.py --model qwen_image_edit --layers 24 --json FILE       a smaller card; the result says "24 of 60 layers"
    python bench/attacker.py --model tiny --layers 1 --group 2 --published         the same code in seconds, on a CPU too

Random bf16 weights, made on the device in their ZeRO-3 partitions, through the project's own engine, rollout and update; rewards are given.
Operations count once: what checkpointing runs again is no part of an MFU. Every step encodes anew, the text encoder's way to the GPU and
back included; it is stated apart. By count: 35 TFLOP a forward at 512^2 with a 512^2 reference, 120 with one of 1024^2, twice that with
guidance. A step of 16 pictures samples with 5.0 PFLOP and trains with 3.5 (and 1.7 run again under checkpointing): 22 to 26 s at 40 % of an
H100's peak, beside 33 GB moved for the text encoder. The published recipe's two pictures: 4.8 + 9.8 (+ 4.3) PFLOP, 48 s. Weights, adapters
with their states and buckets, VAE: 46 GB. At one rank ZeRO-3's gathered weights are the partitions themselves, and no second 41 GB
(tests/test_engine.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from attacker_work import forget, questions, rewarded, write
from timing import synchronize
from torch import nn

from aot_fast.attacker import flops
from aot_fast.attacker.batching import num_pairs
from aot_fast.attacker.counters import counters, tokens_of
from aot_fast.attacker.encoding_cache import Encodings
from aot_fast.attacker.flow_grpo import update
from aot_fast.attacker.loading import fresh_transformer, without_hf_deepspeed
from aot_fast.attacker.model import Attacker, build_attacker
from aot_fast.attacker.recipes import RECIPES
from aot_fast.attacker.rollout import rollout
from aot_fast.config import AttackerConfig, EngineConfig, LoraConfig
from aot_fast.data.schema import Example
from aot_fast.engine import Runtime
from aot_fast.models import model_folder

ASSET = "asset:tiny/attacker"
"""Its tokenizer and scheduler are used: the template's system turn has 64 tokens, the scheduler Qwen-Image's settings."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a pipeline's models, as their configurations name them."""

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    vision: Mapping[str, Any]


SHAPES = {
    "qwen_image_edit": Shape(
        transformer={
            "num_layers": 60,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 3584,
            "in_channels": 64,
            "out_channels": 16,
            "patch_size": 2,
        },
        vae={"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]},
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152_064,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    ),
    "tiny": Shape(
        transformer={
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "axes_dims_rope": (8, 12, 12),
            "joint_attention_dim": 64,
            "in_channels": 64,
            "out_channels": 16,
            "patch_size": 2,
        },
        vae={"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]},
        text={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 704,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
        },
        vision={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [0],
        },
    ),
}
"""Qwen-Image-Edit with Qwen2.5-VL-7B, and one on which the same code can be tried anywhere."""

STD = 0.02
"""Of random matrices: outputs then are about as large as inputs at these widths, and nothing overflows."""
TOKENS = 1 << 14
"""In a micro-batch with checkpointing: seven pairs at 512^2. Kept are 6 GB of block inputs and one block's activations, 1.7 GB."""
ACTIVATION_BYTES = 106_000
"""Kept for the backward pass of a token in a layer without checkpointing: 105,427 by count of autograd's saved tensors (true width, LoRA
r 64 in fp32 and fused, bf16 base, torch 2.13 on a CPU; 148,947 with peft's own forward)."""
ROOMY = 100e9
"""Bytes of a card from which on a pair's whole activations (14 GB at 60 layers) fit several times beside the weights (46 GB)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    true = parser.add_argument_group("true shape", "for --model qwen_image_edit and tiny; pictures a step: --group times --prompts")
    true.add_argument("--layers", type=int, default=0, help="of the transformer; 0: all (60: 41 GB), fewer for smaller cards")
    true.add_argument("--encoder-layers", type=int, default=0, help="of the text encoder; 0: all (28: 16.6 GB on the host)")
    true.add_argument("--side", type=int, default=512, help="of edit and reference in pixels; the text encoder sees 3/4 of it")
    true.add_argument("--lora", type=int, default=64, help="rank; alpha is twice as much")
    true.add_argument("--tokens", type=int, default=0, help="of a micro-batch; 0: 16384 with checkpointing, else what memory is left for")
    true.add_argument("--gather", choices=("block", "rollout", "update"), default="update", help="what is whole when (attacker.gather)")
    true.add_argument("--compile-blocks", action="store_true", help="attacker.compile_blocks; a minute or two in the first step")
    true.add_argument("--fused-lora", action=argparse.BooleanOptionalAction, default=True, help="off: peft's own forward")
    true.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="gradient checkpointing; default: on below 100 GB")
    true.add_argument("--published", action="store_true", help="then a step under flow_grpo's published edit recipe: other work")
    true.add_argument("--published-group", type=int, default=2, help="its samples")
    true.add_argument("--within", type=float, default=400, help="seconds after which no further step and no other recipe is begun")


def measure(args: argparse.Namespace, runtime: Runtime, result: dict[str, Any]) -> dict[str, Any]:
    """`result` with load, ours and published; written to args.json after each of them, so that a later failure takes nothing along."""
    started = time.perf_counter()
    attacker = build(args, runtime)
    synchronize(runtime.device.type)
    result |= {"versions": {name: version(name) for name in ("deepspeed", "diffusers", "transformers", "peft")}}
    result |= {"model": facts(args, attacker), "load_seconds": time.perf_counter() - started}
    write(result, args.json)
    print(json.dumps({"model": result["model"], "load_seconds": result["load_seconds"]}), flush=True)
    asked = questions(args.prompts, args.side)
    result |= {"raw": {}, "settings": {}}
    take(result, "ours", attacker, asked, args.repeats, started + args.within, warm_up=True)
    write(result, args.json)
    if args.published and time.perf_counter() - started > args.within:
        result["published"] = {"failed": f"not begun: {args.within:.0f} s had gone by (--within)"}
    elif args.published and "failed" not in result["ours"]:
        attacker.player.module.enable_gradient_checkpointing()  # as they do, and 13,000 tokens a pair leave no choice
        take(result, "published", published(args, attacker), asked[:1], 1, started + args.within, warm_up=False)
        result |= ratio(result)
    write(result, args.json)
    return result


# The models


def build(args: argparse.Namespace, runtime: Runtime) -> Attacker:
    """As load_attacker from a folder. The frozen parts come first: the text encoder is made on the GPU while there is room, and leaves."""
    shape, engine = shape_of(args), EngineConfig()
    config = config_of(args, runtime)
    parts = frozen_parts(shape, runtime)
    transformer = fresh_transformer(shape.transformer, config, engine, runtime)
    randomize(transformer, runtime)
    encodings = Encodings(config, model_folder(ASSET, "", "model"), runtime.dtype)
    attacker = build_attacker(transformer, parts, encodings, config, engine, runtime)
    return replace(attacker, config=replace(config, tokens_per_microbatch=args.tokens or tokens_that_fit(attacker)))


def shape_of(args: argparse.Namespace) -> Shape:
    whole = SHAPES[args.model]
    layers = args.layers or whole.transformer["num_layers"]
    encoder_layers = args.encoder_layers or whole.text["num_hidden_layers"]
    return replace(
        whole,
        transformer={**whole.transformer, "num_layers": layers},
        text={**whole.text, "num_hidden_layers": encoder_layers},
    )


def config_of(args: argparse.Namespace, runtime: Runtime) -> AttackerConfig:
    """paper_8gpu's, on fewer pictures."""
    checkpointing = card_bytes(runtime) < ROOMY if args.checkpointing is None else args.checkpointing
    return AttackerConfig(
        model=ASSET,
        lora=LoraConfig(rank=args.lora, alpha=2 * args.lora, fused=args.fused_lora),
        gather=args.gather,
        compile_blocks=args.compile_blocks,
        gradient_checkpointing=checkpointing,
        target_pixels=args.side**2,
        reference_pixels=args.side**2,
        condition_pixels=(3 * args.side // 4) ** 2,
        num_steps=args.steps,
        window=args.window,
        window_range=(0, args.window + 2),
        group_size=args.group,
        prompts_per_step=args.prompts,
        rollout_batch=16,
    )


def card_bytes(runtime: Runtime) -> int:
    """Memory of the GPU; 0 for a CPU."""
    return torch.cuda.get_device_properties(runtime.device).total_memory if runtime.device.type == "cuda" else 0


def tokens_that_fit(attacker: Attacker) -> int:
    """Of a micro-batch, a fifth of the free memory left alone."""
    runtime = attacker.runtime
    if attacker.config.gradient_checkpointing or runtime.device.type != "cuda":
        return TOKENS
    free = card_bytes(runtime) - torch.cuda.memory_allocated()
    return max(1, min(TOKENS, int(0.8 * free / (ACTIVATION_BYTES * attacker.player.module.config.num_layers))))


def randomize(model: nn.Module, runtime: Runtime) -> None:
    """Normal matrices, drawn where they lie; norms and biases stay as the constructor starts them."""
    made = torch.Generator(runtime.device).manual_seed(runtime.rank)
    for parameter in model.parameters():
        if len(parameter.ds_shape) > 1:
            parameter.ds_tensor.normal_(0, STD, generator=made)


def frozen_parts(shape: Shape, runtime: Runtime) -> dict[str, Any]:
    """As loading.frozen_parts, with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = model_folder(ASSET, "", "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    with torch.device(runtime.device), without_hf_deepspeed():
        encoder = Qwen2_5_VLForConditionalGeneration._from_config(encoder_config(shape, tokenizer), dtype=runtime.dtype)
    if runtime.device.type == "cuda":
        encoder.to("cpu")
        torch.cuda.empty_cache()
    # Qwen2.5-VL's limits; a token of a picture is 2 x 2 patches.
    limits = {"min_pixels": 56 * 56, "max_pixels": 12_845_056}
    return {
        "vae": fresh_vae(shape, runtime),
        "text_encoder": encoder.eval().requires_grad_(False),
        "tokenizer": tokenizer,
        "image_processor": Qwen2VLImageProcessorPil(patch_size=shape.vision["patch_size"], merge_size=2, **limits),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    }


def fresh_vae(shape: Shape, runtime: Runtime) -> nn.Module:
    from diffusers import AutoencoderKLQwenImage

    with torch.device(runtime.device):
        vae = AutoencoderKLQwenImage.from_config(dict(shape.vae))
    return vae.to(runtime.dtype).eval().requires_grad_(False)


SPECIAL = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}


def encoder_config(shape: Shape, tokenizer: Any = None):
    """Of the text encoder; its special tokens are the tokenizer's."""
    from transformers import Qwen2_5_VLConfig

    text, ids = dict(shape.text, bos_token_id=None), {}
    if tokenizer:
        text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in SPECIAL.items()}
    return Qwen2_5_VLConfig(text_config=text, vision_config=dict(shape.vision), **ids)


def facts(args: argparse.Namespace, attacker: Attacker) -> dict[str, Any]:
    """What was built, and the memory it takes before anything runs."""
    module, whole, config = attacker.player.module, SHAPES[args.model], attacker.config
    layers, encoder = module.config.num_layers, attacker.text_encoder.config.text_config.num_hidden_layers
    sizes = [(p.ds_numel, p.requires_grad) for p in module.parameters()]
    return {
        "name": f"{args.model}, {layers} of {whole.transformer['num_layers']} layers, random weights",
        "text_encoder": f"{encoder} of {whole.text['num_hidden_layers']} text layers",
        "frozen_parameters_M": sum(n for n, trained in sizes if not trained) / 1e6,
        "trained_parameters_M": sum(n for n, trained in sizes if trained) / 1e6,
        "card_bytes": card_bytes(attacker.runtime) or None,
        "loaded_bytes": torch.cuda.memory_allocated() if attacker.runtime.device.type == "cuda" else None,
        "checkpointing": config.gradient_checkpointing,
        "tokens_per_microbatch": config.tokens_per_microbatch,
    }


# What is measured


def take(result: dict[str, Any], name: str, attacker: Attacker, asked: list[Example], repeats: int, deadline: float, warm_up: bool) -> None:
    """`repeats` whole steps, sampling to optimizer, after one that does not count if `warm_up`; fewer when time is up. Their medians become
    result[name], they themselves result["raw"][name]."""
    result["settings"][name] = asdict(attacker.config)
    turns = result["raw"][name] = []
    try:
        while len(turns) < repeats + warm_up and (len(turns) <= warm_up or time.perf_counter() < deadline):
            turns.append(step(attacker, asked, len(turns)))
            print(name, json.dumps({"step": len(turns) - 1} | turns[-1]), flush=True)
    except torch.OutOfMemoryError as error:  # what was measured before must not be lost with it
        advice = "out of memory: lower --tokens, --group or --layers, or pass --checkpointing"
        print(name, advice, error, flush=True)
        result[name] = {"failed": f"{advice} ({str(error)[:300]})"}
        return
    result[name] = medians(turns[warm_up:], len(asked) * attacker.config.group_size) | {"warm_up": warm_up}


def medians(turns: list[dict[str, Any]], images: int) -> dict[str, Any]:
    """Of steps of so many pictures each."""
    made = {name: _median([turn[name] for turn in turns]) for name in ("images_per_s", "seconds", "tflop", "mfu", "peak_bytes", "work")}
    encode, sampling = made["seconds"]["encode"], made["seconds"]["denoise"] + made["seconds"]["decode"]
    rates = {"rollout_images_per_s": images / sampling, "rollout_images_per_s_with_encode": images / (encode + sampling)}
    return made | rates | {"images": images, "steps": len(turns), "max_logp_mismatch": max(turn["logp_mismatch"] for turn in turns)}


def _median(values: list[Any]) -> Any:
    """Of numbers, or by name of dictionaries of them; None where there is none."""
    if isinstance(values[0], dict):
        return {name: _median([value[name] for value in values]) for name in values[0]}
    return None if values[0] is None else statistics.median(values)


def step(attacker: Attacker, asked: list[Example], number: int) -> dict[str, Any]:
    """One step. Its window, and with it its work, differs from another's: hence operations and MFU by step."""
    device = attacker.runtime.device.type
    forget(attacker)
    _reset_peak(device)
    groups = rollout(attacker, asked, seed=0, round=1, step=number)
    synchronize(device)
    peaks = {"rollout": _peak(device)}
    print(json.dumps({"step": number, "rollout_seconds": attacker.stopwatch.seconds(), "peak_bytes": peaks}), flush=True)
    _reset_peak(device)
    between = time.perf_counter()
    metrics = update(attacker, [rewarded(group) for group in groups])
    synchronize(device)
    counted = counters(attacker, groups, time.perf_counter() - between)
    one = flops.forward_flops(attacker.player.module.config, tokens_of(groups[0])).total
    pairs = num_pairs(attacker.config, [groups[0].encoding])
    work = {"forward_tflop": one / 1e12, "text_tokens": len(groups[0].encoding.prompt), "pairs_a_microbatch": pairs}
    return {
        "images_per_s": counted["images_per_s"],
        "seconds": {stage: counted[f"{stage}/seconds"] for stage in ("encode", "denoise", "decode", "update")},
        "tflop": {"denoise": counted["rollout/tflop"], "update": counted["update/tflop"]},
        "mfu": {"denoise": counted.get("rollout/mfu"), "update": counted.get("update/mfu")},
        "peak_bytes": peaks | {"update": _peak(device)},
        "work": work | {"shared_steps": groups[0].shared_steps},
        "logp_mismatch": metrics["logp_mismatch"],
        "applied": metrics["applied"],
    }


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> dict[str, int | None]:
    """The most there was, weights included; None on a CPU."""
    if device != "cuda":
        return {"allocated": None, "reserved": None}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


# Other work


def published(args: argparse.Namespace, attacker: Attacker) -> Attacker:
    """The same machine under flow_grpo's published edit recipe: everything for every sample, pictures of twice the side, guidance, every
    step but the last trained, the video VAE as it is. Four samples share a forward there (train_batch_size)."""
    theirs = dict(RECIPES["flow_grpo_edit"].settings) | {"group_size": args.published_group}
    theirs |= {"reference_pixels": (2 * args.side) ** 2, "condition_pixels": (2 * args.side) ** 2, "still_vae": False}
    theirs |= {"encode_once": False, "shared_prefix": False, "gradient_checkpointing": True, "prompts_per_step": 1}
    theirs |= {"tokens_per_microbatch": 0, "microbatch": min(4, args.published_group), "rollout_batch": 4, "decode_batch": 4}
    return replace(attacker, config=replace(attacker.config, **theirs), vae=fresh_vae(SHAPES[args.model], attacker.runtime))


def ratio(result: dict[str, Any]) -> dict[str, Any]:
    """Of pictures in a second, where both were measured."""
    if "failed" in result["published"]:
        return {}
    times = result["ours"]["images_per_s"] / result["published"]["images_per_s"]
    return {"two_recipes_images_per_s_ratio": times, "two_recipes_note": "two recipes, other work: not a speed-up of the same work"}
