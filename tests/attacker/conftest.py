"""Fixtures of the Attacker's tests: tiny pipelines on disk, loaded Attackers, diffusers' own pipeline beside them."""

from dataclasses import replace

import pytest
import torch

from aot_fast.config import EngineConfig
from tests.attacker.tiny_pipeline import BASE, make_pipeline, perturb


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """`edit` in one file and `plus` in shards."""
    root = tmp_path_factory.mktemp("pipelines")
    return {"edit": make_pipeline(root / "edit"), "plus": make_pipeline(root / "plus", plus=True, max_shard_size="200KB")}


@pytest.fixture(scope="session")
def base_config(folders):
    return replace(BASE, model=str(folders["edit"]))


@pytest.fixture(scope="session")
def load(runtime):
    """`load(config, seed=None)`: an Attacker; with a seed its trained weights are set off by small noise.

    Without adapter and seed the model is shared between tests, which must not train it.
    """
    from aot_fast.attacker.model import load_attacker

    kept = {}

    def loaded(config, seed=None):
        key = (config.model, config.optimizer, config.still_vae)
        if config.lora.rank or config.beta or seed is not None or key not in kept:
            attacker = load_attacker(config, EngineConfig(), runtime)
            if seed is not None:
                perturb(attacker.player, seed)
                return attacker
            if config.lora.rank:
                return attacker
            kept[key] = attacker
        return replace(kept[key], config=config)

    return loaded


@pytest.fixture(scope="session")
def pipeline(folders):
    """`pipeline(kind)`: diffusers' own pipeline over the same folder."""
    return {kind: plain_pipeline(folder, kind == "plus") for kind, folder in folders.items()}


def plain_pipeline(folder, plus):
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageEditPipeline,
        QwenImageEditPlusPipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    kind = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    made = kind(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=tokenizer,
        processor=StandInProcessor(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")),
        transformer=QwenImageTransformer2DModel.from_pretrained(folder / "transformer"),
    )
    made.set_progress_bar_config(disable=True)
    return made


class StandInProcessor:
    """Qwen2VLProcessor without torchvision, written apart from the product: inserts the pictures' tokens after tokenising."""

    def __init__(self, tokenizer, images):
        self.tokenizer, self.images = tokenizer, images

    def __call__(self, text, images, padding, return_tensors):
        from transformers import BatchFeature

        images = images if isinstance(images, list) else [images]
        pixels = self.images(images=images, return_tensors="pt")
        pad, counts = self.tokenizer.convert_tokens_to_ids("<|image_pad|>"), iter(pixels["image_grid_thw"].prod(-1) // 4)
        rows = [[i for token in self.tokenizer(t)["input_ids"] for i in [token] * (next(counts) if token == pad else 1)] for t in text]
        ids = torch.tensor(rows)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels})
