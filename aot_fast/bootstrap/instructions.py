"""What an editing model learns before anybody turns it into an Attacker: to do what it is told.

Trained on these alone, the small editor stands for the untrained Qwen-Image-Edit of the paper, whose failure it shares: asked to mislead
a model that answers "What color is the star?", it adds a star (AOT_FACTS: a second instance of the queried object).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from aot_fast.data.scenes import COLORS, SHAPES, SIZES, Scene, SceneObject, roomiest_place

KINDS = {"add": 0.7, "remove": 0.12, "replace": 0.18}
"""Share of each kind; what a scene has no room for is drawn again."""


@dataclass(frozen=True)
class Instruction:
    """A scene, what was asked, and the scene after it."""

    prompt: str
    scene: Scene


def _add(scene: Scene, rng: random.Random) -> Instruction | None:
    size = round(rng.uniform(*SIZES), 4)
    place = roomiest_place([item.box for item in scene.objects], size, rng)
    if place is None:
        return None
    item = SceneObject(rng.choice(SHAPES), rng.choice(list(COLORS)), size, *place)
    # Named in full, or by one word only: the rest is then the editor's to choose.
    asked = rng.choices((item.name, item.shape, f"{item.color} object"), (0.6, 0.25, 0.15))[0]
    return Instruction(f"Add a {asked}.", replace(scene, objects=(*scene.objects, item)))


def _remove(scene: Scene, old: SceneObject, kept: tuple[SceneObject, ...], rng: random.Random) -> Instruction:
    return Instruction(f"Remove the {old.name}.", replace(scene, objects=kept))


def _replace(scene: Scene, old: SceneObject, kept: tuple[SceneObject, ...], rng: random.Random) -> Instruction | None:
    new = replace(old, shape=rng.choice(SHAPES), color=rng.choice(list(COLORS)))
    if new == old:
        return None
    return Instruction(f"Replace the {old.name} by a {new.name}.", replace(scene, objects=(*kept, new)))


def instruct(scene: Scene, rng: random.Random) -> Instruction:
    """A random instruction that names what it is about without doubt, and its result."""
    while True:
        kind = rng.choices(list(KINDS), KINDS.values())[0]
        old = rng.choice(scene.objects)
        kept = tuple(item for item in scene.objects if item is not old)
        if kind == "add":
            made = _add(scene, rng)
        elif any(item.name == old.name for item in kept):
            made = None
        else:
            made = {"remove": _remove, "replace": _replace}[kind](scene, old, kept, rng)
        if made:
            return made
