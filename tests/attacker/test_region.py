"""Edits of a window: where it lies, what stays untouched, and what it costs."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from aot_fast.attacker.encoding import roundtrip
from aot_fast.attacker.region import Window, cut, paste, place_window
from aot_fast.attacker.rollout import rollout
from aot_fast.data.schema import Example, Question

PLACE = {"seed": 0, "round": 1, "step": 0}


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def overlaps(window, box):
    return (
        window.left < box[0] + box[2]
        and box[0] < window.left + window.width
        and window.top < box[1] + box[3]
        and box[1] < window.top + window.height
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [(640, 480), (200, 3000), (130, 100), (4000, 3001)])
def test_a_window_has_its_area_lies_inside_and_covers_no_target(size, seed):
    box = (10, 10, 40, 30)
    window = place_window(size, [box], 96 * 96, 16, seed)
    assert window.width % 16 == window.height % 16 == 0 and 0.8 < window.width * window.height / 96**2 < 1.2
    assert 0 <= window.left <= size[0] - window.width and 0 <= window.top <= size[1] - window.height
    assert size == (130, 100) or not overlaps(window, box)  # there is no room beside the box in the small one
    assert window == place_window(size, [box], 96 * 96, 16, seed)


def test_windows_differ_and_the_least_covering_place_is_taken():
    windows = {place_window((640, 480), [], 96 * 96, 16, seed) for seed in range(20)}
    assert len(windows) > 15
    box = (0, 0, 640, 400)  # leaves a strip too low for the window
    window = place_window((640, 480), [box], 96 * 96, 16, 0)
    assert window.top + window.height > 460  # of 64 places one is near the lower border


def test_a_small_picture_is_edited_as_a_whole():
    assert place_window((96, 96), [], 96 * 96, 16, 0) is None
    assert place_window((20000, 14), [], 96 * 96, 16, 0) is None  # nor can a strip lower than a unit be cut


def test_outside_the_window_every_bit_stays():
    picture, window = noise(300, 200), Window(60, 48, 96, 80)
    made = np.asarray(paste(picture, window, Image.new("RGB", (96, 80), (255, 0, 0)), feather=8)).astype(int)
    before = np.asarray(picture).astype(int)
    inside = np.zeros(before.shape[:2], dtype=bool)
    inside[48:128, 60:156] = True
    assert (made[~inside] == before[~inside]).all()
    assert (made[56:120, 68:148] == (255, 0, 0)).all()  # beyond the border's 8 pixels
    edge = made[48:128, 60]  # a ninth of the edit
    assert np.abs(edge - (before[48:128, 60] * 8 / 9 + np.array((255, 0, 0)) / 9)).max() <= 0.5


def test_no_fading_at_the_pictures_own_border():
    picture = noise(96, 200)
    made = np.asarray(paste(picture, Window(0, 0, 96, 96), Image.new("RGB", (96, 96)), feather=8))
    assert not made[:88].any() and (made[96:] == np.asarray(picture)[96:]).all()


def large(i, size):
    return Example(
        Question(f"q{i}", f"{i}.png", "Is the ball left of the cube?", "A", ("Yes", "No"), ((8, 8, 24, 24),)), noise(*size, seed=i)
    )


def test_a_group_shares_its_window_and_costs_what_a_small_picture_costs(base_config, load):
    attacker = load(replace(base_config, region="window", feather=4))
    asked = [large(0, (640, 480)), large(1, (1600, 1200)), large(2, (64, 64))]
    groups = rollout(attacker, asked, **PLACE)
    for example, group in zip(asked, groups):
        before = np.asarray(example.image).astype(int)
        changed = [np.abs(np.asarray(edit.image).astype(int) - before).max(-1) > 0 for edit in group.edits]
        assert all(edit.image.size == example.image.size for edit in group.edits)
        rows, columns = np.nonzero(np.any(changed, axis=0))
        assert np.ptp(rows) < 80 and np.ptp(columns) < 80  # one window of about 64 x 64 for all samples
        assert group.encoding.size[0] * group.encoding.size[1] <= 72 and all(x.any() for x in changed)
        if example.image.size != (64, 64):
            assert not any(x[8:32, 8:32].any() for x in changed)  # the target
    again = rollout(attacker, asked, **PLACE)
    assert all(np.array_equal(a.image, b.image) for g, h in zip(groups, again) for a, b in zip(g.edits, h.edits))
    elsewhere = rollout(attacker, asked, **PLACE | {"step": 1})
    assert not np.array_equal(groups[1].edits[0].image, elsewhere[1].edits[0].image)


def test_the_codecs_round_trip_is_of_a_window_too(base_config, load):
    attacker = load(replace(base_config, region="window"))
    [made] = roundtrip(attacker, [large(0, (640, 480))])
    changed = np.abs(np.asarray(made).astype(int) - np.asarray(large(0, (640, 480)).image).astype(int)).max(-1) > 0
    assert made.size == (640, 480) and 0 < changed.sum() <= 72 * 64 * 1.2


def test_cut_and_paste_of_nothing_new_changes_nothing():
    picture, window = noise(300, 200), Window(60, 48, 96, 80)
    assert np.array_equal(paste(picture, window, cut(picture, window), 8), picture)
