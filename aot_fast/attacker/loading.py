"""Load a Qwen-Image-Edit pipeline folder: the transformer partitioned over ranks, everything else plain and frozen.

diffusers' own `from_pretrained` fails under `zero.Init` (it sees parameters of shape [0]). So the transformer is built from its
config under `zero.Init`, and each rank fills its slice of every parameter from its own byte range of the safetensors files: no
communication, and no rank ever holds the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from aot_fast.config import AttackerConfig, EngineConfig
from aot_fast.engine import Runtime, zero_config
from aot_fast.models import model_folder

PIPELINES = {"QwenImageEditPipeline": False, "QwenImageEditPlusPipeline": True}
"""Class in model_index.json -> whether it is the Plus pipeline ("Picture 1:" template)."""
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"


def find_pipeline(config: AttackerConfig) -> Path:
    """The local pipeline folder of `config.model`. Raises ValueError when there is none."""
    folder = model_folder(config.model, config.revision, "attacker.model")
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"attacker.model = {config.model!r}: {folder} has no model_index.json; give a pipeline folder in the diffusers layout"
        )
    return folder


def is_plus(folder: Path) -> bool:
    """Whether the folder holds an Edit-Plus pipeline. Raises ValueError for any other class."""
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    if name not in PIPELINES:
        raise ValueError(f"attacker.model: {folder} is a {name}; supported: {', '.join(PIPELINES)}")
    return PIPELINES[name]


def partitioned_transformer(folder: Path, config: AttackerConfig, engine: EngineConfig, runtime: Runtime) -> nn.Module:
    """`folder`'s QwenImageTransformer2DModel, of which this rank holds its ZeRO-3 slice. Raises ValueError naming bad weights."""
    from diffusers import QwenImageTransformer2DModel

    settings = QwenImageTransformer2DModel.load_config(folder)
    if settings.get("guidance_embeds"):
        raise ValueError(f"attacker.model: {folder} is guidance-distilled (guidance_embeds); its guidance input is not supported")
    model = fresh_transformer(settings, config, engine, runtime)
    fill(model, folder, runtime.rank)
    return model


def fresh_transformer(settings: Mapping[str, Any], config: AttackerConfig, engine: EngineConfig, runtime: Runtime) -> nn.Module:
    """A QwenImageTransformer2DModel of `settings` as its constructor starts it, of which this rank holds its ZeRO-3 slice."""
    import deepspeed
    from diffusers import QwenImageTransformer2DModel

    # The precision has to come through the DeepSpeed config: zero.Init(dtype=torch.float32) alone gives bf16 on a CPU.
    with deepspeed.zero.Init(config_dict_or_path=zero_config(engine, runtime, config.optimizer)):
        return QwenImageTransformer2DModel.from_config(settings)


def fill(model: nn.Module, folder: Path, rank: int) -> None:
    """Copy this rank's slices into every `param.ds_tensor`. Raises ValueError on missing, extra or misshapen names."""
    files = tensor_files(folder)
    names = {name for name, _ in model.named_parameters()}
    missing, extra = sorted(names - files.keys()), sorted(files.keys() - names)
    if missing or extra:
        raise ValueError(f"{folder}: weights do not match its config.json; missing: {missing or 'none'}; extra: {extra or 'none'}")
    opened: dict[Path, Any] = {}
    for name, parameter in model.named_parameters():
        path = files[name]
        if path not in opened:
            opened[path] = safe_open(path, "pt")
        shape = tuple(opened[path].get_slice(name).get_shape())
        if shape != tuple(parameter.ds_shape):
            raise ValueError(f"{path.name}: {name} has shape {shape}, its config.json asks for {tuple(parameter.ds_shape)}")
        size = parameter.ds_tensor.numel()
        mine = read_range(opened[path], name, rank * size, (rank + 1) * size)
        parameter.ds_tensor.data.zero_()  # the last rank's slice may be padded
        parameter.ds_tensor.data[: mine.numel()].copy_(mine)  # casts: bundled weights are fp16


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, for a single file or a sharded folder. Raises ValueError when there is neither."""
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    if not (folder / SINGLE).is_file():
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")
    with safe_open(folder / SINGLE, "pt") as weights:
        return dict.fromkeys(weights.keys(), folder / SINGLE)


def read_range(weights: Any, name: str, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened tensor, cut at its end; reads only the rows that hold them."""
    view = weights.get_slice(name)
    shape = view.get_shape()
    total = torch.Size(shape).numel()
    start, stop = min(start, total), min(stop, total)
    if start == stop or not shape:
        return weights.get_tensor(name).flatten()[start:stop]
    row = max(1, total // shape[0])  # elements of one row
    first = start // row
    return view[first : -(-stop // row)].flatten()[start - first * row : stop - first * row]


@contextmanager
def without_hf_deepspeed() -> Iterator[None]:
    """Hide a living HfDeepSpeedConfig (the Defender's), under which transformers would partition every model it builds."""
    from transformers.integrations import deepspeed as state

    kept = state._hf_deepspeed_config_weak_ref  # there is an unset function, but no public way to put the same object back
    state.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        state._hf_deepspeed_config_weak_ref = kept


def frozen_parts(folder: Path, runtime: Runtime) -> dict[str, Any]:
    """vae, text_encoder, tokenizer, image_processor and scheduler, whole on every rank, in eval mode, without gradients."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    with without_hf_deepspeed():
        text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=runtime.dtype)
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=runtime.dtype)
    vae.to(runtime.device)  # the text encoder comes when it is needed: Attacker.encoders
    for model in (vae, text_encoder):
        model.eval().requires_grad_(False)
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "image_processor": Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    }
