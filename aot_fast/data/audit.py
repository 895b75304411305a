"""Is the true answer still true in the edited picture? Read from the picture by its scene graph: no SSIM, no Defender.

    found = audit(question, clean, edit)    # found.valid, found.kind, found.objects

1. Objects of the scene whose pixels did not change, or whose own template still fits best, are kept.
2. What else is coloured and has changed falls into connected parts; each is read as the best fitting shape and colour. A part that is
   hardly like a shape is a blob: it may be taken for its best guesses or for nothing; one that is like none, for an object without shape.
3. The answer is valid only if it is true under every combination of those readings, and likely if it is true under the best of each. How
   often this errs: `evaluation/audit_error.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL.Image import Image, Resampling
from skimage.measure import label

from aot_fast.data.scenes import COLORS, SHAPES, Scene, SceneObject, answer_of
from aot_fast.data.schema import Question
from aot_fast.data.templates import PX, Fit, Layers, coverage, fit_shapes, smooth_background, take_apart

KINDS = ("added", "replaced", "removed", "hybrid", "blob", "subtle")
CHANGE = 40.0
"""Mean difference over 3 x 3 px (of 255, light left out) that counts as a change: by the codec alone, one pixel in 10,000 reaches 27."""
COLORED = 0.35
"""Coverage from which a pixel belongs to something coloured; soft grey clutter stays under 0.2."""
MIN_AREA_PX = 8
"""Least part: a 7-px star, the leanest implant, has 15."""
BLOB_AREA_PX = 48
"""From here a blob is as large as a small object, and gives its name to the edit."""
MIN_OBJECT = 0.175
"""Side of what may be called an added object: between the implants meant to be subtle (up to 0.15) and the world's objects (from 0.20)."""
SURE = 0.82
"""Likeness from which a part is an object."""
CLEAR = 0.92
"""Likeness from which its shape is as clear as a rendered one's, which reaches 0.96 after the codec; below, it is half-formed."""
NO_SHAPE = 0.75
"""Likeness below which a part is like no shape at all: worn and through the codec, none of 1,024 drawn objects is under 0.90."""
SHAPELESS = "blob"
"""The shape of such a part: it may pass for a coloured object where no shape is asked for."""
PARTLY = 0.5
"""Likeness from which an object of the scene that is no longer sure may still be there."""
SHAPE_MARGIN = 0.03
"""Other shapes whose likeness comes this close to the best are possible readings too."""
VAGUE_MARGIN = 0.11
"""The same for what is not clear or under `MIN_OBJECT`: of one 7-px star in ten the codec makes a dot, 0.10 more like a circle."""
COLOR_SHARE = 0.2
"""Least share of a part's core for a colour to be a possible reading."""
SAME_PLACE = 0.3
"""IoU of boxes from which a new object stands in the place of an old one."""
MAX_READINGS = 4096
"""Combinations that are looked through; with more, nothing is known, and the edit is not valid."""


@dataclass(frozen=True)
class Audit:
    """What an edit did to the scene."""

    valid: bool
    """Whether the answer is still true, whatever the doubtful objects are taken for: a lower bound where there are many."""
    likely: bool
    """Whether it is still true by the best reading of each."""
    kind: str
    """Attack type. replaced: an object became another one or changed its colour; removed; added; hybrid: more than one of these;
    blob: none of these, but something coloured of an object's size that is like no shape; subtle: the rest (light, texture, specks)."""
    objects: tuple[SceneObject, ...]
    """The edited scene by the best reading."""
    doubtful: tuple[SceneObject, ...]
    """Objects that may be seen in the edit besides, or instead."""


Slot = tuple[SceneObject | None, ...]
"""What one thing in the picture may be taken for, the best first; None is nothing."""


@dataclass(frozen=True)
class Part:
    """Something coloured that has changed, with what it may be taken for."""

    readings: Slot
    area_px: int

    @property
    def best(self) -> SceneObject | None:
        return self.readings[0]


def audit(question: Question, before: Image, after: Image) -> Audit | None:
    """Compare an edit with the scene that its question is about; None for photographs, and for scenes that are not of the small world.

    before, after: the clean picture and the edit, of any size; both are looked at in `PX` pixels a side.
    """
    scene = _scene_of(question)
    if scene is None:
        return None
    old, new = pixels_of(before), pixels_of(after)
    layers = take_apart(new)
    changed = changes(old, new, layers)
    likeness = {item: _likeness_in_place(item, scene, layers, changed) for item in scene.objects}
    kept = [item for item in scene.objects if likeness[item] == 1.0]
    gone = [item for item in scene.objects if item not in kept]
    # A square that became a triangle left pixels that did not change: the place of what is gone is looked at whole.
    parts = find_parts(layers, changed | _places_of(gone), _places_of(kept))
    lost = {item: _lost(item, likeness[item], parts) for item in gone}
    slots = [(item,) for item in kept] + [*lost.values()] + [_unlike(part, [*lost.values()]) for part in parts]
    objects = tuple(slot[0] for slot in slots if slot[0])
    doubtful = tuple(item for slot in slots for item in slot[1:] if item)
    likely = answer_of(replace(scene, objects=objects), question) == question.answer
    return Audit(_holds(scene, question, slots), likely, _kind(lost, parts), objects, doubtful)


def _scene_of(question: Question) -> Scene | None:
    """The question's scene; None unless `render` can draw it and `answer_of` finds the question's answer in it.

    A user's file may hold scene graphs of any form: they must not end a run when its first edit is audited.
    """
    try:
        scene = Scene.from_json(question.scene or {})
        known = all(item.shape in SHAPES and item.color in COLORS for item in scene.objects)
        return scene if known and answer_of(scene, question) == question.answer else None
    except (AttributeError, KeyError, TypeError, StopIteration):
        return None


def pixels_of(image: Image) -> np.ndarray:
    """float32 [PX, PX, 3] in [0, 255]."""
    image = image.convert("RGB")
    return np.asarray(image if image.size == (PX, PX) else image.resize((PX, PX), Resampling.BICUBIC), np.float32)


def changes(old: np.ndarray, new: np.ndarray, layers: Layers) -> np.ndarray:
    """Where the picture has changed by more than its light, bool [H, W]."""
    difference = (new - layers.ground) - (old - smooth_background(old))
    padded = np.pad(difference, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return np.abs(rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]).max(-1) > 9 * CHANGE


def grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its eight neighbours."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


@lru_cache(maxsize=64)
def _place_of(item: SceneObject) -> np.ndarray:
    """Pixels that an object touches, and their neighbours."""
    return grown(coverage(item, PX) > 0.05)


def _places_of(items: Sequence[SceneObject]) -> np.ndarray:
    return np.any([_place_of(item) for item in items] or [np.zeros((PX, PX), bool)], axis=0)


def _likeness_in_place(item: SceneObject, scene: Scene, layers: Layers, changed: np.ndarray) -> float:
    """1 for an object that is surely still there, else how much its place looks like it."""
    if not (changed & _place_of(item)).any():
        return 1.0
    own_place = coverage(item, PX)
    # Neighbours may lie in the margins, but an object's own pixels always speak.
    others = _places_of([other for other in scene.objects if other != item])
    weight = (~others | (own_place > 0)).astype(np.float32)
    side, centre_px = item.size * PX, (item.x * PX, item.y * PX)
    best, second, *rest = fit_shapes(layers.covers[list(COLORS).index(item.color)], weight, centre_px, (0.93 * side, 1.07 * side))
    if best.shape == item.shape and best.likeness >= max(SURE, second.likeness + SHAPE_MARGIN):
        if _colors(layers, own_place > 0.5) == [item.color]:
            return 1.0
    return min(0.99, next(fit.likeness for fit in (best, second, *rest) if fit.shape == item.shape))


def _colors(layers: Layers, mask: np.ndarray) -> list[str]:
    """Colours that a part may be said to have, the largest share first; its pale margin does not count."""
    cover = layers.cover[mask]
    core = mask & (layers.cover >= 0.7 * np.quantile(cover, 0.8))
    share = (layers.covers[:, core] > 0).mean(1)
    votes = np.bincount(layers.color[core], minlength=len(share)) / max(1, core.sum())
    first, *others = np.argsort(-votes, kind="stable")
    return [list(COLORS)[c] for c in (first, *others) if c == first or share[c] >= COLOR_SHARE]


def _fits(layers: Layers, cover: np.ndarray, mask: np.ndarray, other: np.ndarray) -> list[Fit]:
    """Shapes fitted to a part; pixels of `other` things speak for nothing."""
    rows, columns = np.nonzero(mask)
    low, high = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
    side = max(high[0] - low[0], high[1] - low[1])
    core = max(COLORED, float(np.quantile(cover[mask], 0.8)))
    weight = (~(grown(other) & ~mask)).astype(np.float32)
    centre = ((low[0] + high[0]) / 2, (low[1] + high[1]) / 2)
    return fit_shapes((cover / core).clip(0, 1), weight, centre, (0.8 * side, 1.25 * side))


def _read(fits: list[Fit], colors: list[str], mask: np.ndarray) -> Part:
    """What a fitted part may be taken for."""
    if fits[0].likeness < NO_SHAPE:
        return Part((None, *(replace(fits[0].item(color), shape=SHAPELESS) for color in colors)), int(mask.sum()))
    sure = fits[0].likeness >= SURE
    clear = fits[0].likeness >= CLEAR and fits[0].size >= MIN_OBJECT
    margin = SHAPE_MARGIN if clear else VAGUE_MARGIN
    close = [fit for fit in fits if fit.likeness >= fits[0].likeness - margin]
    items = tuple(fit.item(color) for fit in close for color in colors)
    return Part(items if sure else (None, *items), int(mask.sum()))


def find_parts(layers: Layers, changed: np.ndarray, taken: np.ndarray) -> list[Part]:
    """Coloured parts of the picture where it has `changed`, outside the places that are `taken` by the objects kept."""
    free, parts = (layers.cover > COLORED) & ~taken, []
    while True:
        whole = label(free, connectivity=2)
        sizes, touched = np.bincount(whole.ravel()), np.bincount(whole[changed], minlength=whole.max() + 1)
        found = [k for k in range(1, len(sizes)) if touched[k] >= MIN_AREA_PX]
        if not found:
            return parts
        mask = whole == found[0]
        part, used = _best_part(layers, mask, ((layers.cover > COLORED) & ~mask) | taken)
        parts.append(part)
        free &= ~used


def _best_part(layers: Layers, mask: np.ndarray, other: np.ndarray) -> tuple[Part, np.ndarray]:
    """The best reading of a connected part, or of one colour in it, and the pixels it explains."""
    colors = _colors(layers, mask)
    fits = _fits(layers, layers.cover, mask, other)
    best, best_mask, best_colors = fits, mask, colors
    if len(colors) > 1:
        # Two objects that touch are one part; neither of them fits the whole, each fits its own colour.
        pieces = label(np.where(mask, layers.color + 1, 0), connectivity=2)
        for k in range(1, pieces.max() + 1):
            piece = pieces == k
            if piece.sum() < max(MIN_AREA_PX, COLOR_SHARE * mask.sum()):
                continue
            c = int(layers.color[piece][0])
            piece_fits = _fits(layers, np.where(grown(piece), layers.covers[c], 0), piece, other)
            if piece_fits[0].likeness > max(SURE, best[0].likeness):
                best, best_mask, best_colors = piece_fits, piece, [list(COLORS)[c]]
    used = mask if best_mask is mask else _place_of(best[0].item(best_colors[0])) | best_mask
    return _read(best, best_colors, best_mask), used


def _same_place(a: SceneObject, b: SceneObject) -> bool:
    """Whether the boxes of two objects have an IoU of `SAME_PLACE`."""
    (ax, ay, side, _), (bx, by, other, _) = a.box, b.box
    width = min(ax + side, bx + other) - max(ax, bx)
    height = min(ay + side, by + other) - max(ay, by)
    common = max(0.0, width) * max(0.0, height)
    return common >= SAME_PLACE * (side**2 + other**2 - common)


def _successor(item: SceneObject, parts: Sequence[Part]) -> SceneObject | None:
    """The sure object that stands where `item` stood."""
    return next((part.best for part in parts if part.best and _same_place(part.best, item)), None)


def _lost(item: SceneObject, likeness: float, parts: Sequence[Part]) -> Slot:
    """Readings of an object that is not surely there."""
    if likeness < PARTLY or _successor(item, parts):
        return (None,)
    return (item, None)


def _unlike(part: Part, lost: Sequence[Slot]) -> Slot:
    """A part's readings without those that are an old object which may still be there: one of them, not two."""
    old = [slot[0] for slot in lost if slot[0]]
    kept = tuple(new for new in part.readings if not new or not any(new.name == item.name and _same_place(new, item) for item in old))
    return kept or (None,)


def _holds(scene: Scene, question: Question, slots: Sequence[Slot]) -> bool:
    """Whether the answer is true under every combination of readings."""
    # What has neither a shape nor a colour that the question names cannot change the answer: it is the same as nothing.
    words = question.question
    slots = [{item if item and (item.shape in words or item.color in words) else None for item in slot} for slot in slots]
    if math.prod(map(len, slots)) > MAX_READINGS:
        return False
    scenes = (replace(scene, objects=tuple(filter(None, objects))) for objects in itertools.product(*slots))
    return all(answer_of(edited, question) == question.answer for edited in scenes)


def _kind(lost: Mapping[SceneObject, Slot], parts: Sequence[Part]) -> str:
    """The attack type by the best readings."""
    kinds, gone = set(), [item for item, slot in lost.items() if slot[0] is None]
    for item in gone:
        new = _successor(item, parts)
        if new is None or new.name != item.name:
            kinds.add("replaced" if new else "removed")
    large = [part.best for part in parts if part.best and part.best.size >= MIN_OBJECT]
    if any(not any(_same_place(new, item) for item in lost) for new in large):
        kinds.add("added")
    if kinds:
        return "hybrid" if len(kinds) > 1 else kinds.pop()
    return "blob" if any(part.best is None and part.area_px >= BLOB_AREA_PX for part in parts) else "subtle"
