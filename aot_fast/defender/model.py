"""Loading and saving the Defender: Qwen2.5-VL or Qwen3-VL in the Hugging Face layout, trained under ZeRO-3 or frozen and whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from aot_fast.config import DefenderConfig, EngineConfig, LoraConfig
from aot_fast.defender import attention, vision_attention
from aot_fast.defender.linears import pad_vision_mlps
from aot_fast.engine import Player, Runtime, build_player, seed_of, whole_state, whole_updates, zero_config
from aot_fast.models import model_folder

MODELS = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


@dataclass
class Defender:
    """A vision-language model with what turns questions into its inputs."""

    model: nn.Module
    """One of MODELS, perhaps inside peft's wrapper."""
    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil
    config: DefenderConfig
    runtime: Runtime
    player: Player | None = None
    """None for a frozen copy, whose weights are whole on every rank."""

    @property
    def core(self) -> PreTrainedModel:
        """The model without peft's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def version(self) -> int:
        return self.player.version if self.player else 0

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a response."""
        ids = self.core.generation_config.eos_token_id
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        return sorted({*ids, self.tokenizer.eos_token_id})

    @property
    def banned_ids(self) -> list[int]:
        """Tokens that sampling never emits: they would need an image behind them (MATH.md section 2)."""
        ids = self.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
        return [i for i in ids if i is not None and i != self.tokenizer.unk_token_id]

    def updating(self) -> AbstractContextManager:
        """Around the micro-batches of an update: whole weights where `config.gather` is update. A collective; the step is taken outside."""
        assert self.player is not None
        return self.player.gathered(training=True) if whole_updates(self.config, self.player.limits) else nullcontext()

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model ready to answer: whole weights, no gradients; ranks may call it unequally often."""
        if self.player:
            with self.player.gathered() as model:
                yield model
        else:
            with torch.no_grad():
                yield self.model


def load_defender(config: DefenderConfig, engine: EngineConfig, runtime: Runtime) -> Defender:
    """The Defender under a training engine, partitioned while it loads."""
    folder = model_folder(config.model, config.revision, "defender.model")
    keep_alive = HfDeepSpeedConfig(zero_config(engine, runtime, config.optimizer))  # from_pretrained partitions while this object lives
    model = _from_folder(folder, config, runtime)
    del keep_alive
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora.rank:
        model = _with_lora(model, config.lora, config.train_vision)
        if whole_updates(config, engine) and config.lora.fused:
            from aot_fast.adapters import fuse_adapters

            fuse_adapters(model)
    _prepare_for_gpu(model, runtime)
    if not config.train_vision:
        for name, parameter in model.named_parameters():
            if "visual." in name:
                parameter.requires_grad_(False)
    player = build_player("defender", model, config.optimizer, engine, runtime, _rates(model, config))
    return Defender(player.module, *_processors(folder, config), config, runtime, player)


def load_frozen(folder: Path, config: DefenderConfig, runtime: Runtime) -> Defender:
    """A Defender that only answers, whole on every rank: the judge, the reference, an earlier round."""
    model = _from_folder(folder, config, runtime).to(runtime.device).eval().requires_grad_(False)
    _prepare_for_gpu(model, runtime)
    return Defender(model, *_processors(folder, config), config, runtime)


def _rates(model: nn.Module, config: DefenderConfig) -> list[dict] | None:
    """AdamW's groups: the vision tower at its own learning rate; None where there is one rate for all."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    vision = [p for name, p in named if "visual." in name]
    if not config.vision_lr or not vision:
        return None
    rest = [p for name, p in named if "visual." not in name]
    return [{"params": rest, "lr": config.optimizer.lr}, {"params": vision, "lr": config.vision_lr}]


def _from_folder(folder: Path, config: DefenderConfig, runtime: Runtime) -> PreTrainedModel:
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        inner = _from_folder(model_folder(base, config.revision, "defender.model"), config, runtime)
        return PeftModel.from_pretrained(inner, str(folder))  # not merged: in bf16 small updates would round away
    if config.attention == "flex_attention" and runtime.device.type != "cuda":
        raise ValueError("defender.attention: flex_attention has no backward pass on a CPU; use sdpa")
    kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if kind not in MODELS:
        raise ValueError(f"defender.model: {folder} is a {kind}, expected one of {sorted(MODELS)}")
    plain = "sdpa" if config.attention == "flex_attention" else config.attention  # for the vision tower, and where nothing is packed
    model = MODELS[kind].from_pretrained(folder, dtype=runtime.dtype, attn_implementation=plain, local_files_only=True)
    attention.install(model, plain)
    if plain == "sdpa":
        vision_attention.install(model)
    if config.liger and runtime.device.type == "cuda" and find_spec("liger_kernel"):
        _take_ligers(model, kind)
    return model


def _prepare_for_gpu(model: nn.Module, runtime: Runtime) -> None:
    """After LoRA, which wraps layers."""
    if runtime.device.type == "cuda" and runtime.dtype.itemsize == 2:
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        pad_vision_mlps(core.model.visual)


def _take_ligers(model: PreTrainedModel, kind: str) -> None:
    """Liger's RMSNorm and SwiGLU in the modules of `model`. Not its loss, for the head is ours, nor its RoPE: as of 0.8.5 it replaces a
    function that transformers 5 never calls."""
    import liger_kernel.transformers as liger

    apply = getattr(liger, f"apply_liger_kernel_to_{kind}", None)
    if apply is None:
        print(f"liger-kernel knows no {kind}: the Defender keeps transformers' own layers", flush=True)
        return
    apply(rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True, model=model)


def _processors(folder: Path, config: DefenderConfig) -> tuple[PreTrainedTokenizerBase, Qwen2VLImageProcessorPil]:
    if (folder / "adapter_config.json").is_file():
        from peft import PeftConfig

        folder = model_folder(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path, config.revision, "defender.model")
    pixels: dict[str, Any] = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    pixels = {name: value for name, value in pixels.items() if value}
    # The full processor class needs torchvision; the tokenizer and the PIL image processor are all it is made of.
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, **pixels)
    return AutoTokenizer.from_pretrained(folder), image_processor


def _with_lora(model: nn.Module, lora: LoraConfig, vision: bool) -> nn.Module:
    """vision: the tower, whose layers have the same names, gets adapters too."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    targets = list(lora.targets or LORA_TARGETS)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("defender", "lora"))  # the same start on every rank, whatever ran before
        left_out = None if vision else r".*\bvisual\..*"
        return get_peft_model(model, PeftLora(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, exclude_modules=left_out))


def export_defender(defender: Defender, folder: Path) -> None:
    """Write the Defender so that plain transformers (full) or peft (LoRA) loads it. A collective."""
    assert defender.player is not None
    adapter = bool(defender.config.lora.rank)
    state = whole_state(defender.player, trainable_only=adapter)
    if defender.runtime.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if adapter:
            defender.model.peft_config["default"].base_model_name_or_path = str(
                model_folder(defender.config.model, defender.config.revision, "defender.model")
            )
        defender.model.save_pretrained(folder, state_dict=state)
        defender.tokenizer.save_pretrained(folder)
        defender.image_processor.save_pretrained(folder)
    defender.runtime.barrier()
