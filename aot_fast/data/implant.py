"""Distractors implanted by rule: the pairs (clean scene, edited scene) that the Attacker is cold-started on.

AOT-SFT lets a language model propose distractors and an inpainter draw them; here the scene graph does both, with the same checks: no
overlap with a target, no second instance of a target, the true answer stays true.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aot_fast.data.scenes import COLORS, SHAPES, SIZES, Scene, SceneObject, answer_of, overlaps, roomiest_place
from aot_fast.data.schema import Box, Question, edit_prompt

KINDS = {"added": 0.7, "subtle": 0.1, "replaced": 0.1, "recolored": 0.05, "removed": 0.05}
"""Share of each kind of edit; `subtle` adds a small object. What needs an object besides the targets falls back to `added`."""
SUBTLE_SIZES = (0.11, 0.15)
TRIES_PER_KIND = 8
LURE_SHARE = 0.3
"""Of new objects that share a word with what the question names."""


@dataclass(frozen=True)
class Implant:
    """An edited scene and the instruction that leads to it."""

    scene: Scene
    prompt: str
    kind: str
    changed_boxes: tuple[Box, ...]
    """Fractions of the picture's side: where the edit may be seen."""


def matches(item: SceneObject, name: str) -> bool:
    """Whether an object answers to a target's name: "star", "red object" or "red star"."""
    return all(word in (item.shape, item.color, "object") for word in name.split())


def target_objects(scene: Scene, question: Question, size_px: int) -> list[SceneObject]:
    """The objects whose boxes the question names as targets; `size_px` is the size for which its boxes were computed."""
    return [item for item in scene.objects if item.pixel_box(size_px) in question.target_boxes]


def keeps_question(scene: Scene, question: Question, new: Sequence[SceneObject]) -> bool:
    """Whether the answer is still true and no new object can be taken for a target."""
    return answer_of(scene, question) == question.answer and not any(matches(item, name) for item in new for name in question.target_names)


def _distractor_name(question: Question, rng: random.Random) -> tuple[str, str]:
    """(shape, color): most share no word with what the question names, some its colour or its shape.

    Which of them deceive is for the game to find out: a cold start on lures alone would leave the Attacker nothing to learn.
    """
    named = {word for name in question.target_names for word in name.split()}
    lures = sorted(named & {*SHAPES, *COLORS})
    shape = rng.choice([word for word in SHAPES if word not in named])
    color = rng.choice([word for word in COLORS if word not in named])
    if lures and rng.random() < LURE_SHARE:
        lure = rng.choice(lures)
        shape, color = (lure, color) if lure in SHAPES else (shape, lure)
    return shape, color


def _add(scene: Scene, question: Question, sizes: tuple[float, float], rng: random.Random) -> tuple[Scene, list[SceneObject], list[Box]]:
    size = round(rng.uniform(*sizes), 4)
    # Where there is most room: were every free place as likely, a small editor would have to agree with itself on one, and draws blobs.
    place = roomiest_place([item.box for item in scene.objects], size, rng)
    if place is None:
        return scene, [], []
    item = SceneObject(*_distractor_name(question, rng), size, *place)
    return replace(scene, objects=(*scene.objects, item)), [item], [item.box]


def _change(
    scene: Scene, question: Question, targets: list[SceneObject], kind: str, rng: random.Random
) -> tuple[Scene, list[SceneObject], list[Box]]:
    """Replace, recolour or remove an object that is no target."""
    others = [item for item in scene.objects if item not in targets]
    if not others:
        return scene, [], []
    old = rng.choice(others)
    kept = tuple(item for item in scene.objects if item is not old)
    if kind == "removed":
        return replace(scene, objects=kept), [], [old.box]
    shape, color = _distractor_name(question, rng)
    new = replace(old, color=color, shape=old.shape if kind == "recolored" else shape)
    return replace(scene, objects=(*kept, new)), [new] if new != old else [], [old.box]


def implant(scene: Scene, question: Question, rng: random.Random, size_px: int) -> Implant:
    """A random distractor edit of `scene` that keeps the targets of `question` and its answer."""
    targets = target_objects(scene, question, size_px)
    kind = rng.choices(list(KINDS), KINDS.values())[0]
    tries = 0
    while True:
        tries += 1
        kind = kind if tries <= TRIES_PER_KIND else "added"
        if kind in ("added", "subtle"):
            edited, new, boxes = _add(scene, question, SIZES if kind == "added" else SUBTLE_SIZES, rng)
        else:
            edited, new, boxes = _change(scene, question, targets, kind, rng)
        # Nothing new is right for a removal only; otherwise the try found no room or no object to change.
        if boxes and (new or kind == "removed") and keeps_question(edited, question, new):
            assert not any(overlaps(box, item.box, 0.0) for box in boxes for item in targets)
            return Implant(edited, edit_prompt(question.question), kind, tuple(boxes))
