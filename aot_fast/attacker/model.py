"""The Attacker: a partitioned, trainable transformer with the frozen rest of its pipeline around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aot_fast.attacker.counters import Stopwatch
from aot_fast.attacker.ema import Ema
from aot_fast.attacker.encoding_cache import Encodings
from aot_fast.attacker.loading import find_pipeline, frozen_parts, is_plus, partitioned_transformer
from aot_fast.attacker.still_vae import use_image_convolutions
from aot_fast.config import AttackerConfig, EngineConfig
from aot_fast.engine import Player, Runtime, build_player, seed_of, whole_state, whole_updates

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ADAPTER = "default"
COMPILED_GRAPHS = 64
"""Of the block: with and without gradient, adapter and mask, of the first block's input and the others', by size until that is a symbol.
Torch's own limit of 8 is passed by two picture sizes; what is over the limit runs uncompiled."""


@dataclass
class Attacker:
    """One image editor, ready to sample and to train."""

    player: Player
    """The transformer's DeepSpeed engine."""
    vae: Any
    text_encoder: Any
    tokenizer: Any
    image_processor: Any
    """Qwen2VLImageProcessorPil: pictures for the text encoder."""
    scheduler: Any
    config: AttackerConfig
    plus: bool
    """Edit-Plus pipeline: numbers its pictures in the prompt."""
    runtime: Runtime
    ema: Ema | None
    encodings: Encodings
    stopwatch: Stopwatch
    """Of the last rollout: encode, denoise, decode."""

    @property
    def unit(self) -> int:
        """Picture sides are multiples of this many pixels: the VAE's scale times the 2x2 packing."""
        return 2 * 2 ** len(self.vae.temperal_downsample)

    @property
    def vae_scale(self) -> int:
        """Picture pixels a latent pixel, per side."""
        return self.unit // 2

    @contextmanager
    def encoders(self) -> Iterator[None]:
        """The text encoder where it can work; on a GPU it is there only inside, unless engine.offload_idle is off."""
        device, leaves = self.runtime.device, self.runtime.device.type == "cuda" and self.player.limits.offload_idle
        self.text_encoder.to(device)
        try:
            yield
        finally:
            if leaves:
                self.text_encoder.to("cpu")

    def sampling(self) -> AbstractContextManager:
        """Around `sampler.sample`: whole weights without gradients, unless `config.gather` is block. A collective."""
        return torch.no_grad() if self.config.gather == "block" else self.player.gathered()

    def replaying(self) -> AbstractContextManager:
        """Around the micro-batches of an update: whole weights where `config.gather` is update. A collective; the step is taken outside."""
        return self.player.gathered(training=True) if whole_updates(self.config, self.player.limits) else nullcontext()

    def save_extra(self) -> dict[str, torch.Tensor]:
        """This rank's state that the engine's checkpoint does not hold: the EMA's shards (host tensors)."""
        return self.ema.state() if self.ema else {}

    def load_extra(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `save_extra`, at the same world size. Raises ValueError when names or shapes differ."""
        if self.ema:
            self.ema.load(state)


def load_attacker(config: AttackerConfig, engine: EngineConfig, runtime: Runtime, run_folder: Path | None = None) -> Attacker:
    """Load `config.model`, add LoRA if asked, and build its engine. Raises ValueError for settings or weights that cannot work.

    run_folder: where a relative `config.encoding_folder` lies; None: encodings stay in memory.
    """
    _check(config)
    folder = find_pipeline(config)
    plus = is_plus(folder)
    if config.context_pixels and not plus:
        raise ValueError(
            f"attacker.context_pixels = {config.context_pixels}: attacker.model = {config.model!r} is no Edit-Plus pipeline and sees one "
            "picture; use 0, or an Edit-Plus pipeline (Qwen-Image-Edit-2509 or -2511)"
        )
    transformer = partitioned_transformer(folder / "transformer", config, engine, runtime)
    on_disk = run_folder / config.encoding_folder if run_folder and config.encoding_folder else None
    encodings = Encodings(config, folder, runtime.dtype, on_disk)
    return build_attacker(transformer, frozen_parts(folder, runtime), encodings, config, engine, runtime, plus)


def build_attacker(
    transformer: nn.Module,
    parts: Mapping[str, Any],
    encodings: Encodings,
    config: AttackerConfig,
    engine: EngineConfig,
    runtime: Runtime,
    plus: bool = False,
) -> Attacker:
    """An Attacker from a partitioned transformer and the frozen `parts` (loading.frozen_parts): LoRA if asked, the engine, the rest."""
    if config.lora.rank:
        _add_lora(transformer, config)
        if whole_updates(config, engine) and config.lora.fused:
            from aot_fast.adapters import fuse_adapters

            fuse_adapters(transformer)
        # Adapters are fp32 over a base in the compute dtype; the engine then keeps fp32 gradients and communicates them so.
        trainer = build_player("attacker", transformer, config.optimizer, engine, replace(runtime, dtype=torch.float32))
    else:
        trainer = build_player("attacker", transformer, config.optimizer, engine, runtime)
    if config.gradient_checkpointing:
        trainer.module.enable_gradient_checkpointing()
    if config.compile_blocks:
        torch._dynamo.config.recompile_limit = max(COMPILED_GRAPHS, torch._dynamo.config.recompile_limit)
        trainer.module.compile_repeated_blocks()
    if config.still_vae:
        use_image_convolutions(parts["vae"])
    return Attacker(
        player=trainer,
        config=config,
        plus=plus,
        runtime=runtime,
        ema=Ema(trainer, config.ema_decay) if config.ema_decay else None,
        encodings=encodings,
        stopwatch=Stopwatch(runtime.device),
        **parts,
    )


def _check(config: AttackerConfig) -> None:
    low, high = config.window_range
    if config.beta > 0 and not config.lora.rank:
        raise ValueError(f"attacker.beta = {config.beta} needs attacker.lora.rank > 0: the KL's reference is the adapter switched off")
    if config.compile_blocks and config.gather != "update":
        raise ValueError(
            f"attacker.compile_blocks needs attacker.gather = update, not {config.gather}: ZeRO's hooks inside a block cannot be compiled"
        )
    if config.variant == "nft" and config.steps_per_rollout > 1:
        raise ValueError(
            f"attacker.steps_per_rollout = {config.steps_per_rollout} with attacker.variant = nft: its loss holds for the weights that "
            "sampled; set it to 1"
        )
    if config.context_pixels and config.region == "whole":
        raise ValueError(
            f"attacker.context_pixels = {config.context_pixels} needs attacker.region window: where the whole picture is edited, there is "
            "no context beside it; use 0"
        )
    if config.dynamics != "ode" and config.eta <= 0:
        raise ValueError(f"attacker.eta = {config.eta}: must be above 0, or {config.dynamics} has no noise and no log-prob to train on")
    if config.dynamics != "ode" and not 0 <= low <= high - config.window <= config.num_steps - 1 - config.window:
        raise ValueError(
            f"attacker.window = {config.window} and attacker.window_range = {list(config.window_range)}: the range must hold the window "
            f"and end before the last of attacker.num_steps = {config.num_steps} steps, which is never stochastic"
        )


def _add_lora(transformer: nn.Module, config: AttackerConfig) -> None:
    """Freeze the base and put fp32 adapters on it. Raises ValueError when a target matches no module."""
    from peft import LoraConfig as PeftLora

    targets = config.lora.targets or ATTENTION
    for target in targets:
        if not any(name.endswith(target) for name, _ in transformer.named_modules()):
            raise ValueError(f"attacker.lora.targets: no module of the transformer ends with {target!r}")
    transformer.requires_grad_(False)
    lora = PeftLora(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(targets), init_lora_weights="gaussian")
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("attacker", "lora"))  # the same start on every rank, whatever ran before
        transformer.add_adapter(lora, adapter_name=ADAPTER)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def export_attacker(attacker: Attacker, folder: Path) -> None:
    """Write what was trained for plain diffusers and peft, from rank 0; with an EMA the averages, which are what edits. A collective.

    LoRA: `folder/pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)`. Full fine-tune: `folder/transformer` for
    `QwenImageTransformer2DModel.from_pretrained`.
    """
    lora = bool(attacker.config.lora.rank)
    with attacker.ema.applied() if attacker.ema else nullcontext():
        state = whole_state(attacker.player, trainable_only=lora)
    module = attacker.player.module
    if attacker.runtime.rank == 0 and lora:
        from diffusers import QwenImageEditPipeline

        adapter = {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in state.items()}
        metadata = module.peft_config[ADAPTER].to_dict()  # holds alpha: without it diffusers assumes alpha = rank
        metadata["target_modules"] = sorted(metadata["target_modules"])
        QwenImageEditPipeline.save_lora_weights(folder, transformer_lora_layers=adapter, transformer_lora_adapter_metadata=metadata)
    elif attacker.runtime.rank == 0:
        from huggingface_hub import save_torch_state_dict

        target = folder / "transformer"
        target.mkdir(parents=True, exist_ok=True)
        module.save_config(target)
        save_torch_state_dict(state, target, filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size="10GB")
    attacker.runtime.barrier()
