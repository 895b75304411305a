"""Implanted distractors: truth kept, targets untouched, no second instance of a target, every kind drawn."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from aot_fast.data.implant import KINDS, LURE_SHARE, implant, keeps_question, matches, target_objects
from aot_fast.data.scenes import answer_of, make_question, render
from aot_fast.data.schema import edit_prompt


@pytest.fixture(scope="module")
def edits():
    pairs = [make_question("bootstrap", index, 64) for index in range(400)]
    return [(scene, question, implant(scene, question, random.Random(k), 64)) for k, (scene, question) in enumerate(pairs)]


def test_truth_and_targets_are_kept(edits):
    for scene, question, edit in edits:
        assert answer_of(edit.scene, question) == question.answer
        assert set(target_objects(scene, question, 64)) <= set(edit.scene.objects)


def test_no_second_instance_of_a_target(edits):
    for scene, question, edit in edits:
        new = set(edit.scene.objects) - set(scene.objects)
        assert not any(matches(item, name) for item in new for name in question.target_names)


def test_target_pixels_do_not_change_and_something_else_does(edits):
    for scene, question, edit in edits[:100]:
        before, after = (np.asarray(render(s, 64)).astype(int) for s in (scene, edit.scene))
        assert np.abs(before - after).max() > 8
        for x, y, w, h in question.target_boxes:
            assert (before[y : y + h, x : x + w] == after[y : y + h, x : x + w]).all()


def test_all_kinds_are_drawn_and_the_prompt_is_the_published_one(edits):
    assert set(Counter(edit.kind for _, _, edit in edits)) == set(KINDS)
    assert all(edit.prompt == edit_prompt(question.question) for _, question, edit in edits)


def test_a_share_of_what_is_new_is_a_lure_and_the_rest_shares_no_word(edits):
    lures = 0
    news = [(question, set(edit.scene.objects) - set(scene.objects)) for scene, question, edit in edits if edit.kind in ("added", "subtle")]
    able = [(question, new) for question, new in news if question.kind == "relation"]
    for question, new in able:
        words = {word for name in question.target_names for word in name.split()}
        lures += any({item.shape, item.color} & words for item in new)
    # Three standard errors.
    assert abs(lures / len(able) - LURE_SHARE) < 3 * (LURE_SHARE * (1 - LURE_SHARE) / len(able)) ** 0.5


def test_same_generator_same_edit():
    scene, question = make_question("bootstrap", 3, 64)
    assert implant(scene, question, random.Random(1), 64) == implant(scene, question, random.Random(1), 64)


def test_an_edit_that_makes_the_answer_untrue_is_refused():
    scene, question = next(
        pair for pair in (make_question("bootstrap", index, 64) for index in range(400)) if pair[1].question.startswith("What color")
    )
    target = target_objects(scene, question, 64)[0]
    assert not keeps_question(replace(scene, objects=tuple(item for item in scene.objects if item != target)), question, [])


def test_a_second_instance_is_refused_even_where_the_answer_stays_true():
    scene, question = next(
        pair
        for pair in (make_question("bootstrap", index, 64) for index in range(400))
        if pair[1].question.startswith("Is there") and pair[1].options[ord(pair[1].answer) - ord("A")] == "yes"
    )
    twin = replace(target_objects(scene, question, 64)[0], x=0.5, y=0.5)
    twice = replace(scene, objects=(*scene.objects, twin))
    assert answer_of(twice, question) == question.answer
    assert not keeps_question(twice, question, [twin])
