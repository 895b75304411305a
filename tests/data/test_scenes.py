"""The small world: same seed, same world; true answers; boxes that hold their objects; disjoint splits."""

import itertools
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import aot_fast
from aot_fast.data.scenes import (
    ASKED,
    COLORS,
    COMPANION,
    DRAFTS,
    SPLITS,
    Scene,
    answer_of,
    free_place,
    make_question,
    overlaps,
    render,
    roomiest_place,
    sample_question,
    sample_scene,
    told_by_one_word,
    write_world,
)
from aot_fast.data.schema import LETTERS

COUNT = 400


@pytest.fixture(scope="module")
def world():
    return [make_question("validation", index, 64) for index in range(COUNT)]


def test_same_seed_gives_the_same_pixels_and_question():
    first, second = (make_question("train", 7, 64) for _ in range(2))
    assert first == second
    assert render(first[0], 64).tobytes() == render(second[0], 64).tobytes()
    assert make_question("train", 8, 64)[0] != first[0]


def test_splits_share_no_seed():
    for a, b in itertools.combinations(SPLITS.values(), 2):
        assert max(a.start, b.start) >= min(a.stop, b.stop)


def test_splits_share_no_picture():
    pictures = {split: {render(make_question(split, index, 32)[0], 32).tobytes() for index in range(60)} for split in SPLITS}
    assert sum(map(len, pictures.values())) == len(set.union(*pictures.values()))


def test_scene_survives_json(world):
    for scene, _ in world[:50]:
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


def test_every_answer_is_true_and_all_kinds_and_letters_appear(world):
    assert all(answer_of(scene, question) == question.answer for scene, question in world)
    assert {question.kind for _, question in world} == set(DRAFTS)
    assert {question.answer for _, question in world} == set("ABCD")


def test_answer_follows_the_scene_graph(world):
    scene, question = next((s, q) for s, q in world if q.question.startswith("What color"))
    target = next(item for item in scene.objects if item.pixel_box(64) in question.target_boxes)
    others = tuple(item for item in scene.objects if item is not target)
    wrong = next(option for option in question.options if option != target.color)
    assert question.options[ord(answer_of(replace(scene, objects=(*others, replace(target, color=wrong))), question)) - ord("A")] == wrong
    # A second referent leaves no single true answer.
    assert answer_of(replace(scene, objects=(*scene.objects, replace(target, color=wrong))), question) is None


def named_objects(question):
    """(shape, color) of all things that a question names by both."""
    names = [name.split() for name in question.target_names]
    return [(shape, color) for color, shape in (name for name in names if len(name) == 2) if shape != "object"]


def test_no_question_of_the_world_needs_colour_bound_to_shape_and_the_alike_ones_do(world):
    assert all(told_by_one_word(scene, *name) for scene, question in world for name in named_objects(question))
    scenes = [sample_scene(seed, alike=True) for seed in SPLITS["validation"][:COUNT]]
    alike = [(scene, sample_question(scene, random.Random(k), 64, mix=replace(ASKED, alike=True))) for k, scene in enumerate(scenes)]
    assert all(answer_of(scene, question) == question.answer for scene, question in alike)
    needing = [any(not told_by_one_word(scene, *name) for name in named_objects(question)) for scene, question in alike]
    assert sum(needing) > 0.25 * COUNT


def test_nobody_asks_in_vain_beside_something_red():
    """The world's bias, on which the small Defender's weak spot rests; the judge's lessons are without it."""
    answers = {True: [], False: []}
    for index in range(300):
        scene, question = make_question("validation", index, 64)
        if question.kind == "existence":
            beside = any(item.color == COMPANION for item in scene.objects)
            answers[beside].append(question.options[LETTERS.index(question.answer)])
    assert set(answers[True]) == {"yes"} and len(answers[True]) > 50
    assert answers[False].count("no") > 50 and answers[False].count("yes") > 10


def test_relation_turns_over_with_the_mirrored_scene(world):
    relations = [(s, q) for s, q in world if q.kind == "relation"]
    assert relations
    for scene, question in relations:
        mirrored = replace(scene, objects=tuple(replace(item, x=1 - item.x, y=1 - item.y) for item in scene.objects))
        assert answer_of(mirrored, question) != question.answer


@pytest.mark.parametrize("size_px", [64, 200])  # the small world's own size, and one that is no multiple of the latent grid
def test_boxes_hold_their_objects_and_nothing_of_others(size_px):
    for index in range(60):
        scene, _ = make_question("validation", index, size_px)
        empty = np.asarray(render(replace(scene, objects=()), size_px)).astype(int)
        for item in scene.objects:
            alone = np.asarray(render(replace(scene, objects=(item,)), size_px)).astype(int)
            rows, columns = np.nonzero(np.abs(alone - empty).max(-1) > 8)
            x, y, w, h = item.pixel_box(size_px)
            assert x <= columns.min() and columns.max() < x + w and y <= rows.min() and rows.max() < y + h
            # The outline touches all sides of the box in the scene graph; antialiasing costs a pixel, thin tips another.
            slack_px = 1.0 if item.shape in ("square", "circle", "ring", "cross") else 2.0
            for pixels, centre in ((columns, item.x), (rows, item.y)):
                assert pixels.min() == pytest.approx((centre - item.size / 2) * size_px, abs=slack_px)
                assert pixels.max() + 1 == pytest.approx((centre + item.size / 2) * size_px, abs=slack_px)
        assert not any(overlaps(a.box, b.box) for a, b in itertools.combinations(scene.objects, 2))


def test_targets_are_objects_of_the_scene(world):
    for scene, question in world:
        boxes = {item.pixel_box(64) for item in scene.objects}
        assert question.target_boxes and set(question.target_boxes) <= boxes


def test_an_object_shows_its_colour():
    for index in range(40):
        scene, _ = make_question("validation", index, 64)
        for item in scene.objects:
            if item.shape in ("circle", "square", "diamond", "cross", "star"):
                pixel = render(scene, 64).getpixel((int(item.x * 64), int(item.y * 64)))
                assert pixel == COLORS[item.color]


def test_questions_do_not_depend_on_the_state_of_a_global_generator():
    scene, _ = make_question("train", 0, 64)
    random.seed(1)
    first = sample_question(scene, random.Random(5), 64)
    random.seed(2)
    assert sample_question(scene, random.Random(5), 64) == first


def test_written_world_reads_like_user_data_and_10k_take_under_20_seconds(tmp_path):
    start = time.process_time()
    path = write_world(tmp_path, "validation", 300, 64, seed_offset=100)
    # 2 ms a question is 20 s for 10k; it takes about 1 ms on an idle core, and the bound leaves a busy machine a factor of two.
    assert (time.process_time() - start) / 300 < 0.002
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 300 and (tmp_path / records[0]["image"]).exists()
    assert list(records[0]) == ["id", "image", "question", "answer", "options", "target_boxes", "target_names", "kind", "scene"]
    assert Scene.from_json(records[0]["scene"]) == make_question("validation", 100, 64)[0]


def test_the_roomiest_place_is_free_and_has_more_room_than_another():
    boxes = [(0.05, 0.05, 0.3, 0.3), (0.6, 0.1, 0.25, 0.25)]
    size, rng = 0.25, random.Random(0)

    def gap(place):
        left, top = (c - size / 2 for c in place)
        borders = (left, top, 1 - left - size, 1 - top - size)
        return min(*borders, *(max(max(a - (b + w), b - (a + size)) for a, b, w in ((left, x, w), (top, y, h))) for x, y, w, h in boxes))

    chosen, others = roomiest_place(boxes, size, rng), [free_place(boxes, size, rng) for _ in range(50)]
    assert not any(overlaps((*(c - size / 2 for c in chosen), size, size), box) for box in boxes)
    assert gap(chosen) > sorted(map(gap, others))[25]  # beats the median of places drawn at random
    assert roomiest_place([(0.0, 0.0, 1.0, 1.0)], size, rng) is None


def test_heldout_scenes_come_from_seeds_that_nothing_is_trained_or_tuned_on():
    """Held out are seeds 40,000,000 to 49,999,999; the retired 10 to 20 million, once looked at while tuning, are in no split."""
    assert SPLITS["heldout"] == range(40_000_000, 50_000_000)
    ranges = sorted(SPLITS.values(), key=lambda seeds: seeds.start)
    assert all(a.stop <= b.start for a, b in zip(ranges, ranges[1:]))
    assert not any(seeds.start < 20_000_000 and seeds.stop > 10_000_000 for seeds in SPLITS.values())
    package = Path(aot_fast.__file__).parent
    naming = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if '"heldout"' in path.read_text(encoding="utf-8")}
    # The split itself, the game's held-out set of that name, and the report that shows it: no bootstrap, no doctor.
    assert naming == {"data/scenes.py", "data/sets.py", "report/run_files.py"}
