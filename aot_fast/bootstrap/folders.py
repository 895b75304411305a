"""The small tokenizer, and model folders in the layouts of Qwen2.5-VL and of Qwen-Image-Edit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from aot_fast.data.scenes import COLORS, SHAPES, plural
from aot_fast.data.schema import LETTERS, edit_prompt, question_text

SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
"""Qwen2.5-VL's, in its order, but first in the vocabulary."""

EDIT_SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how the user's "
    "text instruction should alter or modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate."
)
"""System turn of diffusers' QwenImageEditPipeline.prompt_template_encode."""
EDIT_PREFIX = f"<|im_start|>system\n{EDIT_SYSTEM}<|im_end|>\n<|im_start|>user\n"
EDIT_TEMPLATE = EDIT_PREFIX + "<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
EDIT_PREFIX_TOKENS = 64
"""The pipeline drops this many tokens of its template, by count: `EDIT_PREFIX` has to be that long in any tokenizer."""

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL-7B-Instruct's."""

PATCH_PX = 8
IMAGE_PX = 64
MAX_IMAGE_PX = 128
"""Larger pictures are shrunk to this square's area: a small model sees a photograph as 64 tokens."""


def _lexicon() -> list[str]:
    """Texts whose every word becomes one token."""
    names = [*COLORS, *SHAPES, *(plural(s) for s in SHAPES), "object", "objects", "yes", "no", "left", "right", "of", "above", "below"]
    questions = [
        "What color is the star?\nWhat shape is the red object?\nIs the red circle left of or right of the blue star?",
        "Is the red circle above or below the blue star?\nIs there a red circle in the picture?\nHow many circles are there?",
    ]
    frames = [
        EDIT_PREFIX,
        "You are a helpful assistant.",
        "assistant\n",
        edit_prompt(""),
        question_text("", ["a"]),
        question_text("", None),
    ]
    frames += [" ", "\n", ".", ",", "?", "!", ":", "Picture 1: ", "Video 1: ", "and or more less not an a the with"]
    letters = [f"\n{letter}. {letter} \\boxed{{{letter}}}" for letter in LETTERS]
    words = [f"{name} {name} \\boxed{{{name}}}" for name in (*names, *"0123456789")]
    return questions + frames + letters + words


def build_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE with a vocabulary in which each word of the small world is one token; any text encodes."""
    model = Tokenizer(BPE())
    model.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    # With room to spare the trainer merges until every word of the lexicon is whole.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=8192, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    texts = [piece for text in _lexicon() for piece in _without_specials(text)]
    model.train_from_iterator(texts, trainer)
    state = json.loads(model.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(pair) for pair in state["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        padding_side="left",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
    )
    return tokenizer


def _without_specials(text: str) -> list[str]:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\0")
    return [piece for piece in text.split("\0") if piece]


def image_processor() -> Qwen2VLImageProcessorPil:
    """Cuts a 64-px picture into 8 x 8 patches of 8 px: 16 image tokens."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": IMAGE_PX**2, "longest_edge": MAX_IMAGE_PX**2}, patch_size=PATCH_PX, temporal_patch_size=2, merge_size=2
    )


def save_processor(folder: Path) -> None:
    """Tokenizer, chat template and image processor, as the full Qwen2.5-VL processor saves them."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    # Named as in the published folder, so that both the torchvision and the PIL class of the library accept it.
    config |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_defender(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """A folder of a Qwen2.5-VL or Qwen3-VL; the model itself is left as it is."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(dtype).save_pretrained(folder)
    save_processor(folder)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image-Edit's schedule, with its published numbers."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def _forget_origin(path: Path) -> None:
    """Drop the folder that a model was once loaded from: a path of the machine that trained it."""
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def save_attacker(
    transformer: QwenImageTransformer2DModel,
    vae: AutoencoderKLQwenImage,
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    folder: Path,
    dtype: torch.dtype = torch.float16,
) -> None:
    """A Qwen-Image-Edit pipeline folder, component by component: the pipeline object needs torchvision, its parts do not."""
    for name, model in (("transformer", transformer), ("vae", vae)):
        copy = type(model).from_config(model.config)
        copy.load_state_dict(model.state_dict())
        copy.to(dtype).save_pretrained(folder / name)
        _forget_origin(folder / name / "config.json")
    save_defender(text_encoder, folder / "text_encoder", dtype)
    for path in (folder / "text_encoder").iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            path.unlink()
    build_tokenizer().save_pretrained(folder / "tokenizer")
    save_processor(folder / "processor")
    scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "QwenImageEditPipeline",
        "_diffusers_version": "0.42.1",
        "processor": ["transformers", "Qwen2VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
