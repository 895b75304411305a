"""How often the audit errs, on edits whose truth is known: half keep the answer, half break it.

    python -m aot_fast.evaluation.audit_error --num 1000 --out audit_error.json

Every edit is drawn by `render`, worn as a sampler would wear it, and passed through the bundled Attacker's codec. `validation` split only.
Not measured, for nobody knows their truth: half-formed shapes of several colours, which the audit takes for doubtful.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from aot_fast.data.audit import Audit, audit
from aot_fast.data.implant import SUBTLE_SIZES, implant, target_objects
from aot_fast.data.scenes import COLORS, SHAPES, SIZES, Scene, SceneObject, Spot, answer_of, free_place, make_question, plural, render
from aot_fast.data.schema import Question
from aot_fast.evaluation.statistics import Share, share

SIZE_PX = 64
WEAR = {"codec": 0.4, "blurred": 0.2, "pale": 0.2, "noisy": 0.2}
"""Share of the edits that are passed through the codec as drawn, that are blurred or noisy before it, or of partial opacity after it."""
BLURS_PX = (0.4, 0.9)
OPACITIES = (0.65, 0.95)
NOISES = (4.0, 14.0)
"""Standard deviation, of 255."""
BREAKS = ("added", "removed", "recolored", "reshaped", "swapped")
SMALL_SHARE = 0.15
"""Of the objects that are added to break an answer, those as small as subtle implants; as many as implants have."""


@dataclass(frozen=True)
class KnownEdit:
    """An edit of known truth."""

    scene: Scene
    kind: str
    keeps: bool
    """Whether the answer is still true."""


def _added(scene: Scene, names: Sequence[tuple[str, str]], rng: random.Random) -> KnownEdit | None:
    """One more object with one of the (shape, color) `names`."""
    small = rng.random() < SMALL_SHARE
    size = round(rng.uniform(*(SUBTLE_SIZES if small else SIZES)), 4)
    place = free_place([item.box for item in scene.objects], size, rng)
    if place is None:
        return None
    item = SceneObject(*rng.choice(names), size, *place)
    return KnownEdit(replace(scene, objects=(*scene.objects, item)), "small added" if small else "added", False)


def _changed(scene: Scene, old: Sequence[SceneObject], kind: str, rng: random.Random) -> KnownEdit:
    """Objects removed, or each given another colour or another shape."""

    def new(item: SceneObject) -> SceneObject:
        if kind == "recolored":
            return replace(item, color=rng.choice([color for color in COLORS if color != item.color]))
        return replace(item, shape=rng.choice([shape for shape in SHAPES if shape != item.shape]))

    kept = [item for item in scene.objects if item not in old]
    return KnownEdit(replace(scene, objects=(*kept, *(() if kind == "removed" else map(new, old)))), kind, False)


def _swapped(scene: Scene, targets: Sequence[SceneObject], rng: random.Random) -> KnownEdit:
    """Two objects change places."""
    first = rng.choice(targets)
    second = rng.choice([item for item in scene.objects if item is not first])
    places = {first: replace(first, x=second.x, y=second.y), second: replace(second, x=first.x, y=first.y)}
    return KnownEdit(replace(scene, objects=tuple(places.get(item, item) for item in scene.objects)), "swapped", False)


def _try_to_break(scene: Scene, question: Question, kind: str, rng: random.Random) -> KnownEdit | None:
    targets = target_objects(scene, question, SIZE_PX) or list(scene.objects)
    if kind == "added":
        # What the question names is likely to be taken for a target; what breaks nothing is thrown away by the caller.
        words = re.findall(r"\w+", " ".join((question.question, *question.target_names)))
        shapes = [shape for shape in SHAPES if shape in words or plural(shape) in words]
        colors = [color for color in COLORS if color in words]
        return _added(scene, [(s, c) for s in shapes or SHAPES for c in colors or COLORS], rng)
    if kind == "swapped":
        return _swapped(scene, targets, rng)
    # All targets at once where there are several of a kind: one of two may be missed by no question.
    return _changed(scene, rng.choice(([rng.choice(targets)], targets)), kind, rng)


def break_answer(scene: Scene, question: Question, rng: random.Random) -> KnownEdit:
    """A random edit after which `answer_of` is no longer the question's answer; the kinds are tried in random order."""
    for kind in rng.sample(BREAKS, len(BREAKS)):
        for _ in range(20):
            edit = _try_to_break(scene, question, kind, rng)
            if edit and answer_of(edit.scene, question) != question.answer:
                return edit
    raise AssertionError(f"{question.id}: no edit breaks it")


def keep_answer(scene: Scene, question: Question, rng: random.Random) -> KnownEdit:
    """A random edit that changes no answer: nothing at all, the light, colourless blobs, or an implant of any kind."""
    kind = rng.choices(("unchanged", "light", "grey blob", "implant"), (0.1, 0.1, 0.1, 0.7))[0]
    if kind == "implant":
        made = implant(scene, question, rng, SIZE_PX)
        return KnownEdit(made.scene, made.kind, True)
    if kind == "light":
        tint = [rng.uniform(-0.08, 0.08) for _ in range(6)]
        start, end = (
            tuple(c + t for c, t in zip(*pair)) for pair in zip((scene.background.start, scene.background.end), (tint[:3], tint[3:]))
        )
        return KnownEdit(replace(scene, background=replace(scene.background, start=start, end=end)), kind, True)
    if kind == "grey blob":
        spots = [Spot(rng.random(), rng.random(), rng.uniform(0.03, 0.1), rng.choice((-1, 1)) * rng.uniform(0.08, 0.2)) for _ in range(3)]
        return KnownEdit(replace(scene, clutter=(*scene.clutter, *spots)), kind, True)
    return KnownEdit(scene, kind, True)


@dataclass(frozen=True)
class Case:
    """An edit of known truth as pictures."""

    question: Question
    edit: KnownEdit
    wear: str
    before: Image.Image
    after: Image.Image


def _change_mask(scene: Scene, edited: Scene, margin_px: int) -> Image.Image:
    old, new = (np.asarray(render(part, SIZE_PX)) for part in (scene, edited))
    mask = Image.fromarray((old != new).any(-1).astype(np.uint8) * 255)
    return mask.filter(ImageFilter.MaxFilter(2 * margin_px + 1))


def _worn(scene: Scene, edited: Scene, wear: str, rng: random.Random) -> Image.Image:
    """The edited scene, blurred or noisy where it differs from the clean picture."""
    new = render(edited, SIZE_PX)
    if wear == "blurred":
        new.paste(new.filter(ImageFilter.GaussianBlur(rng.uniform(*BLURS_PX))), mask=_change_mask(scene, edited, 3))
    elif wear == "noisy":
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(*NOISES), (SIZE_PX, SIZE_PX, 3))
        noisy = (np.asarray(new) + noise).clip(0, 255).round().astype(np.uint8)
        new.paste(Image.fromarray(noisy), mask=_change_mask(scene, edited, 1))
    return new


def draw_cases(num: int, first: int = 0) -> list[Case]:
    """`num` edits of the `validation` split from number `first`, every other one breaking the answer, worn and through the codec."""
    drawn = []
    for index in range(first, first + num):
        scene, question = make_question("validation", index, SIZE_PX)
        rng = random.Random(f"audit {index}")
        edit = (break_answer if index % 2 else keep_answer)(scene, question, rng)
        drawn.append((scene, question, edit, rng.choices(list(WEAR), WEAR.values())[0], rng))
    edits = through_codec([_worn(scene, edit.scene, wear, rng) for scene, _, edit, wear, rng in drawn])
    grounds = iter(through_codec([render(replace(edit.scene, objects=()), SIZE_PX) for _, _, edit, wear, _ in drawn if wear == "pale"]))
    cases = []
    for (scene, question, edit, wear, rng), after in zip(drawn, edits):
        if wear == "pale":
            # After the codec: it repaints what is pale before it (red as orange, green as blue), and the truth would be lost there.
            after.paste(Image.blend(next(grounds), after, rng.uniform(*OPACITIES)), mask=_change_mask(scene, edit.scene, 1))
        cases.append(Case(question, edit, wear, render(scene, SIZE_PX), after))
    return cases


def through_codec(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures, encoded and decoded by the bundled Attacker's VAE."""
    if not pictures:
        return []
    import torch
    from diffusers import AutoencoderKLQwenImage

    from aot_fast.bootstrap.vae import decode_latents, encode_pictures, use_image_convolutions

    folder = Path(__file__).parents[1] / "assets" / "tiny" / "attacker" / "vae"
    vae = use_image_convolutions(AutoencoderKLQwenImage.from_pretrained(folder).eval())
    batch = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()
    decoded = decode_latents(vae, encode_pictures(vae, batch)).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in decoded]


Judged = tuple[Case, Audit]


def figures(judged: Iterable[Judged], verdict: str = "valid") -> dict[str, Share]:
    """Recall and precision of `verdict` ("valid" or "likely") and of its opposite; the precisions hold for a half-and-half mix."""
    told = [(case.edit.keeps, getattr(found, verdict)) for case, found in judged]
    return {
        "broken_recall": share(not true for keeps, true in told if not keeps),
        "broken_precision": share(not keeps for keeps, true in told if not true),
        "still_true_recall": share(true for keeps, true in told if keeps),
        "still_true_precision": share(keeps for keeps, true in told if true),
    }


def _by(judged: Sequence[Judged], key: Callable[[Case], str], measured: Callable[[list[Judged]], Any]) -> dict[str, Any]:
    names = sorted({key(case) for case, _ in judged})
    return {name: measured([pair for pair in judged if key(pair[0]) == name]) for name in names}


def error_rates(judged: Sequence[Judged]) -> dict[str, Any]:
    """All figures with their Wilson intervals, and how often each kind of edit is given which attack type."""

    def all_figures(part: list[Judged], verdict: str = "valid") -> dict[str, Any]:
        return {name: value.to_json() for name, value in figures(part, verdict).items()}

    def right(part: list[Judged]) -> dict[str, Any]:
        return share(found.valid == case.edit.keeps for case, found in part).to_json()

    def attacks(part: list[Judged]) -> dict[str, int]:
        return dict(Counter(found.kind for _, found in part).most_common())

    def edit_kind(case: Case) -> str:
        return f"{'keeps' if case.edit.keeps else 'breaks'}: {case.edit.kind}"

    return {
        "all": all_figures([*judged]),
        "best_reading": all_figures([*judged], "likely"),
        "by_question": _by(judged, lambda case: case.question.kind, all_figures),
        "by_wear": _by(judged, lambda case: case.wear, all_figures),
        "right_by_edit": _by(judged, edit_kind, right),
        "attack_by_edit": _by(judged, edit_kind, attacks),
    }


def measure(num: int, first: int = 0) -> dict[str, Any]:
    """Draw and audit `num` edits."""
    cases = draw_cases(num, first)
    audit(cases[0].question, cases[0].before, cases[0].after)  # the templates are drawn once a process
    start = time.process_time()  # the clock on the wall also counts what else the machine does
    judged = [(case, audit(case.question, case.before, case.after)) for case in cases]
    milliseconds = 1000 * (time.process_time() - start) / num
    return {"num": num, "first": first, "cpu_ms_per_picture": round(milliseconds, 2), **error_rates(judged)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first question of the validation split")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = json.dumps(measure(options.num, options.first), indent=1)
    print(found)
    if options.out:
        options.out.write_text(found + "\n")


if __name__ == "__main__":
    main()
