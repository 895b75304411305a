"""Integrity, uniqueness, efficacy and their combination, on pictures and answers made by hand."""

import math
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from aot_fast.attacker import reward
from aot_fast.attacker.integrity import crop_of, integrity, ramp, span
from aot_fast.attacker.judge import Edit, load_judge
from aot_fast.attacker.reward import combine, efficacy, score, softened, solvable
from aot_fast.config import RewardConfig
from aot_fast.data.schema import Answer, Example, Question
from tests.attacker.tiny_pipeline import picture

BOX = (16.0, 16.0, 16.0, 16.0)
RIGHT, WRONG = Answer("A", "A", True), Answer("B", "B", False)


def edit_of(image, original=None, boxes=(BOX,), names=("ball",), id="q", seed=1):
    question = Question(id, "x.png", "Where is the ball?", "A", ("left", "right"), boxes, names)
    return Edit(Example(question, original or picture()), image, "prompt", seed, 2)


def painted(image, left, top, right, bottom):
    copy = image.copy()
    copy.paste((255, 0, 0), (left, top, right, bottom))
    return copy


def answers(pattern):
    """Answerer that gives the same trials ("." right, "x" wrong) for every example."""
    return lambda examples, trials, temperature, seeds: [[WRONG if c == "x" else RIGHT for c in pattern] for _ in examples]


# Integrity


def test_untouched_boxes_have_full_integrity_whatever_happens_elsewhere():
    image = picture()
    changed = painted(image, 40, 40, 60, 60)
    assert integrity(image, changed, [BOX], 0.1) == (1.0,)
    assert integrity(image, changed, [], 0.1)[0] < 1  # no boxes: the whole picture counts


def test_a_changed_target_loses_integrity_box_by_box():
    image = picture()
    values = integrity(image, painted(image, 16, 16, 32, 32), [BOX, (44.0, 44.0, 12.0, 12.0)], 0.1)
    assert values[0] < 0.6 and values[1] == 1.0


def test_integrity_is_the_textbook_ssim():
    """Gaussian window 11 x 11, sigma 1.5, population covariance, data range 1, on one 11 x 11 box: one window, no border."""
    first, second = (np.asarray(picture(seed), dtype=np.float64)[20:31, 20:31] / 255 for seed in (0, 1))
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line)[..., None] / np.outer(line, line).sum()
    m1, m2 = ((window * x).sum((0, 1)) for x in (first, second))
    v1, v2 = ((window * x * x).sum((0, 1)) - m * m for x, m in ((first, m1), (second, m2)))
    cov = (window * first * second).sum((0, 1)) - m1 * m2
    ssim = (2 * m1 * m2 + 1e-4) * (2 * cov + 9e-4) / ((m1**2 + m2**2 + 1e-4) * (v1 + v2 + 9e-4))
    found = integrity(picture(0), picture(1), [(20.0, 20.0, 11.0, 11.0)], 0.0)[0]
    assert found == pytest.approx(ssim.mean(), abs=1e-9)


def test_the_original_and_its_boxes_are_scaled_to_the_edit():
    large = picture(size=(128, 64))
    small = large.resize((64, 32), Image.Resampling.LANCZOS)
    changed = painted(small, 8, 8, 24, 24)
    values = integrity(large, changed, [(16.0, 16.0, 32.0, 32.0), (96.0, 20.0, 24.0, 24.0)], 0.0)
    assert values[0] < 0.6 and values[1] == 1.0


@pytest.mark.parametrize(
    "low, high, expected",
    [(20, 40, (20, 40)), (30, 33, (26, 37)), (0, 2, (0, 11)), (62, 64, (53, 64)), (-5, 4.2, (0, 11)), (10.2, 30.7, (10, 31))],
)
def test_small_boxes_are_enlarged_to_the_window_inside_the_picture(low, high, expected):
    assert span(low, high, 64) == expected


def test_padding_is_a_share_of_the_longer_side():
    assert crop_of((20.0, 20.0, 20.0, 10.0), (1.0, 1.0), (64, 64), 0.1) == (18, 18, 42, 32)


@pytest.mark.parametrize("box", [(70.0, 10.0, 5.0, 5.0), (-9.0, 10.0, 5.0, 5.0)])
def test_a_box_outside_the_picture_is_an_error(box):
    with pytest.raises(ValueError, match="outside"):
        integrity(picture(), picture(), [box], 0.1)


def test_ramp():
    assert [ramp(q, 0.6, 0.8) for q in (-1, 0.6, 0.7, 0.8, 1)] == pytest.approx([0, 0, 0.5, 1, 1])


# Efficacy and the combination


def test_efficacy_is_the_share_of_wrong_trials():
    assert efficacy([WRONG, RIGHT, WRONG, WRONG], RewardConfig()) == 0.75


def test_consecutive_efficacy_wants_the_first_k_wrong():
    config = RewardConfig(efficacy="consecutive", consecutive=2)
    assert [efficacy(row, config) for row in ([WRONG, WRONG, RIGHT], [WRONG, RIGHT, WRONG])] == [1.0, 0.0]
    with pytest.raises(ValueError, match="consecutive"):
        score([], replace(config, trials=1), answers("x"), None)


def test_rewards_combine_as_written():
    assert combine(0.5, 0.7, 1.0, 0.75, RewardConfig()) == pytest.approx(0.375)
    assert combine(0.5, 0.7, 0.0, 0.75, RewardConfig(kind="weighted", weights=(0.5, 0.4, 0.1))) == pytest.approx(0.375 + 0.28)


def test_verdict_of_a_good_attack_and_of_a_corrupted_target():
    image = picture()
    good, corrupt = edit_of(painted(image, 44, 44, 60, 60)), edit_of(painted(image, 14, 14, 34, 34))
    first, second = score([good, corrupt], RewardConfig(), answers("xx.x"), None)
    assert (first.reward, first.ramp, first.uniqueness, first.efficacy, first.accepted) == (0.75, 1.0, 1.0, 0.75, True)
    assert first.answers == ("B", "B", "A", "B") and (first.prompt, first.seed, first.attacker_round) == ("prompt", 1, 2)
    assert second.reward == 0 and second.ramp == 0 and not second.accepted


def test_the_defender_sees_the_edit_and_its_own_seed():
    seen = []

    def answerer(examples, trials, temperature, seeds):
        seen.extend((e.image, e.source, e.attacker_round, trials, temperature, seed) for e, seed in zip(examples, seeds))
        return [[WRONG] * trials for _ in examples]

    pictures = [picture(1), picture(2)]
    score([edit_of(image, seed=i) for i, image in enumerate(pictures)], RewardConfig(trials=3, temperature=0.5), answerer, None)
    assert [row[:5] for row in seen] == [(image, "edit", 2, 3, 0.5) for image in pictures]
    assert seen[0][5] != seen[1][5]


# Uniqueness


def counter(counts):
    """Answerer that counts by the picture: {id(image) or None: parsed}; records what it was asked."""
    asked = []

    def answerer(examples, trials, temperature, seeds):
        asked.extend(examples)
        assert trials == 1 and temperature == 0
        return [[Answer("", counts(example), True)] for example in examples]

    answerer.asked = asked
    return answerer


def test_a_second_instance_is_found_by_counting_both_pictures():
    image, doubled = picture(0), picture(1)
    answerer = counter(lambda e: "C" if e.image is doubled else "B")
    judge = load_judge(RewardConfig(), answerer)
    assert judge([edit_of(image), edit_of(doubled), edit_of(image)]) == [1.0, 0.0, 1.0]
    assert len(answerer.asked) == 4  # the shared original once, three edits
    assert answerer.asked[0].question.question == "How many ball are there?" and answerer.asked[0].question.options[0] == "0"
    assert score([edit_of(doubled, original=doubled.copy())], RewardConfig(), answers("xxxx"), judge)[0].reward == 0


def test_every_target_is_counted():
    edited = picture(1)
    judge = load_judge(RewardConfig(), counter(lambda e: "C" if e.image is edited and "cube" in e.question.question else "B"))
    assert judge([edit_of(edited, names=("ball",)), edit_of(edited, names=("ball", "cube"))]) == [1.0, 0.0]


def test_the_judge_may_have_to_answer_the_question_too():
    """A third picture deceives the judge about nothing but the question: only `judge_answers` finds it."""
    image, doubled, changed = picture(0), picture(1), picture(2)

    def answerer(examples, trials, temperature, seeds):
        counts = [Answer("", "C" if e.image is doubled else "B", True) for e in examples]
        own = [e.question.question.startswith("How many ball") for e in examples]
        return [[count if counted else Answer("", "", e.image is not changed)] for e, count, counted in zip(examples, counts, own)]

    edits = [edit_of(image), edit_of(doubled), edit_of(changed), edit_of(changed, names=("ball", "cube"))]
    assert load_judge(RewardConfig(), answerer)(edits[:3]) == [1.0, 0.0, 1.0]
    assert load_judge(RewardConfig(judge_answers=True), answerer)(edits) == [1.0, 0.0, 0.0, 0.0]


def test_questions_without_names_pass_with_one_warning():
    judge = load_judge(RewardConfig(), counter(lambda e: "B"))
    with pytest.warns(UserWarning, match="target_names"):
        assert judge([edit_of(picture(), names=())]) == [1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judge([edit_of(picture(), names=())]) == [1.0]
    assert judge.unjudged == 2


def never_unique(edits):
    return [0.0] * len(edits)


def test_judge_can_be_off_or_a_function():
    assert load_judge(RewardConfig(judge="off"), answers("")) is None
    judge = load_judge(RewardConfig(judge="tests.attacker.test_attacker_reward:never_unique"), answers(""))
    assert score([edit_of(picture())], RewardConfig(), answers("xxxx"), judge)[0].reward == 0
    for wrong in ("nowhere", "math:nothing"):
        with pytest.raises(ValueError, match="reward.judge"):
            load_judge(RewardConfig(judge=wrong), answers(""))


def test_softened_odds_keep_order_and_lift_what_is_rare():
    assert softened(0.01, 1.0) == pytest.approx(0.01) and softened(0.5, 3.0) == pytest.approx(0.5)
    odds = softened(0.001, 3.0) / (1 - softened(0.001, 3.0))
    assert odds == pytest.approx((0.001 / 0.999) ** (1 / 3))
    values = [softened(p, 3.0) for p in (0.0, 1e-6, 0.01, 0.4, 0.99, 1.0)]
    assert values == sorted(values) and values[0] == 0 and values[-1] == 1
    assert math.isnan(softened(math.nan, 3.0)) and softened(1 + 1e-7, 3.0) == 1 and softened(-1e-7, 3.0) == 0


# Faults


@pytest.mark.parametrize("fault", ["raises", "none", "nan"])
def test_a_judge_that_fails_for_one_edit_leaves_the_others_scored(fault):
    def judge(edits):
        values = []
        for edit in edits:
            if edit.example.question.id != "bad":
                values.append(1.0)
            elif fault == "raises":
                raise RuntimeError("boom")
            else:
                values.append(None if fault == "none" else math.nan)
        return values

    edits = [edit_of(picture(), id=name) for name in ("a", "bad", "b")]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        verdicts = score(edits, RewardConfig(), answers("xxxx"), judge)
    assert [v.reward for v in verdicts[::2]] == [1.0, 1.0]
    assert math.isnan(verdicts[1].reward) and not verdicts[1].accepted


def test_a_bad_box_or_a_failing_defender_quarantines_that_edit_only():
    def answerer(examples, trials, temperature, seeds):
        if any(example.question.id == "long" for example in examples):
            raise ValueError("the prompt is too long")
        return [[WRONG] * trials for _ in examples]

    edits = [edit_of(picture()), edit_of(picture(), boxes=((90.0, 0.0, 5.0, 5.0),), id="box"), edit_of(picture(), id="long")]
    with pytest.warns(UserWarning, match="quarantined"):
        verdicts = score(edits, RewardConfig(), answerer, None)
    assert [math.isnan(v.reward) for v in verdicts] == [False, True, True]
    assert math.isnan(verdicts[1].q)


def test_no_edits_no_verdicts():
    assert score([], RewardConfig(), lambda *_: [], None) == []


def test_solvable_wants_every_trial_right_on_both_pictures():
    coded = [picture(i) for i in range(3)]
    wrong_when = {("q1", "clean"), ("q2", "roundtrip")}

    def answerer(examples, trials, temperature, seeds):
        assert trials == 2 and len(set(seeds)) == len(seeds)
        return [[RIGHT, WRONG if (e.question.id, e.source) in wrong_when else RIGHT] for e in examples]

    questions = [edit_of(picture(), id=f"q{i}").example for i in range(3)]
    assert solvable(questions, coded, RewardConfig(solvable_trials=2), answerer, 0) == [True, False, False]


def test_likelihood_takes_the_place_of_trials():
    config = RewardConfig(efficacy="likelihood")

    def likelihood(originals, edited):
        assert [e.source for e in edited] == ["edit"] * 2 and [o.source for o in originals] == ["clean"] * 2
        return [0.25, None]

    kept, lost = score([edit_of(picture()), edit_of(picture())], config, answers("...."), None, likelihood)
    assert kept.efficacy == kept.reward == 0.75 and kept.accepted and kept.answers == ()
    assert math.isnan(lost.efficacy) and math.isnan(lost.reward) and not lost.accepted


def test_likelihood_without_a_defender_that_tells_it_is_refused():
    with pytest.raises(ValueError, match="reward.efficacy"):
        score([edit_of(picture())], RewardConfig(efficacy="likelihood"), answers("...."), None)


def test_ssim_is_measured_while_the_judge_is_at_work(monkeypatch):
    """Each waits for the other: one after the other, both would wait in vain."""
    meet = threading.Barrier(2, timeout=30)

    def measured(edit, config):
        meet.wait()
        return (1.0,)

    def judge(edits):
        meet.wait()
        return [1.0] * len(edits)

    monkeypatch.setattr(reward, "_integrity", measured)
    [verdict] = score([edit_of(picture())], RewardConfig(trials=2), answers("xx"), judge)
    assert verdict.integrity == (1.0,) and verdict.reward == 1
