"""The small Defender's answers through the library's own `generate`, and how many are right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from aot_fast.bootstrap.exchanges import branch_text, judge_question
from aot_fast.bootstrap.folders import IMAGE_PX, build_tokenizer, image_processor
from aot_fast.bootstrap.rows import prefix_text
from aot_fast.data.answers import score
from aot_fast.data.scenes import (
    ASKED,
    COLORS,
    COMPANION,
    SHAPES,
    SPLITS,
    Scene,
    SceneObject,
    answer_of,
    make_question,
    render,
    roomiest_place,
    sample_question,
    sample_scene,
)
from aot_fast.data.schema import LETTERS, Question

SHORTCUT_SIZE = 0.25


def chat_inputs(
    tokenizer: Qwen2Tokenizer, images: Sequence[Image.Image], texts: Sequence[str], image_token_id: int, padding_side: str = "left"
) -> dict[str, Tensor]:
    """Model inputs for prompts with one <|image_pad|> each."""
    pixels = image_processor()(list(images), return_tensors="pt")
    counts = (pixels["image_grid_thw"].prod(-1) // 4).tolist()
    expanded = [text.replace("<|image_pad|>", "<|image_pad|>" * count) for text, count in zip(texts, counts)]
    inputs = tokenizer(expanded, padding=True, padding_side=padding_side, return_tensors="pt")
    return {**inputs, **pixels, "mm_token_type_ids": (inputs["input_ids"] == image_token_id).long()}


@torch.no_grad()
def greedy_answers(model: Qwen2_5_VLForConditionalGeneration, images: Sequence[Image.Image], questions: Sequence[Question]) -> list[str]:
    """Responses at temperature 0, through the library's own `generate`."""
    tokenizer, answers = build_tokenizer(), []
    for start in range(0, len(questions), 100):
        part = slice(start, start + 100)
        texts = [prefix_text(1) + branch_text(question) for question in questions[part]]
        inputs = chat_inputs(tokenizer, images[part], texts, model.config.image_token_id)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return answers


def right_answers(model: Qwen2_5_VLForConditionalGeneration, images: Sequence[Image.Image], questions: Sequence[Question]) -> Tensor:
    """Whether each greedy response is right, [N]."""
    answers = greedy_answers(model, images, questions)
    return torch.tensor([score(question, answer).correct for question, answer in zip(questions, answers)], dtype=torch.bool)


def accuracy_by_kind(model: Qwen2_5_VLForConditionalGeneration, split: str, num_questions: int) -> dict[str, float]:
    """Greedy accuracy on multiple-choice questions about clean scenes, in all and by kind."""
    pairs = [make_question(split, index, IMAGE_PX) for index in range(num_questions)]
    questions = [question for _, question in pairs]
    right = right_answers(model, [render(scene, IMAGE_PX) for scene, _ in pairs], questions).float()
    scores = {"all": right.mean().item()}
    for kind in sorted({question.kind for question in questions}):
        scores[kind] = right[torch.tensor([question.kind == kind for question in questions])].mean().item()
    return scores


def look_alike_metrics(model: Qwen2_5_VLForConditionalGeneration, split: str, num_scenes: int) -> dict[str, float]:
    """Share of right greedy answers where objects share colours and shapes: to the judge's counts, and to the world's questions."""
    seeds = SPLITS[split][:num_scenes]
    scenes = [sample_scene(seed, alike=True) for seed in seeds]
    counts = [judge_question(scene, random.Random(f"judge {seed}"), alike=True) for seed, scene in zip(seeds, scenes)]
    asked = [
        sample_question(scene, random.Random(f"alike {seed}"), IMAGE_PX, mix=replace(ASKED, alike=True))
        for seed, scene in zip(seeds, scenes)
    ]
    pictures = [render(scene, IMAGE_PX) for scene in scenes]
    return {
        "counts_look_alikes": right_answers(model, pictures, counts).float().mean().item(),
        "answers_look_alikes": right_answers(model, pictures, asked).float().mean().item(),
    }


def shortcut_metrics(model: Qwen2_5_VLForConditionalGeneration, split: str, num_questions: int) -> dict[str, float]:
    """How many "is there" questions answered with a right no get another answer once an object is drawn in: of the world's companion colour
    (`fooled_by_companion`), of another (`fooled_by_others`). Neither shares a word with what is asked for: the true answer stays no."""
    drawn: dict[str, list[Scene]] = {"clean": [], "companion": [], "others": []}
    questions = []
    for index in range(num_questions):
        scene, question = make_question(split, index, IMAGE_PX)
        named = question.target_names[0].split()
        if question.kind != "existence" or question.options[LETTERS.index(question.answer)] != "no" or COMPANION in named:
            continue
        rng = random.Random(f"shortcut {index}")
        shape = rng.choice([word for word in SHAPES if word not in named])
        other = rng.choice([word for word in COLORS if word not in (*named, COMPANION)])
        place = roomiest_place([item.box for item in scene.objects], SHORTCUT_SIZE, rng)
        assert place, "a scene leaves room for one more object"
        questions.append(question)
        drawn["clean"].append(scene)
        for name, color in (("companion", COMPANION), ("others", other)):
            drawn[name].append(replace(scene, objects=(*scene.objects, SceneObject(shape, color, SHORTCUT_SIZE, *place))))
            assert answer_of(drawn[name][-1], question) == question.answer
    right = {name: right_answers(model, [render(scene, IMAGE_PX) for scene in scenes], questions) for name, scenes in drawn.items()}
    return {f"fooled_by_{name}": (~right[name])[right["clean"]].float().mean().item() for name in ("companion", "others")}
