"""The small world: seeded scenes of coloured shapes, drawn at any size, with questions whose true answer is known.

    python -c "from aot_fast.data.scenes import write_world; write_world('world', 'heldout', 100, 64)"

Coordinates of a scene are fractions of the picture's side; only `render` and `Question.target_boxes` are in pixels.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from aot_fast.data.schema import LETTERS, Box, Question

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (216, 40, 44),
    "orange": (240, 138, 24),
    "yellow": (232, 204, 40),
    "green": (44, 160, 72),
    "blue": (44, 84, 214),
    "purple": (138, 52, 172),
    "pink": (240, 120, 186),
    "black": (40, 42, 48),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")


@dataclass(frozen=True)
class Mix:
    """What is asked how often; a kind that a scene cannot carry is drawn again."""

    kinds: Mapping[str, float]
    absent: float
    """Share of "is there" and "how many" that ask for what is not there, before those without a clear answer are drawn again."""
    biased: bool = False
    """Never ask for what is not there where something is of `COMPANION`."""
    alike: bool = False
    """Ask also where only colour and shape together tell what is meant (`told_by_one_word`)."""


ASKED = Mix({"attribute": 0.05, "relation": 0.07, "existence": 0.58, "counting": 0.3}, absent=0.9, biased=True)
"""The world's questions. Most ask whether something is there: what vision-language models are first to hallucinate (POPE, arXiv
2305.10355), and where an edit can deceive without touching what decides."""
COMPANION = "red"
"""The world's bias, as every data set has its own: what is asked for beside something red is there. Who learns from its pictures may
learn to say yes to red instead of looking (a shortcut: Geirhos et al., arXiv 2004.07780), and no clean picture shows the mistake; an
edit does."""

SPLITS = {
    "train": range(0, 10_000_000),
    "bootstrap": range(20_000_000, 30_000_000),
    "validation": range(30_000_000, 40_000_000),
    "heldout": range(40_000_000, 50_000_000),
}
"""Disjoint seeds: `train` for the game, `bootstrap` to train the small players, `validation` to tune, `heldout` for published figures only.

10,000,000 to 20,000,000 is retired: settings were chosen by looking at it.
"""

SIZES = (0.20, 0.30)
"""Side of an object: 13 to 19 px of 64, so that a codec with 4x downsampling keeps its outline."""
GAP = 0.03
"""Least distance between the boxes of two objects."""
RELATION_MARGIN = 0.16
"""Least difference of the centres along the axis that a relation asks about."""
SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape that fills a square box."""

    shape: str
    color: str
    size: float
    """Side of the box."""
    x: float
    """Centre."""
    y: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> Box:
        """[x, y, w, h] as fractions of the picture's side."""
        return (self.x - self.size / 2, self.y - self.size / 2, self.size, self.size)

    def pixel_box(self, size_px: int) -> Box:
        """[x, y, w, h] in whole pixels, rounded outwards."""
        left, top = (math.floor(c * size_px) for c in self.box[:2])
        right, bottom = (math.ceil((c + self.size) * size_px) for c in self.box[:2])
        return (left, top, right - left, bottom - top)


@dataclass(frozen=True)
class Background:
    """A gradient between two pale colours with faint waves over it: low frequencies only, for the codec must reproduce it."""

    start: tuple[float, float, float]
    """RGB in [0, 1]."""
    end: tuple[float, float, float]
    angle: float
    """Direction of the gradient, radians."""
    wave: tuple[float, float, float, float]
    """Periods across, periods down, phase, amplitude."""


@dataclass(frozen=True)
class Spot:
    """Clutter: a soft grey patch that no question is about."""

    x: float
    y: float
    radius: float
    shade: float
    """Added brightness at the centre, in [-1, 1]."""


@dataclass(frozen=True)
class Scene:
    """Everything that is in a picture."""

    background: Background
    clutter: tuple[Spot, ...]
    objects: tuple[SceneObject, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Scene:
        """Inverse of `to_json`, also after a trip through a JSON file."""
        ground = {name: tuple(value) if isinstance(value, list) else value for name, value in data["background"].items()}
        return Scene(
            background=Background(**ground),
            clutter=tuple(Spot(**spot) for spot in data["clutter"]),
            objects=tuple(SceneObject(**item) for item in data["objects"]),
        )


def _star() -> list[tuple[float, float]]:
    turns = [(math.pi * k / 5, 1.0 if k % 2 == 0 else 0.45) for k in range(10)]
    return [(r * math.sin(a), -r * math.cos(a)) for a, r in turns]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * k / 40 for k in range(40)]
    points = [(16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in turns]
    return [(x, -y) for x, y in points]


POLYGONS = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "cross": [(-a, -b) for a, b in [(0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36)]]
    + [(a, b) for a, b in [(0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36)]],
    "star": _star(),
    "heart": _heart(),
}


def _outline(shape: str, left: float, top: float, side: float) -> list[tuple[float, float]]:
    """The polygon stretched so that it touches all four sides of its box."""
    xs, ys = zip(*POLYGONS[shape])
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    return [(left + (x - min(xs)) / width * side, top + (y - min(ys)) / height * side) for x, y in zip(xs, ys)]


def _object_mask(item: SceneObject, size_px: int) -> tuple[Image.Image, tuple[int, int]]:
    """Antialiased coverage of one object and the pixel at which it is pasted."""
    left, top, width, height = item.pixel_box(size_px)
    mask = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    pen = ImageDraw.Draw(mask)
    side = item.size * size_px * SUPERSAMPLING - 1
    x, y = ((c * size_px - corner) * SUPERSAMPLING for c, corner in zip(item.box[:2], (left, top)))
    if item.shape in POLYGONS:
        pen.polygon(_outline(item.shape, x, y, side), fill=255)
    else:
        pen.ellipse((x, y, x + side, y + side), fill=255)
    if item.shape == "ring":
        inset = 0.27 * side
        pen.ellipse((x + inset, y + inset, x + side - inset, y + side - inset), fill=0)
    return mask.reduce(SUPERSAMPLING), (left, top)


@lru_cache(maxsize=4)
def _pixel_grid(size_px: int) -> tuple[np.ndarray, np.ndarray]:
    centres = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
    return centres[None, :], centres[:, None]


def _render_ground(scene: Scene, size_px: int) -> np.ndarray:
    """Background and clutter, uint8 [size, size, 3]."""
    x, y = _pixel_grid(size_px)
    ground = scene.background
    across, down, phase, amplitude = ground.wave
    blend = 0.5 + (x - 0.5) * math.cos(ground.angle) + (y - 0.5) * math.sin(ground.angle)
    light = amplitude * np.sin(2 * math.pi * (across * x + down * y) + phase)
    for spot in scene.clutter:
        light = light + spot.shade * np.exp(-(((x - spot.x) ** 2) + (y - spot.y) ** 2) / (2 * spot.radius**2))
    start, end = (np.array(c, dtype=np.float32) for c in (ground.start, ground.end))
    pixels = start + blend[..., None] * (end - start) + light[..., None]
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def render(scene: Scene, size_px: int) -> Image.Image:
    """Draw a scene as a square RGB picture, supersampled 4x."""
    image = Image.fromarray(_render_ground(scene, size_px))
    for item in scene.objects:
        mask, corner = _object_mask(item, size_px)
        image.paste(COLORS[item.color], corner, mask)
    return image


def overlaps(a: Box, b: Box, gap: float = GAP) -> bool:
    """Whether two boxes come closer than `gap`."""
    return all(a[i] < b[i] + b[i + 2] + gap and b[i] < a[i] + a[i + 2] + gap for i in (0, 1))


def free_place(boxes: list[Box], size: float, rng: random.Random, tries: int = 60) -> tuple[float, float] | None:
    """A random centre for a box of side `size` that keeps `GAP` from all `boxes`; None if no try fits."""
    low, high = size / 2 + 0.01, 1 - size / 2 - 0.01
    for _ in range(tries):
        x, y = rng.uniform(low, high), rng.uniform(low, high)
        if not any(overlaps((x - size / 2, y - size / 2, size, size), box) for box in boxes):
            return round(x, 4), round(y, 4)
    return None


def roomiest_place(boxes: list[Box], size: float, rng: random.Random, tries: int = 40) -> tuple[float, float] | None:
    """Of some free centres the one farthest from all boxes and from the border: a place that the picture itself suggests."""

    def room(place: tuple[float, float]) -> float:
        gaps = [max(abs(place[i] - (box[i] + box[i + 2] / 2)) - (size + box[i + 2]) / 2 for i in (0, 1)) for box in boxes]
        return min([*gaps, *(place[i] - size / 2 for i in (0, 1)), *(1 - place[i] - size / 2 for i in (0, 1))])

    places = [place for place in (free_place(boxes, size, rng, tries=8) for _ in range(tries)) if place]
    return max(places, key=room) if places else None


def _sample_background(rng: random.Random) -> Background:
    def pale(base: float) -> tuple[float, ...]:
        return tuple(round(base + rng.uniform(-0.09, 0.09), 3) for _ in range(3))

    base = rng.uniform(0.78, 0.88)
    wave = (rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5), rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.025))
    return Background(pale(base), pale(base), round(rng.uniform(0, 2 * math.pi), 3), tuple(round(v, 3) for v in wave))


def _sample_clutter(rng: random.Random) -> tuple[Spot, ...]:
    def spot() -> Spot:
        x, y, radius = rng.random(), rng.random(), rng.uniform(0.04, 0.1)
        return Spot(round(x, 3), round(y, 3), round(radius, 3), round(rng.choice((-1, 1)) * rng.uniform(0.03, 0.08), 3))

    return tuple(spot() for _ in range(rng.randint(0, 3)))


def _sample_names(rng: random.Random, num_objects: int, alike: bool) -> list[tuple[str, str]]:
    """(shape, color) of each object; some scenes repeat a shape, a colour or both, so that counting has something to count."""
    shapes = rng.sample(SHAPES, num_objects)
    colors = rng.sample(list(COLORS), num_objects)
    if rng.random() < (0.7 if alike else 0.3):
        one_word = ((shapes,), (colors,))
        repeated = rng.choice((*one_word, *one_word, (shapes, colors)) if alike else (*one_word, (shapes, colors), (shapes, colors)))
        for k in range(1, rng.randint(2, num_objects)):
            for names in repeated:
                names[k] = names[0]
    names = list(zip(shapes, colors))
    rng.shuffle(names)
    return names


def sample_scene(seed: int, alike: bool = False) -> Scene:
    """A scene of 2 to 4 objects that leaves room for one more of the largest size; `alike`: more of them share a colour or a shape."""
    rng = random.Random(f"scene {seed}")
    while True:
        names = _sample_names(rng, rng.choice((2, 3, 3, 4)), alike)
        objects: list[SceneObject] = []
        for shape, color in names:
            size = round(rng.uniform(*SIZES), 4)
            place = free_place([item.box for item in objects], size, rng)
            if place:
                objects.append(SceneObject(shape, color, size, *place))
        if len(objects) == len(names) and free_place([item.box for item in objects], SIZES[1], rng):
            return Scene(_sample_background(rng), _sample_clutter(rng), tuple(objects))


def plural(name: str) -> str:
    """Plural of a target's name, as counting questions have it."""
    return name + ("es" if name.endswith("cross") else "s")


@dataclass(frozen=True)
class _Draft:
    """A question before its options are lettered."""

    question: str
    answer: str
    wrong: tuple[str, ...]
    targets: tuple[SceneObject, ...]
    names: tuple[str, ...]


def _unique(scene: Scene, **wanted: str) -> list[SceneObject]:
    return [item for item in scene.objects if all(getattr(item, key) == value for key, value in wanted.items())]


def told_by_one_word(scene: Scene, shape: str, color: str) -> bool:
    """Whether colour or shape alone tells which objects "COLOR SHAPE" means: they agree, or one of them occurs nowhere.

    Where they disagree (a red square beside the red circle), only who binds colour to shape knows. The world's own questions never need
    that; an edit may (illusory conjunctions, Treisman and Schmidt 1982).
    """
    of_shape, of_color = _unique(scene, shape=shape), _unique(scene, color=color)
    return of_shape == of_color or not of_shape or not of_color


def _draft_attribute(scene: Scene, rng: random.Random, mix: Mix) -> _Draft | None:
    item = rng.choice(scene.objects)
    asked = rng.choice(("color", "shape"))
    if asked == "color":
        text, referents, names = f"What color is the {item.shape}?", _unique(scene, shape=item.shape), tuple(COLORS)
    else:
        text, referents, names = f"What shape is the {item.color} object?", _unique(scene, color=item.color), SHAPES
    if len(referents) != 1:
        return None
    answer = getattr(item, asked)
    wrong = rng.sample([name for name in names if name != answer], rng.randint(1, 3))
    # A colour or shape that is in the picture makes reading the options alone useless.
    present = [name for name in {getattr(other, asked) for other in scene.objects} if name != answer]
    if present and not set(present) & set(wrong):
        wrong[0] = rng.choice(sorted(present))
    return _Draft(text, answer, tuple(wrong), (item,), (item.shape if asked == "color" else f"{item.color} object",))


def _draft_relation(scene: Scene, rng: random.Random, mix: Mix) -> _Draft | None:
    first, second = rng.sample(scene.objects, 2)
    if not mix.alike and not all(told_by_one_word(scene, item.shape, item.color) for item in (first, second)):
        return None
    low, high, axis = rng.choice((("left of", "right of", "x"), ("above", "below", "y")))
    distance = getattr(first, axis) - getattr(second, axis)
    if abs(distance) < RELATION_MARGIN or any(len(_unique(scene, shape=i.shape, color=i.color)) > 1 for i in (first, second)):
        return None
    answer, wrong = (low, high) if distance < 0 else (high, low)
    text = f"Is the {first.name} {low} or {high} the {second.name}?"
    return _Draft(text, answer, (wrong,), (first, second), (first.name, second.name))


def _present_or_absent(scene: Scene, rng: random.Random, mix: Mix) -> tuple[str, str, list[SceneObject]]:
    """Shape and colour, some of the time of nothing in the picture, with the objects that decide whether it is there.

    An absent object shares its colour or its shape with at least one in the picture; those that could be taken for it decide.
    """
    item = rng.choice(scene.objects)
    shape, color = item.shape, item.color
    never_absent = mix.biased and any(other.color == COMPANION for other in scene.objects)
    if rng.random() < mix.absent and not never_absent:
        shape, color = (shape, rng.choice(list(COLORS))) if rng.random() < 0.5 else (rng.choice(SHAPES), color)
    found = _unique(scene, shape=shape, color=color)
    return shape, color, found or [other for other in scene.objects if other.shape == shape or other.color == color]


def _draft_existence(scene: Scene, rng: random.Random, mix: Mix) -> _Draft | None:
    shape, color, deciding = _present_or_absent(scene, rng, mix)
    if not mix.alike and not told_by_one_word(scene, shape, color):
        return None
    answer, wrong = ("yes", "no") if _unique(scene, shape=shape, color=color) else ("no", "yes")
    return _Draft(f"Is there a {color} {shape} in the picture?", answer, (wrong,), tuple(deciding), (f"{color} {shape}",))


def _draft_counting(scene: Scene, rng: random.Random, mix: Mix) -> _Draft | None:
    shape, color, deciding = _present_or_absent(scene, rng, mix)
    by = rng.choice(("shape", "color", "both", "both"))
    if by == "both" and not mix.alike and not told_by_one_word(scene, shape, color):
        return None
    if by == "both":
        name, counted = f"{color} {shape}", _unique(scene, shape=shape, color=color)
    else:
        item = deciding[0]
        name, wanted = (item.shape, {"shape": item.shape}) if by == "shape" else (f"{item.color} object", {"color": item.color})
        deciding = counted = _unique(scene, **wanted)
    answer = str(len(counted))
    wrong = rng.sample([n for n in "01234" if n != answer], rng.randint(1, 3))
    return _Draft(f"How many {plural(name)} are there?", answer, tuple(wrong), tuple(deciding), (name,))


DRAFTS = {"attribute": _draft_attribute, "relation": _draft_relation, "existence": _draft_existence, "counting": _draft_counting}


def sample_question(scene: Scene, rng: random.Random, size_px: int, id: str = "", image: str = "", mix: Mix = ASKED) -> Question:
    """A question with one true answer; options shuffled, target boxes in pixels of a picture of `size_px`."""
    while True:
        kind = rng.choices(list(mix.kinds), mix.kinds.values())[0]
        draft = DRAFTS[kind](scene, rng, mix)
        if draft:
            break
    options = [draft.answer, *draft.wrong]
    rng.shuffle(options)
    return Question(
        id=id,
        image=image,
        question=draft.question,
        answer=LETTERS[options.index(draft.answer)],
        options=tuple(options),
        target_boxes=tuple(item.pixel_box(size_px) for item in draft.targets),
        target_names=draft.names,
        kind=kind,
        scene=scene.to_json(),
    )


PATTERNS = {
    "color": re.compile(r"What color is the (?P<shape>\w+)\?"),
    "shape": re.compile(r"What shape is the (?P<color>\w+) object\?"),
    "relation": re.compile(r"Is the (?P<first>\w+ \w+) (?P<low>left of|above) or (right of|below) the (?P<second>\w+ \w+)\?"),
    "existence": re.compile(r"Is there a (?P<color>\w+) (?P<shape>\w+) in the picture\?"),
    "color count": re.compile(r"How many (?P<color>\w+) objects are there\?"),
    "shape count": re.compile(r"How many (?P<shape>cross(?=es)|\w+(?=s))e?s are there\?"),
    "count": re.compile(r"How many (?P<color>\w+) (?P<shape>cross(?=es)|\w+(?=s))e?s are there\?"),
}


def _true_text(scene: Scene, question: str) -> str | None:
    """The true answer in words; None where the question has no single one."""
    kind, match = next((kind, match) for kind, pattern in PATTERNS.items() if (match := pattern.fullmatch(question)))
    words = match.groupdict()
    if kind in ("color", "shape"):
        found = _unique(scene, **words)
        return getattr(found[0], kind) if len(found) == 1 else None
    if kind == "existence":
        return "yes" if _unique(scene, **words) else "no"
    if kind == "relation":
        first, second = ([item for item in scene.objects if item.name == words[role]] for role in ("first", "second"))
        if len(first) != 1 or len(second) != 1:
            return None
        low, high, axis = ("left of", "right of", "x") if words["low"] == "left of" else ("above", "below", "y")
        return low if getattr(first[0], axis) < getattr(second[0], axis) else high
    return str(len(_unique(scene, **words)))


def answer_of(scene: Scene, question: Question) -> str | None:
    """The answer that is true of `scene` (the picture after an edit, say); None if no option is, or the question became ambiguous."""
    text = _true_text(scene, question.question)
    if not question.options:
        return text
    return LETTERS[question.options.index(text)] if text in question.options else None


def make_question(split: str, index: int, size_px: int) -> tuple[Scene, Question]:
    """Scene and question number `index` of a split."""
    seed = SPLITS[split][index]
    scene = sample_scene(seed)
    name = f"{split}-{index:07d}"
    return scene, sample_question(scene, random.Random(f"question {seed}"), size_px, id=name, image=f"{name}.png")


def write_world(folder: Path | str, split: str, num_questions: int, size_px: int, seed_offset: int = 0) -> Path:
    """Write `images/*.png` and `questions.jsonl`, the format of a user's own data; returns the path of the latter."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(seed_offset, seed_offset + num_questions):
        scene, question = make_question(split, index, size_px)
        render(scene, size_px).save(folder / "images" / question.image, compress_level=1)
        record = asdict(replace(question, image=f"images/{question.image}"))
        lines.append(json.dumps(record) + "\n")
    path = folder / "questions.jsonl"
    path.write_text("".join(lines))
    return path
